"""A DETR of transformers as a source of detections: a tiny one, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from rankfold.hoi.annotations import Annotations, Scene
from rankfold.hoi.classes import ClassTable
from rankfold.hoi.detection_file import DetectionFile
from rankfold.hoi.detections import COCO, Selection
from rankfold.hoi.detector import Detector, extract

TABLE = ClassTable(("use",), ("bicycle", "dog", "person"), ((0, 0), (0, 1)))
EVERY = Selection(score=0, least=9, most=9, nms=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DETR with COCO's 92 columns, nine queries and states of width 32, and its processor."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig
    from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil

    torch.manual_seed(0)
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 16],
        depths=[1] * 4,
        layer_type="basic",
        out_features=["stage4"],
    )
    config = DetrConfig(
        backbone_config=backbone,
        d_model=32,
        num_queries=9,
        num_labels=91,
        **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
        **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")},
    )
    place = tmp_path_factory.mktemp("detr")
    DetrForObjectDetection(config).save_pretrained(place)
    DetrImageProcessorPil(size={"shortest_edge": 48, "longest_edge": 96}).save_pretrained(place)
    return place


def picture(seed: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    noise = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.to(torch.uint8).numpy())


def test_a_detector_opens_and_finds(folder: Path) -> None:
    detector = Detector.open(str(folder), TABLE, selection=EVERY)
    assert detector.columns.tolist() == [2, 18, 1, 91], "COCO's ids, by name"
    assert (detector.width, detector.known, detector.model.training) == (32, (0, 1, 2), False)
    [found] = detector([picture(0)])
    found.check(TABLE, "here")
    assert len(found) == 9 and found.queries.shape == (9, 32) and not found.queries.requires_grad
    again = detector.of("a.png", picture(0))
    assert torch.equal(found.boxes, again.boxes) and torch.equal(found.queries, again.queries)


def test_an_object_that_it_lacks_is_not_known(folder: Path) -> None:
    odd = ClassTable(("use",), ("unicorn", "person"), ((0, 0),))
    detector = Detector.open(str(folder), odd)
    assert detector.known == (1,) and "unicorn" not in COCO


def test_a_whole_set_is_extracted_once(folder: Path, tmp_path: Path) -> None:
    detector = Detector.open(str(folder), TABLE, selection=EVERY)
    sizes = {"a.png": (80, 60), "b.png": (60, 60), "c.png": (50, 90)}
    for seed, (name, size) in enumerate(sizes.items()):
        picture(seed, size).save(tmp_path / name)
    none = torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    annotations = Annotations(TABLE, [Scene(name, size, *none) for name, size in sizes.items()], "x.json")
    seen: list[Any] = []
    path = extract(
        detector, annotations, tmp_path, tmp_path / "d.safetensors", progress=lambda *a: seen.append(a)
    )
    assert seen == [("detect", done, 3) for done in (1, 2, 3)]
    file = DetectionFile(path, TABLE)
    file.check_images(annotations)
    assert (file.detector, file.selection, file.known) == (str(folder), EVERY, (0, 1, 2))
    for name in sizes:
        with Image.open(tmp_path / name) as image:
            assert torch.equal(file[name].boxes, detector.of(name, image.convert("RGB")).boxes)
    batched = DetectionFile(
        extract(detector, annotations, tmp_path, tmp_path / "e.safetensors", batch=3), TABLE
    )
    for name in sizes:  # padded to one size; the mask keeps the padding out
        torch.testing.assert_close(batched[name].boxes, file[name].boxes, atol=0.2, rtol=0)


def test_what_cannot_be_extracted(folder: Path, tmp_path: Path) -> None:
    detector = Detector.open(str(folder), TABLE)
    none = torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    annotations = Annotations(TABLE, [Scene("a.png", (80, 60), *none)], "x.json")
    with pytest.raises(ValueError, match=r"lacks 1 of 1 images of x\.json"):
        extract(detector, annotations, tmp_path, tmp_path / "d.safetensors")
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an image"):
        extract(detector, annotations, tmp_path, tmp_path / "d.safetensors")
    assert not (tmp_path / "d.safetensors").exists()


def test_no_detector(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no detector '.*': it is no folder with a DETR"):
        Detector.open(str(tmp_path), TABLE)
