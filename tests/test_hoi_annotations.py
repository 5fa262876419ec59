"""HICO-DET's and V-COCO's files: what is read and written, and what is refused, naming file, image, field."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from toy_hoi import table

from rankfold.hoi.annotations import Annotations, Scene
from rankfold.hoi.hicodet import read_hicodet, write_hicodet
from rankfold.hoi.splits import split
from rankfold.hoi.vcoco import read_vcoco

HICO: dict[str, Any] = {
    "annotation": [
        {
            "boxes_h": [[1, 1, 64, 48], [5, 6, 20, 30]],
            "boxes_o": [[11, 3, 40, 40], [5, 6, 20.5, 30]],
            "hoi": [1, 2],
            "object": [0, 1],
            "verb": [1, 0],
        },
        {"boxes_h": [], "boxes_o": [], "hoi": [], "object": [], "verb": []},
        {"boxes_h": [[2, 2, 9, 9]], "boxes_o": [[3, 3, 8, 8]], "hoi": [2], "object": [1], "verb": [0]},
    ],
    "filenames": ["a.png", "b.png", "c.png"],
    "size": [[64, 48], [10, 10], [32, 16]],
    "empty": [1],
    "verbs": ["hold", "ride"],
    "objects": ["bicycle", "person"],
    "correspondence": [[0, 0, 0], [1, 0, 1], [2, 1, 0]],
    "rare": [0],
}
VCOCO: dict[str, Any] = {
    "annotations": [
        {
            "file_name": "a.png",
            "boxes_h": [[0, 0, 63.5, 48]],
            "boxes_o": [[1, 1, 9.25, 9]],
            "actions": [1],
            "objects": [3],
        },
        {"file_name": "b.png", "boxes_h": [], "boxes_o": [], "actions": [], "objects": []},
    ],
    "classes": ["hit instr", "hit obj"],
    "objects": ["background", "person", "bat", "ball"],
    "images": [7, 9],
    "action_to_object": [[2, 3], [1, 3]],
}


def save(folder: Path, body: Any) -> Path:
    path = folder / "some.json"
    path.write_text(json.dumps(body))
    return path


def pictures(folder: Path, sizes: dict[str, tuple[int, int]]) -> Path:
    for name, size in sizes.items():
        Image.new("RGB", size).save(folder / name)
    return folder


def scenes_equal(a: Scene, b: Scene) -> bool:
    same = all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("boxes_h", "boxes_o", "interactions"))
    return same and (a.filename, a.size) == (b.filename, b.size)


def test_a_hico_file(tmp_path: Path) -> None:
    path = save(tmp_path, HICO)
    found = read_hicodet(path)
    assert (len(found), found.source, found.table.rare) == (3, str(path), {0})
    first = found.scenes[0]
    assert (first.filename, first.size, len(first)) == ("a.png", (64, 48), 2)
    assert first.boxes_h.dtype == torch.float32 and first.interactions.tolist() == [1, 2]
    assert first.boxes_o.tolist() == [[10, 2, 40, 40], [4, 5, 20.5, 30]]
    assert found.scenes[1].boxes_h.shape == (0, 4) and found.counts().tolist() == [0, 1, 2]
    assert [scene.filename for scene in found.with_pairs().scenes] == ["a.png", "c.png"]


def test_only_the_first_corner_is_shifted() -> None:
    """Trap 26: (1, 1, w, h) is the whole image."""
    assert read_hicodet(HICO).scenes[0].boxes_h[0].tolist() == [0, 0, 64, 48]


def test_what_is_written_reads_the_same(tmp_path: Path) -> None:
    first = read_hicodet(HICO)
    fine = torch.tensor([[1 / 3, 0.1, 63.5, 7.7]])
    first.scenes[0] = Scene("a.png", (64, 48), fine, fine + 0.001, torch.tensor([0]))
    path = write_hicodet(tmp_path / "new" / "x.json", first)
    again = read_hicodet(path, first.table)
    assert all(map(scenes_equal, first.scenes, again.scenes))
    assert again.table == first.table
    body = json.loads(path.read_text())
    assert body["empty"] == [1] and body["non_rare"] == [1, 2]
    assert body["annotation"][2] == HICO["annotation"][2], "1-based again"
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_building_decodes_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 18. Sizes that V-COCO's files lack come from the headers."""
    folder = pictures(tmp_path, {"a.png": (64, 48), "b.png": (10, 10), "c.png": (32, 16)})
    for name in ("load", "convert", "tobytes"):
        monkeypatch.setattr(f"PIL.PngImagePlugin.PngImageFile.{name}", lambda *_: pytest.fail("decoded"))
    assert [s.size for s in read_vcoco(VCOCO, images=folder).scenes] == [(64, 48), (10, 10)]
    monkeypatch.setattr("PIL.Image.open", lambda *_: pytest.fail("opened"))
    assert len(read_hicodet(HICO, images=folder)) == 3


