"""Images, detections and ground truth as batches; an image is decoded when its batch is asked for.

The image encoder sees every image as S x S pixels, distorted if need be, and all boxes of a batch are in
those pixels (no IoU changes by that). Which images are in batch i depends on the seed and i alone, so that a
run that goes on sees what it would have seen.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from rankfold.hoi.annotations import Annotations, Scene
from rankfold.hoi.boxes import scale

if TYPE_CHECKING:
    from rankfold.hoi.detections import Detections

Batch = dict[str, Tensor]


class Source(Protocol):
    """Where detections come from: a file made before, or a detector that looks at the image now."""

    def of(self, filename: str, image: Image.Image) -> Detections:
        """The detections in `image`, in its pixels. Raises ValueError that names the file where there are
        none to be had."""
        ...


@dataclass(frozen=True)
class Pixels:
    """How an image is shown to the encoder: `size` pixels a side, then (value - mean) / std by colour."""

    size: int
    mean: Sequence[float] = tuple(OPENAI_CLIP_MEAN)
    std: Sequence[float] = tuple(OPENAI_CLIP_STD)

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, S, S) float32."""
        shown = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        values = torch.from_numpy(numpy.array(shown, dtype=numpy.float32)).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(list(item)).view(3, 1, 1) for item in (self.mean, self.std))
        return (values - mean) / std


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """An image in RGB, decoded whole. Raises ValueError that names the file where there is none in it."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(f"no image {path}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


class HoiDataset(Dataset[Batch]):
    """The images of `annotations`, one an item; the list is made without opening any (trap 18).

    images  their folder; `source`: of their detections; `pixels`: how the encoder sees them
    """

    def __init__(
        self, annotations: Annotations, images: str | os.PathLike[str], source: Source, pixels: Pixels
    ) -> None:
        self.annotations, self.images = annotations, annotations.check_images(images)
        self.source, self.pixels = source, pixels

    def __len__(self) -> int:
        return len(self.annotations.scenes)

    def __getitem__(self, index: int) -> Batch:
        """See `item_of`. Raises ValueError for an image whose size is not the one that is annotated."""
        scene = self.annotations.scenes[index]
        path = self.images / scene.filename
        image = open_image(path)
        if scene.size != (0, 0) and image.size != tuple(scene.size):
            raise ValueError(
                f"{path} has {image.width} x {image.height} pixels, {self.annotations.source} says "
                f"{scene.size[0]} x {scene.size[1]}: these annotations are of another version of it"
            )
        found = self.source.of(scene.filename, image)
        return item_of(image, found, self.pixels, scene) | {"index": torch.tensor(index)}


def item_of(image: Image.Image, found: Detections, pixels: Pixels, scene: Scene | None = None) -> Batch:
    """What the model is given of one image, and the ground truth where there is one: boxes in S x S pixels.

    pixel_values (3, S, S); size (2,) the image's width and height
    boxes (n, 4), scores (n,), queries (n, q) float32; labels (n,) int64 OBJECT ids
    gt_boxes_h, gt_boxes_o (g, 4); gt_interactions (g,) int64 INTERACTION ids
    """
    after = (pixels.size, pixels.size)

    def resized(boxes: Tensor) -> Tensor:
        return scale(boxes.float(), image.size, after)

    item = {
        "pixel_values": pixels(image),
        "size": torch.tensor(image.size),
        "boxes": resized(found.boxes),
        "scores": found.scores.float(),
        "labels": found.labels,
        "queries": found.queries.float(),
    }
    if scene is not None:
        item |= {
            "gt_boxes_h": resized(scene.boxes_h),
            "gt_boxes_o": resized(scene.boxes_o),
            "gt_interactions": scene.interactions,
        }
    return item


def collate(items: Sequence[Batch]) -> Batch:
    """Items one above the other, lists filled up to the longest: ids with -1, all else with 0. `counts` (B,)
    says how many detections are real."""
    batch = {}
    for key in items[0]:
        rows = [item[key] for item in items]
        if key in ("pixel_values", "size", "index"):
            batch[key] = torch.stack(rows)
            continue
        fill = 0 if rows[0].is_floating_point() else -1
        batch[key] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
    batch["counts"] = torch.tensor([len(item["scores"]) for item in items])
    return batch


class Batches(Dataset[Batch]):
    """The batches that a run trains on, in its order: every image once an epoch, the last batch of an epoch
    smaller if need be."""

    def __init__(self, data: HoiDataset, batch_size: int, epochs: int, seed: int) -> None:
        self.data, self.batch_size, self.epochs, self.seed = data, batch_size, epochs, seed
        self.per_epoch = -(-len(data) // batch_size)

    def __len__(self) -> int:
        return self.epochs * self.per_epoch

    def __getitem__(self, index: int) -> Batch:
        return collate([self.data[row] for row in self.rows(index)])

    def rows(self, index: int) -> list[int]:
        """Which images are in batch `index`."""
        epoch, place = divmod(index, self.per_epoch)
        draw = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        order = torch.randperm(len(self.data), generator=draw)
        return order[place * self.batch_size : (place + 1) * self.batch_size].tolist()
