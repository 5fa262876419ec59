"""What a trained model says: of a whole part of a data set, or of any image.

    detections of an image -> pairs -> score of every (pair, interaction) -> boxes in pixels of the image

An image without a person, or with one detection, has no pair: nothing is predicted in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader

from rankfold.hoi.boxes import scale
from rankfold.hoi.evaluation import Predicted
from rankfold.hoi.loader import Batch, HoiDataset, Pixels, Source, collate, item_of, open_image
from rankfold.hoi.model import HolaModel
from rankfold.metrics import Progress

INPUTS = ("pixel_values", "boxes", "scores", "labels", "queries", "counts")


def open_model(folder: str | os.PathLike[str], device: str = "cpu") -> HolaModel:
    """The model in a folder that `rankfold hoi train` wrote, in eval mode. Raises ValueError where there is
    none."""
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"no model in {folder}: it has no config.json")
    try:
        model = HolaModel.from_pretrained(folder)
    except (OSError, KeyError) as error:
        raise ValueError(f"{folder} cannot be read: {str(error).splitlines()[0]}") from error
    return model.to(device).eval()


def pixels_of(model: HolaModel) -> Pixels:
    """How the model's encoder sees an image."""
    return Pixels(model.vision.side)


@torch.no_grad()
def predictions(
    model: HolaModel,
    data: HoiDataset,
    *,
    batch_size: int = 16,
    workers: int = 0,
    top: int | None = None,
    tell: Progress | None = None,
    stage: str = "predict",
) -> Iterator[Predicted]:
    """What the model predicts in each image of `data`, in order; the model is in eval mode meanwhile.

    top  triplets kept of an image, the best-scored ones; None: all
    """
    was, done = model.training, 0
    model.eval()
    try:
        if tell is not None:
            tell(stage, 0, len(data))
        loaded = DataLoader(data, batch_size, collate_fn=collate, num_workers=workers)  # type: ignore[arg-type]
        for batch in loaded:
            rows = of_batch(model, batch, top)
            for index, found in zip(batch["index"].tolist(), rows, strict=True):
                yield Predicted(data.annotations.scenes[index].filename, *found)
            done += len(rows)
            if tell is not None:
                tell(stage, done, len(data))
    finally:
        model.train(was)


def of_batch(model: HolaModel, batch: Batch, top: int | None = None) -> list[tuple[Tensor, ...]]:
    """(boxes_h, boxes_o, interactions, scores) of each image of a batch, on the CPU, boxes in pixels of the
    image and the best score first."""
    held = {name: batch[name].to(model.device) for name in INPUTS}
    output = model(**held)
    found, side = [], (model.vision.side, model.vision.side)
    for at, triplets in enumerate(model.triplets(output, held["labels"])):
        width, height = batch["size"][at].tolist()
        boxes = scale(batch["boxes"][at], side, (width, height))
        pairs = triplets.pairs[:top].cpu()
        found.append(
            (
                boxes[pairs[:, 0]],
                boxes[pairs[:, 1]],
                triplets.interactions[:top].cpu(),
                triplets.scores[:top].float().cpu(),
            )
        )
    return found


@torch.no_grad()
def predict(
    model: HolaModel,
    images: Sequence[str | os.PathLike[str]],
    source: Source,
    *,
    top: int | None = None,
    tell: Progress | None = None,
) -> list[Predicted]:
    """What the model predicts in image files, one after the other, each turned as its camera says.

    source  of their detections (see `rankfold.hoi.loader.Source`), asked by the file's own name

    Raises ValueError, naming the file, for one that is no image or has no detections to be had, and for
    detections of another width than the model reads.
    """
    pixels, found = pixels_of(model), []
    for path in images:
        image = upright(path)
        given = source.of(Path(path).name, image)
        check_width(model, given, str(path))
        batch = collate([item_of(image, given, pixels)])
        [row] = of_batch(model.eval(), batch, top)
        found.append(Predicted(Path(path).name, *row))
        if tell is not None:
            tell("predict", len(found), len(images))
    return found


def upright(path: str | os.PathLike[str]) -> Image.Image:
    """`open_image`, turned as the camera that took it says."""
    try:
        with Image.open(path) as image:
            turned = ImageOps.exif_transpose(image)
            return turned.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return open_image(path)  # which names the file and the fault


def check_width(model: HolaModel, found: Any, where: str) -> None:
    """Raise ValueError, with both numbers, for detections whose query vectors the model does not read."""
    width = found.queries.shape[-1]
    if width != model.config.query_width:
        raise ValueError(
            f"{where}: detections have queries of {width} numbers, the model reads "
            f"{model.config.query_width}: use the detector that it was trained with"
        )
