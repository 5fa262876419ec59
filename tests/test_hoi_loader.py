"""Images, detections and ground truth as batches: what is decoded when, in which pixels, in which order."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from toy_hoi import QUERY, table

from rankfold.hoi.annotations import Annotations, Scene
from rankfold.hoi.boxes import iou
from rankfold.hoi.loader import Batches, HoiDataset, Pixels, collate, item_of, open_image

SIZE = (40, 20)  # width, height


def scene(name: str, pairs: int = 1, size: tuple[int, int] = SIZE) -> Scene:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 20.0]]).repeat(pairs, 1)
    return Scene(name, size, boxes, boxes + torch.tensor([10.0, 0, 20.0, 0]), torch.arange(pairs))


class Source:
    """Detections by the image's number: none in the first, one in the second, …"""

    def of(self, filename: str, image: Image.Image) -> Any:
        n = int(Path(filename).stem)
        assert image.size == SIZE
        return SimpleNamespace(
            boxes=torch.tensor([[0.0, 0.0, 20.0, 10.0]]).repeat(n, 1),
            scores=torch.linspace(1, 0.5, n),
            labels=torch.arange(n),
            queries=torch.ones(n, QUERY),
        )


def data(folder: Path, count: int = 5, **sizes: Any) -> HoiDataset:
    scenes = [scene(f"{at}.png", at % 3 + 1) for at in range(count)]
    for at, item in enumerate(scenes):
        Image.new("RGB", SIZE, (10 * at, 0, 255)).save(folder / item.filename)
    return HoiDataset(Annotations(table(), scenes, "toy.json"), folder, Source(), Pixels(8))


def test_building_decodes_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 18."""
    made = data(tmp_path)
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("an image was opened"))
    again = HoiDataset(made.annotations, tmp_path, Source(), Pixels(8))
    assert len(Batches(again, 2, 3, seed=0)) == 9 and Batches(again, 2, 3, seed=0).rows(8)


def test_an_item_is_in_the_pixels_of_the_encoder(tmp_path: Path) -> None:
    item = data(tmp_path)[2]
    assert item["pixel_values"].shape == (3, 8, 8)
    colour = item["pixel_values"][:, 4, 4] * torch.tensor(Pixels(8).std) + torch.tensor(Pixels(8).mean)
    torch.testing.assert_close(colour, torch.tensor([20 / 255, 0.0, 1.0]), atol=1e-6, rtol=0)
    assert item["boxes"].tolist() == [[0, 0, 4, 4], [0, 0, 4, 4]]  # 40 x 20 to 8 x 8
    assert item["gt_boxes_h"][0].tolist() == [0, 0, 2, 8] and item["gt_boxes_o"][0].tolist() == [2, 0, 6, 8]
    assert item["labels"].tolist() == [0, 1] and item["gt_interactions"].tolist() == [0, 1, 2]
    assert int(item["index"]) == 2


def test_a_resize_that_distorts_changes_no_overlap() -> None:
    """Trap 23."""
    draw = torch.Generator().manual_seed(0)
    corner = torch.rand(2, 20, 2, generator=draw) * 50
    boxes = torch.cat([corner, corner + 1 + torch.rand(2, 20, 2, generator=draw) * 50], -1)
    image = Image.new("RGB", (640, 91))
    found = SimpleNamespace(boxes=boxes[0], scores=torch.ones(20), labels=torch.zeros(20), queries=boxes[0])
    other = SimpleNamespace(**{**vars(found), "boxes": boxes[1]})
    here, there = (item_of(image, each, Pixels(224))["boxes"] for each in (found, other))  # type: ignore[arg-type]
    torch.testing.assert_close(iou(here, there), iou(*boxes), atol=1e-6, rtol=0)


def test_collate_pads_ids_with_minus_one_and_says_how_many_are_real(tmp_path: Path) -> None:
    made = data(tmp_path)
    batch = collate([made[0], made[3], made[1]])
    assert batch["counts"].tolist() == [0, 3, 1] and batch["index"].tolist() == [0, 3, 1]
    assert batch["boxes"].shape == (3, 3, 4) and batch["queries"].shape == (3, 3, QUERY)
    assert batch["labels"].tolist() == [[-1, -1, -1], [0, 1, 2], [0, -1, -1]]
    assert batch["labels"].dtype == torch.int64 and not batch["scores"][0].any()
    assert batch["gt_interactions"].tolist() == [[0, -1], [0, -1], [0, 1]]
    nothing = collate([made[0]])
    assert nothing["boxes"].shape == (1, 0, 4) and nothing["counts"].tolist() == [0]


def test_batches_depend_on_the_seed_and_the_place_alone(tmp_path: Path) -> None:
    made = data(tmp_path)
    one, two = (Batches(made, 2, 3, seed=4) for _ in range(2))
    order = [one.rows(i) for i in range(len(one))]
    assert [two.rows(i) for i in reversed(range(len(two)))] == order[::-1]
    for epoch in (order[:3], order[3:6], order[6:]):
        assert sorted(row for rows in epoch for row in rows) == list(range(5))
    assert order[:3] != order[3:6] and [Batches(made, 2, 3, seed=5).rows(i) for i in range(9)] != order
    assert one[0]["index"].tolist() == order[0]


def test_missing_images_are_named_before_any_is_read(tmp_path: Path) -> None:
    made = data(tmp_path)
    (tmp_path / "1.png").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of 5 images of toy.json.*'1\.png'"):
        HoiDataset(made.annotations, tmp_path, Source(), Pixels(8))
    with pytest.raises(ValueError, match="no folder"):
        HoiDataset(made.annotations, tmp_path / "none", Source(), Pixels(8))


def test_an_image_that_is_none_or_of_another_version_is_named(tmp_path: Path) -> None:
    made = data(tmp_path)
    (tmp_path / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"0\.png cannot be read as an image"):
        _ = made[0]
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"1\.png cannot be read as an image"):
        _ = made[1]
    Image.new("RGB", (41, 20)).save(tmp_path / "2.png")
    with pytest.raises(ValueError, match=r"2\.png has 41 x 20 pixels, toy\.json says 40 x 20"):
        _ = made[2]
    with pytest.raises(ValueError, match="no image"):
        open_image(tmp_path / "none.png")


def test_images_of_every_mode_become_rgb(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P", "1", "CMYK", "I;16"):
        path = tmp_path / (f"{mode.replace(';', '')}." + ("jpg" if mode == "CMYK" else "png"))
        Image.new(mode, SIZE).save(path)
        assert open_image(path).mode == "RGB"


def test_a_size_that_the_annotations_do_not_say_is_not_checked(tmp_path: Path) -> None:
    Image.new("RGB", SIZE).save(tmp_path / "1.png")
    made = HoiDataset(Annotations(table(), [scene("1.png", size=(0, 0))], "x"), tmp_path, Source(), Pixels(8))
    assert made[0]["gt_boxes_h"].tolist() == [[0, 0, 2, 8]]
