"""`rankfold hoi train` on damaged data: one line that names what is wrong, before anything is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from drawn_hoi import drawn
from test_hoi_cli import IMAGES, UNSEEN, call, message
from toy_hoi import table, texts

from rankfold.hoi.detection_file import DetectionFile, write_detections
from rankfold.hoi.folder import TEXT
from rankfold.hoi.text_file import save_features


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn(tmp_path_factory.mktemp("home") / "data", images=5, test_images=2)


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    """The data set, to be damaged."""
    return Path(shutil.copytree(data, tmp_path / "data"))


Damage = Callable[[Path], Any]


def annotate(change: Callable[[dict[str, Any]], Any], part: str = "train") -> Damage:
    def damage(folder: Path) -> None:
        path = folder / f"instances_{part}2015.json"
        body = json.loads(path.read_text())
        change(body)
        path.write_text(json.dumps(body))

    return damage


def box(values: list[float]) -> Damage:
    return annotate(lambda body: body["annotation"][0]["boxes_h"].__setitem__(0, values))


def other_width(folder: Path) -> None:
    held = DetectionFile(folder / "detections_test.safetensors", table())
    rows = [(name, size, held[name]) for name, size in zip(held.filenames, held.sizes, strict=True)]
    few = [(n, s, type(d)(d.boxes, d.scores, d.labels, d.queries[:, :128])) for n, s, d in rows]
    write_detections(folder / "detections_test.safetensors", few, table(), "annotations", None)


def cut(name: str) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:-40])

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (box([6.0, 5.0, 5.0, 20.0]), "has no area"),
        (box([5.0, 5.0, 900.0, 20.0]), "leaves the image of 64 x 48"),
        (box([5.0, 5.0, float("nan"), 20.0]), "not a number"),
        (annotate(lambda body: body.pop("correspondence")), "no 'correspondence'"),
        (annotate(lambda body: body["annotation"][0]["hoi"].append(1)), "entries, but"),
        (annotate(lambda body: body["verbs"].__setitem__(0, "fly"), "test"), "verbs[0] is 'fly'"),
        (annotate(lambda body: body["size"].__setitem__(0, [32, 32])), "32 x 32"),
        (lambda folder: next((folder / IMAGES / "train2015").iterdir()).unlink(), "lacks 1 of 5 images"),
        (lambda folder: (folder / "instances_train2015.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "instances_train2015.json").unlink(), "has no instances_train2015.json"),
        (lambda folder: (folder / "detections_train.safetensors").unlink(), "`rankfold hoi detect DATA"),
        (cut("detections_train.safetensors"), "detections_train.safetensors is damaged"),
        (other_width, "queries of 128 numbers, the model expects 256"),
        (cut(TEXT), f"{TEXT} is damaged"),
        (lambda folder: save_features(texts(width=8), folder / TEXT), "rank=6"),
        (lambda folder: (folder / "unseen.json").write_text(json.dumps(list(range(10)))), "hides all 10"),
        (lambda folder: (folder / "unseen.json").write_text("[99]"), "99 is no interaction"),
        (lambda folder: (folder / "unseen.json").write_text('"none"'), "whole numbers"),
        (lambda folder: (folder / "settings.json").write_text('{"epoch": 3}'), "did you mean 'epochs'"),
        (lambda folder: (folder / "settings.json").write_text('{"epochs": "3"}'), "'epochs' is '3'"),
    ],
)
def test_damaged_data_is_refused_before_anything_is_trained(damage: Damage, said: str, copy: Path) -> None:
    damage(copy)
    wide = "--set rank=9" if said == "rank=6" else ""
    shown = "rank=9" if wide else said
    found = call(f"train {copy} {copy.parent}/out {UNSEEN.format(data=copy)} --device cpu {wide}")
    assert shown in message(found)
    assert not (copy.parent / "out").exists()
    assert not list((copy.parent).glob("out.run/checkpoint-*"))


def test_bad_boxes_can_be_cut_or_left_out(copy: Path) -> None:
    box([5.0, 5.0, 900.0, 20.0])(copy)
    for way in ("clip", "drop"):
        words = f"train {copy} {copy.parent}/{way} --epochs 1 --no-evaluate --device cpu --bad {way}"
        assert call(words).exit_code == 0
    assert "'raise', 'clip', 'drop'" in message(call(f"train {copy} {copy.parent}/out --bad keep"))
