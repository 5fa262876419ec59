"""Drawn scenes: a human is a head on a body, an object is a shape and a colour of its own on a striped
ground.

Every drawing fills its box to the border, so that boxes are what can be seen. Larger things are drawn first.
"""

from __future__ import annotations

import colorsys
import hashlib
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rankfold.hoi.annotations import Scene
from rankfold.hoi.boxes import area
from rankfold.hoi.classes import ClassTable

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

_SKIN, _CLOTHES = (235, 190, 150), (40, 60, 160)
_CORNERS = (0, 4, 3, 5, 6)  # of an object's shape: an ellipse, a rectangle, a triangle, …
_GOLDEN = 0.61803398875


def colour(thing: int) -> tuple[int, int, int]:
    """The colour of an object id: hues far apart for ids that are near, three brightnesses."""
    red, green, blue = colorsys.hsv_to_rgb(thing * _GOLDEN % 1, 0.85, (0.95, 0.7, 0.45)[thing % 3])
    return round(255 * red), round(255 * green), round(255 * blue)


def paint(scene: Scene, table: ClassTable, extra: tuple[Tensor, Tensor]) -> Image.Image:
    """An RGB picture of `scene` and of things without a pair: boxes (k, 4) and object ids (k,). The ground
    depends on the file name alone."""
    from PIL import Image, ImageDraw

    shade = 200 + hashlib.sha256(scene.filename.encode()).digest()[0] % 50
    image = Image.new("RGB", scene.size, (shade, shade, shade))
    pen = ImageDraw.Draw(image)
    for down in range(0, scene.size[1], 8):
        pen.line([0, down, scene.size[0], down], fill=(shade - 12,) * 3)
    things = table.object_of[scene.interactions]
    boxes = torch.cat([scene.boxes_h, scene.boxes_o, extra[0]])
    labels = torch.cat([torch.full_like(things, table.human), things, extra[1]])
    both = torch.cat([boxes, labels[:, None].float()], 1).unique(dim=0)
    for row in area(both[:, :4]).argsort(descending=True, stable=True).tolist():
        *box, label = both[row].tolist()
        corners = (round(box[0]), round(box[1]), round(box[2]) - 1, round(box[3]) - 1)  # PIL's are inclusive
        (_human if int(label) == table.human else _thing)(pen, corners, int(label))
    return image


def _human(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], thing: int) -> None:
    left, top, right, bottom = box
    neck = top + (bottom - top) // 3
    pen.rectangle([left, neck, right, bottom], fill=_CLOTHES)
    middle, half = (left + right) // 2, max(1, min((right - left) // 2, (neck - top) // 2))
    pen.ellipse([middle - half, top, middle + half, neck], fill=_SKIN)


def _thing(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], thing: int) -> None:
    left, top, right, bottom = box
    fill = colour(thing)
    corners = _CORNERS[thing % len(_CORNERS)]
    if not corners:
        pen.ellipse(box, fill=fill)
    elif corners == 4:
        pen.rectangle(box, fill=fill)
    else:  # a regular polygon, stretched to the box
        turns = [2 * math.pi * (corner / corners - 0.25) for corner in range(corners)]
        across, down = [math.cos(turn) for turn in turns], [math.sin(turn) for turn in turns]
        pen.polygon(
            [
                (
                    left + (right - left) * (x - min(across)) / (max(across) - min(across)),
                    top + (bottom - top) * (y - min(down)) / (max(down) - min(down)),
                )
                for x, y in zip(across, down, strict=True)
            ],
            fill=fill,
        )
    if thing // len(_CORNERS) % 2:  # half of the objects have a band
        middle = (top + bottom) // 2
        thick = max(1, (bottom - top) // 6)
        pen.rectangle([left, middle - thick // 2, right, middle + thick // 2], fill=(255, 255, 255))
