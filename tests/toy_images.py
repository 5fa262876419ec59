"""The smallest image classifiers: forty pictures of 12 x 10 pixels, red or green, and what reads them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from rankfold.adapt.pictures import read_images

IMAGES: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 5e-3, "device": "cpu"}
CLASSES = ("green", "red")


def picture(kind: int, number: int, width: int = 12, height: int = 10) -> Image.Image:
    """A picture of a class: one channel is brighter; no two are alike."""
    draw = np.random.default_rng([kind, number])
    pixels = draw.integers(0, 120, (height, width, 3))
    pixels[..., 1 - kind] += 90
    return Image.fromarray(pixels.astype(np.uint8))


def photos(folder: Path, count: int = 20, start: int = 0, suffix: str = "png") -> str:
    """The path of a folder of two class folders of `count` pictures each."""
    for kind, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(start, start + count):
            picture(kind, number).save(folder / name / f"{number:03}.{suffix}")
    return str(folder)


def backbone(folder: Path, *, head: tuple[str, ...] = (), processor: bool = True, **sizes: Any) -> str:
    """The path of a 2-layer model of 16 x 16 images: bare, or with a head for the classes `head`."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, ViTModel

    options: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
        "initializer_range": 0.1,
    }
    if head:
        options |= {"id2label": dict(enumerate(head)), "label2id": {name: at for at, name in enumerate(head)}}
    torch.manual_seed(0)
    cls = ViTForImageClassification if head else ViTModel
    cls(ViTConfig(**(options | sizes))).save_pretrained(folder)
    if processor:
        ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def read(spec: Path | str, **more: Any) -> Any:
    return read_images(str(spec), lambda *_: None, **more)


def blob(image: Image.Image, kind: str = "PNG", **more: Any) -> bytes:
    held = io.BytesIO()
    image.save(held, kind, **more)
    return held.getvalue()