def test_missing_images_are_counted_and_named(tmp_path: Path) -> None:
    folder = pictures(tmp_path, {"a.png": (64, 48)})
    with pytest.raises(
        ValueError, match=r"lacks 2 of 3 images of HICO-DET annotations; the first is 'b.png'"
    ):
        read_hicodet(HICO, images=folder)
    with pytest.raises(ValueError, match="lacks 1 of 2 images"):
        read_vcoco(VCOCO, images=folder)
    with pytest.raises(ValueError, match="is no folder; the images"):
        read_hicodet(HICO, images=folder / "no")
    (folder / "b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"b\.png is no image"):
        read_vcoco(VCOCO, images=folder)


def image(place: int, **changes: Any) -> Callable[[dict[str, Any]], None]:
    """A fault in one image of HICO."""
    return lambda body: body["annotation"][place].update(changes)


def whole(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body.update(changes)


BOX = [[2, 2, 9, 9]]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            image(2, boxes_h=[[2, 2, 33, 9]]),
            "boxes_h.0. is .1.0, 1.0, 33.0, 9.0.*leaves the image of 32 x 16",
        ),
        (image(2, boxes_o=[[2, 2, 9, 17]]), "boxes_o.0.*leaves the image"),
        (image(2, boxes_h=[[0, 2, 9, 9]]), "boxes_h.0. is .-1.0.*leaves the image"),
        (image(2, boxes_h=[[10, 2, 9, 9]]), "boxes_h.0.*has no area"),
        (image(2, boxes_o=[[3, 3, 2, 8]]), "boxes_o.0.*has no area"),
        (image(2, boxes_o=[[3, 3, float("nan"), 8]]), "boxes_o.0.*not a number"),
        (image(2, boxes_o=[[3, 3, float("inf"), 8]]), "boxes_o.0.*not a number"),
        (image(2, boxes_h=[[3, 3, 8]]), "'boxes_h' must be a list of boxes, four numbers"),
        (image(2, boxes_h=[[3, 3, 8, "8"]]), "'boxes_h' must be a list of boxes"),
        (image(2, boxes_h=[]), "'boxes_o' has 1 entries, but 'boxes_h' has 0"),
        (image(2, boxes_h="no"), "'boxes_h' must be a list, got str"),
        (image(2, hoi=[3]), "'hoi'.0. is 3; ids are 0 … 2"),
        (image(2, hoi=[True]), "'hoi'.0. is True"),
        (image(2, hoi=[1]), r"pair 0 has hoi 1 \(verb, object\) = \(1, 0\), but says \(0, 1\)"),
        (lambda body: body["annotation"][2].pop("verb"), "holds boxes_h, boxes_o, hoi, object, verb"),
        (lambda body: body["size"].__setitem__(2, [32]), "'size' must be .width, height."),
        (lambda body: body["size"].__setitem__(2, [0, 16]), "'size' must be .width, height."),
    ],
)
def test_faults_name_file_image_and_field(fault: Any, message: str, tmp_path: Path) -> None:
    body = copy.deepcopy(HICO)
    fault(body)
    with pytest.raises(ValueError, match=rf"some\.json, image 'c\.png': .*{message}"):
        read_hicodet(save(tmp_path, body))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda body: body.pop("size"), "has no 'size': another version"),
        (whole(filenames=["a.png", "b.png"]), "'filenames' has 2 entries, but 'annotation' has 3"),
        (whole(filenames=["a.png", "b.png", "a.png"]), "file name 'a.png' comes twice"),
        (whole(filenames=["a.png", "b.png", 3]), "file name 3 is no name"),
        (whole(empty=[0]), "'empty' holds 0"),
        (whole(empty=[3]), "'empty' holds 3"),
        (whole(annotation={}), "'annotation' must be a list"),
        (whole(objects=["bicycle", "horse"]), "no object is called 'person'"),
    ],
)
def test_faults_of_the_whole_file(fault: Any, message: str, tmp_path: Path) -> None:
    body = copy.deepcopy(HICO)
    fault(body)
    with pytest.raises(ValueError, match=rf"some\.json.*{message}"):
        read_hicodet(save(tmp_path, body))


def test_the_other_data_set_is_recognised() -> None:
    with pytest.raises(ValueError, match=r"no 'annotation': another version.*these are V-COCO annotations"):
        read_hicodet(VCOCO)
    with pytest.raises(
        ValueError, match=r"no 'annotations': another version.*these are HICO-DET annotations"
    ):
        read_vcoco(HICO)


