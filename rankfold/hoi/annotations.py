"""Annotated images: who does what with which object, read from a data set's files without opening an image.

Boxes are float32 corners in pixels of the original image, from 0 (`rankfold.hoi.boxes`), whatever a file's
own convention is. The readers (`hicodet`, `vcoco`) check everything and name file, image and field in their
errors.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rankfold.hoi.boxes import clip, valid
from rankfold.hoi.classes import ClassTable
from rankfold.hoi.splits import Split

# What to do with a pair whose boxes leave the image or have no area: an error, cut at the border, or left
# out. Cut boxes that have no area left are left out.
Bad = Literal["raise", "clip", "drop"]
BAD = ("raise", "clip", "drop")


@dataclass(frozen=True, eq=False)
class Scene:
    """One image and its pairs.

    size                (width, height) in pixels; (0, 0) where the file does not say
    boxes_h, boxes_o    (g, 4) float32: the human and the object of each pair
    interactions        (g,) int64: the interaction id of each pair
    """

    filename: str
    size: tuple[int, int]
    boxes_h: Tensor
    boxes_o: Tensor
    interactions: Tensor

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self.interactions)

    def take(self, rows: Tensor) -> Scene:
        """The pairs of `rows`: a bool mask, or indices."""
        return replace(
            self,
            boxes_h=self.boxes_h[rows],
            boxes_o=self.boxes_o[rows],
            interactions=self.interactions[rows],
        )


@dataclass(frozen=True, eq=False)
class Annotations:
    """The scenes of one file, in its order; `source` is how errors and reports call it."""

    table: ClassTable
    scenes: list[Scene] = field(repr=False)
    source: str

    def __len__(self) -> int:
        return len(self.scenes)

    def counts(self) -> Tensor:
        """(N,) int64: the pairs of each interaction id."""
        every = [torch.zeros(0, dtype=torch.int64), *(scene.interactions for scene in self.scenes)]
        return torch.cat(every).bincount(minlength=len(self.table))

    def without_unseen(self, split: Split) -> Annotations:
        """What zero-shot training may see: unseen pairs are deleted, then images without a pair.

        ValueError when no image is left, or when `split` is of another table.
        """
        self.table.check_same(split.table, f"the table of setting {split.name!r}")
        hidden = torch.tensor(split.unseen, dtype=torch.int64)
        kept = [scene.take(~torch.isin(scene.interactions, hidden)) for scene in self.scenes]
        kept = [scene for scene in kept if len(scene)]
        if not kept:
            raise ValueError(
                f"{self.source}: setting {split.name!r} leaves none of {len(self)} images with a pair"
            )
        return replace(self, scenes=kept)

    def with_pairs(self) -> Annotations:
        """Without the images that have no pair."""
        return replace(self, scenes=[scene for scene in self.scenes if len(scene)])

    def check_images(self, folder: str | os.PathLike[str]) -> Path:
        """`folder` as a path, which holds every image. ValueError names the first that is missing. Reads the
        names in the folder and opens none."""
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; the images of {self.source} were expected there")
        have = set(os.listdir(folder))
        missing = [
            scene.filename
            for scene in self.scenes
            if scene.filename not in have and not (folder / scene.filename).is_file()
        ]
        if missing:
            raise ValueError(
                f"{folder} lacks {len(missing)} of {len(self)} images of {self.source}; the first is "
                f"{missing[0]!r}"
            )
        return folder


# --- what the readers share --------------------------------------------------------------------------------


def check_bad(bad: str) -> None:
    if bad not in BAD:
        raise ValueError(f"bad boxes can be {', '.join(map(repr, BAD))}, not {bad!r}")


def read_boxes(held: Any, first: int, where: str) -> Tensor:
    """(g, 4) float32 from a JSON list of [x1, y1, x2, y2], whose x1 and y1 count from `first`; x2 and y2 are
    the same in both conventions. ValueError, beginning with `where`, for what is no list of fours."""
    four = isinstance(held, list) and all(
        isinstance(box, list) and len(box) == 4 and all(type(x) in (int, float) for x in box) for box in held
    )
    if not four:
        raise ValueError(f"{where} must be a list of boxes, four numbers each")
    boxes = torch.tensor(held, dtype=torch.float64).reshape(-1, 4)
    return (boxes - boxes.new_tensor([first, first, 0, 0])).float()


def checked(scenes: list[Scene], bad: Bad, where: str) -> list[Scene]:
    """The scenes without bad boxes. `bad` "raise": ValueError that names file, image, field and box; boxes
    that are not numbers always raise."""
    boxes = torch.cat([torch.zeros(0, 8), *(torch.cat([s.boxes_h, s.boxes_o], 1) for s in scenes)])
    sizes = torch.tensor([[w, h] if w else [2**31, 2**31] for w, h in (s.size for s in scenes)]).reshape(
        -1, 2
    )
    sizes = sizes.repeat_interleave(torch.tensor([len(s) for s in scenes], dtype=torch.int64), 0)
    boxes = boxes.reshape(-1, 2, 4)
    if (valid(boxes) & (boxes >= 0).all(-1) & (boxes[..., 2:] <= sizes[:, None]).all(-1)).all():
        return scenes  # the usual case, at once for all
    return [_checked(scene, bad, f"{where}, image {scene.filename!r}") for scene in scenes]


def _checked(scene: Scene, bad: Bad, where: str) -> Scene:
    good = torch.ones(len(scene), dtype=torch.bool)
    for name in ("boxes_h", "boxes_o"):
        boxes = getattr(scene, name)
        if not boxes.isfinite().all():
            row = int((~boxes.isfinite().all(-1)).nonzero()[0])
            raise ValueError(f"{where}: {name}[{row}] is {boxes[row].tolist()}: not a number")
        inside = clip(boxes, scene.size) if scene.size != (0, 0) else boxes.clamp(min=0)
        empty, outside = ~valid(boxes), (inside != boxes).any(-1)
        if (wrong := empty | outside).any() and bad == "raise":
            row = int(wrong.nonzero()[0])
            border = f"leaves the image of {scene.size[0]} x {scene.size[1]} pixels"
            raise ValueError(
                f"{where}: {name}[{row}] is {boxes[row].tolist()} (pixels from 0), which "
                f"{'has no area' if empty[row] else border}. Mend the file, or read it with bad='clip' or "
                f"bad='drop'"
            )
        if bad == "clip":
            scene, wrong = replace(scene, **{name: inside}), ~valid(inside)
        good &= ~wrong
    return scene if good.all() else scene.take(good)


def same_lengths(lists: dict[str, Any], where: str) -> int:
    """The length that all `lists` share. ValueError names two that differ, or what is no list."""
    for key, held in lists.items():
        if not isinstance(held, list):
            raise ValueError(f"{where}: {key!r} must be a list, got {type(held).__name__}")
    (first, head), *rest = lists.items()
    for key, held in rest:
        if len(held) != len(head):
            raise ValueError(f"{where}: {key!r} has {len(held)} entries, but {first!r} has {len(head)}")
    return len(head)


def numbers(held: Any, below: int, where: str) -> list[int]:
    """`held` as ids below `below`. ValueError, beginning with `where`, for anything else."""
    for place, i in enumerate(held):
        if type(i) is not int or not 0 <= i < below:
            raise ValueError(f"{where}[{place}] is {i!r}; ids are 0 … {below - 1}")
    return held


def different(filenames: Iterable[Any], where: str) -> None:
    """ValueError, beginning with `where`, for a file name that is no string, or comes twice."""
    seen: set[str] = set()
    for name in filenames:
        if not isinstance(name, str) or not name or name in seen:
            raise ValueError(f"{where}: file name {name!r} {'comes twice' if name in seen else 'is no name'}")
        seen.add(name)
