"""Detections of a data set in one file: written, read by name, and refused where it is damaged."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy_hoi import OBJECTS, table

from rankfold.hoi.annotations import Annotations, Scene
from rankfold.hoi.classes import ClassTable
from rankfold.hoi.detection_file import DetectionFile, write_detections
from rankfold.hoi.detections import Detections, Selection, none_found, oracle

SIZE = (200, 100)


def scene(name: str = "a.png") -> Scene:
    """Four boxes in three pairs: ride bicycle, hug person, hold cup."""
    humans = torch.tensor([[10.0, 10, 40, 90], [10, 10, 40, 90], [100, 10, 130, 90]])
    others = torch.tensor([[50.0, 50, 70, 70], [100, 10, 130, 90], [150, 20, 190, 60]])
    return Scene(name, SIZE, humans, others, torch.tensor([0, 3, 7]))


def written(folder: Path, **changes: Any) -> Path:
    found = [(name, SIZE, oracle(scene(name), table(), 0.02, width=8)) for name in ("a.png", "b.png")]
    found.insert(1, ("none.png", (7, 5), none_found(8)))
    return write_detections(folder / "d.safetensors", found, table(), "oracle", changes.get("selection"))


def test_what_is_written_is_read_by_name(tmp_path: Path) -> None:
    path = written(tmp_path, selection=Selection(most=9))
    file = DetectionFile(path, table())
    assert (len(file), file.filenames, file.width) == (3, ["a.png", "none.png", "b.png"], 8)
    assert (file.detector, file.selection, file.known) == ("oracle", Selection(most=9), (0, 1, 2, 3))
    assert file.sizes == [SIZE, (7, 5), SIZE] and "b.png" in file and "c.png" not in file
    for name in ("b.png", "a.png"):
        expected = oracle(scene(name), table(), 0.02, width=8)
        for key in ("boxes", "scores", "labels", "queries"):
            assert torch.equal(getattr(file[name], key), getattr(expected, key))
            assert torch.equal(getattr(file.of(name, None), key), getattr(expected, key))
    assert len(file["none.png"]) == 0
    with pytest.raises(ValueError, match=r"d\.safetensors has no image 'c\.png'"):
        file["c.png"]
    assert DetectionFile(written(tmp_path), table()).selection is None


def test_an_open_file_may_go_to_other_processes(tmp_path: Path) -> None:
    file = DetectionFile(written(tmp_path), table())
    other = copy.deepcopy(file)  # what a spawned loader process gets goes the same way
    assert torch.equal(other["b.png"].boxes, file["b.png"].boxes)


def test_files_are_checked_against_annotations_and_model(tmp_path: Path) -> None:
    file = DetectionFile(written(tmp_path), table())
    file.check_images(Annotations(table(), [scene("a.png"), scene("b.png")], "train.json"))
    with pytest.raises(ValueError, match=r"lacks 1 of 2 images of train\.json; the first is 'c\.png'"):
        file.check_images(Annotations(table(), [scene("a.png"), scene("c.png")], "train.json"))
    small = Scene("none.png", (70, 50), *(torch.zeros(0, 4),) * 2, torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"'none\.png' is 7 x 5 pixels there, but 70 x 50 in train\.json"):
        file.check_images(Annotations(table(), [small], "train.json"))
    file.check_width(8)
    with pytest.raises(ValueError, match=r"image 'a\.png' has queries of 8 numbers, the model expects 256"):
        file.check_width(256)


def test_other_classes_are_refused(tmp_path: Path) -> None:
    path, toy = written(tmp_path), table()
    swapped = ClassTable(toy.verbs, (*OBJECTS[:3], "bowl"), toy.interactions)
    with pytest.raises(ValueError, match=r"other classes: objects\[3\] is 'cup', expected 'bowl'"):
        DetectionFile(path, swapped)
    with pytest.raises(ValueError, match="other classes: the interactions differ"):
        DetectionFile(path, ClassTable(toy.verbs, toy.objects, toy.interactions[::-1]))
    DetectionFile(path, ClassTable(toy.verbs, toy.objects, toy.interactions))  # rare and name do not count


def damaged(path: Path, header: dict[str, Any] | None = None, **tensors: Tensor | None) -> Path:
    """The file with other tensors (None: left out), or with other fields in its header."""
    with safe_open(path, framework="pt") as handle:
        body = json.loads(handle.metadata()["rankfold_detections"]) | (header or {})
    held = {key: tensor for key, tensor in (load_file(path) | tensors).items() if tensor is not None}
    save_file(held, path, metadata={"rankfold_detections": json.dumps(body)})
    return path


@pytest.mark.parametrize(
    ("header", "tensors", "message"),
    [
        ({"format": 2}, {}, r"format 1 \(found 2\): extract them again"),
        ({"filenames": ["a.png"]}, {}, "4 starts for 1 images and 8 detections"),
        ({"sizes": [3, 4, 5]}, {}, "damaged header"),
        ({"selection": {"colour": 3}}, {}, "damaged header"),
        ({}, {"scores": torch.ones(7)}, r"scores have shape \(7,\), but there are 8 detections"),
        ({}, {"queries": torch.ones(8)}, r"queries have shape \(8,\)"),
        ({}, {"queries": None}, r"queries have shape None"),
        ({}, {"starts": torch.tensor([0, 4, 3, 8])}, "damaged: 4 starts"),
        ({}, {"starts": None}, "damaged: 0 starts"),
    ],
)
def test_damaged_files_are_refused(
    header: dict[str, Any], tensors: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"d\.safetensors.*{message}"):
        DetectionFile(damaged(written(tmp_path), header, **tensors), table())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("boxes", float("nan"), "boxes hold something that is no number"),
        ("boxes", 1e9, "has no area"),
        ("scores", 1.5, "scores go from"),
        ("labels", 4, r"object ids . … 4, but there are 4 objects"),
        ("labels", 1, "humans must come before"),
        ("queries", float("inf"), "queries hold"),
    ],
)
def test_damaged_content_names_the_image(key: str, value: float, message: str, tmp_path: Path) -> None:
    path = written(tmp_path)
    tensor = load_file(path)[key]
    tensor.view(8, -1)[-1, 0] = value
    file = DetectionFile(damaged(path, **{key: tensor}), table())
    file["a.png"]  # only what is damaged is lost
    with pytest.raises(ValueError, match=rf"d\.safetensors, image 'b\.png': .*{message}"):
        file["b.png"]


def test_cut_files_and_files_that_are_none(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"d\.safetensors is damaged"):
        DetectionFile(path, table())
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"\(found None\)"):
        DetectionFile(path, table())
    with pytest.raises(ValueError, match="is no file; detections were expected"):
        DetectionFile(tmp_path / "absent", table())


def test_what_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    path, one = tmp_path / "d.safetensors", oracle(scene(), table(), width=8)
    wide = oracle(scene("b"), table(), width=9)
    outside = Detections(one.boxes, one.scores, one.labels + 9, one.queries)
    for found, message in (
        ([], "no image to write"),
        ([("a", SIZE, one), ("a", SIZE, one)], "'a' comes twice"),
        ([("a", SIZE, one), ("b", SIZE, wide)], "'b' has queries of width 9, the first 8"),
        ([("a", SIZE, outside)], "image 'a': object ids"),
    ):
        with pytest.raises(ValueError, match=message):
            write_detections(path, found, table(), "x", None)
    assert not list(tmp_path.iterdir())