def test_class_lists_that_disagree() -> None:
    other = read_hicodet(HICO | {"objects": ["person", "bicycle"]}, None, None, "drop").table
    with pytest.raises(
        ValueError, match=r"annotations disagrees: objects\[0\] is 'bicycle', expected 'person'"
    ):
        read_hicodet(HICO, other)
    with pytest.raises(ValueError, match="disagrees"):
        read_vcoco(VCOCO, other)


def test_bad_boxes_may_be_clipped_or_dropped() -> None:
    body = copy.deepcopy(HICO)
    body["annotation"][0]["boxes_h"] = [[-9, 6, 70, 30], [5, 6, 20, 30]]  # leaves the image on two sides
    body["annotation"][2]["boxes_o"] = [[40, 3, 50, 8]]  # lies outside: nothing is left of it
    clipped = read_hicodet(body, bad="clip")
    assert clipped.scenes[0].boxes_h.tolist() == [[0, 5, 64, 30], [4, 5, 20, 30]]
    assert len(clipped.scenes[2]) == 0
    dropped = read_hicodet(body, bad="drop")
    assert dropped.scenes[0].interactions.tolist() == [2] and len(dropped.scenes[2]) == 0
    with pytest.raises(ValueError, match="'raise', 'clip', 'drop', not 'keep'"):
        read_hicodet(body, bad="keep")  # type: ignore[arg-type]
    body["annotation"][0]["boxes_h"][0][0] = float("nan")
    with pytest.raises(ValueError, match="not a number"):
        read_hicodet(body, bad="drop")


def test_a_vcoco_file() -> None:
    found = read_vcoco(VCOCO)
    scene = found.scenes[0]
    assert found.table.words(int(scene.interactions)) == "hit obj ball", (
        "object 3 is the third after background"
    )
    assert scene.boxes_h.tolist() == [[0, 0, 63.5, 48]], "COCO counts from 0: nothing is shifted"
    assert scene.size == (0, 0) and len(found.scenes[1]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objects": [2]}, r"image 'a\.png': pair 0 is \(hit obj, bat\), which is no class here"),
        ({"objects": [0]}, r"pair 0 is \(hit obj, background\)"),
        ({"objects": [4]}, r"'objects'\[0\] is 4; ids are 0 … 3"),
        ({"actions": [2]}, r"'actions'\[0\] is 2; ids are 0 … 1"),
        ({"actions": []}, "'actions' has 0 entries, but 'boxes_h' has 1"),
        ({"boxes_o": [[1, 1, 1, 9]]}, r"boxes_o\[0\].*has no area"),
        ({"boxes_o": [[-1, 1, 1, 9]]}, r"boxes_o\[0\].*leaves the image"),
        ({"file_name": "b.png"}, r"file name 'b\.png' comes twice"),
    ],
)
def test_faults_in_a_vcoco_file(changes: dict[str, Any], message: str) -> None:
    body = copy.deepcopy(VCOCO)
    body["annotations"][0].update(changes)
    with pytest.raises(ValueError, match=f"V-COCO annotations.*{message}"):
        read_vcoco(body)


def test_sizes_from_the_images_are_checked_against(tmp_path: Path) -> None:
    folder = pictures(tmp_path, {"a.png": (63, 48), "b.png": (10, 10)})
    with pytest.raises(ValueError, match=r"boxes_h\[0\] is .*63\.5.*leaves the image of 63 x 48"):
        read_vcoco(VCOCO, images=folder)


def scene(name: str, ids: list[int]) -> Scene:
    boxes: Tensor = torch.arange(len(ids) * 4).reshape(-1, 4).float()
    return Scene(name, (99, 99), boxes, boxes + 1, torch.tensor(ids, dtype=torch.int64))


def test_zero_shot_training_sees_no_unseen_pair() -> None:
    toy = table()
    every = Annotations(
        toy, [scene("a", [0, 3, 5, 3]), scene("b", [3]), scene("c", []), scene("d", [1])], "s"
    )
    kept = every.without_unseen(split(toy, "mine", [3, 4]))
    assert [s.filename for s in kept.scenes] == ["a", "d"], "no image without a seen pair"
    first = kept.scenes[0]
    assert first.interactions.tolist() == [0, 5]
    assert first.boxes_h[:, 0].tolist() == [0, 8] and first.boxes_o[:, 0].tolist() == [1, 9]
    assert kept.counts()[[3, 4]].tolist() == [0, 0]
    assert len(every) == 4 and len(every.scenes[0]) == 4, "the original stays"
    with pytest.raises(ValueError, match="leaves none of 4 images"):
        every.without_unseen(split(toy, "most", [0, 1, 3, 5]))
    other = read_hicodet(HICO)
    with pytest.raises(ValueError, match="table of setting 'mine' disagrees"):
        other.without_unseen(split(toy, "mine", [3]))
