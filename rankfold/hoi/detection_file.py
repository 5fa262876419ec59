"""Detections of a whole data set in one file, extracted once.

One safetensors file: boxes, scores, labels and queries of all images one after another, `starts` (where each
image's begin), and in the header, as JSON: the format's version, the classes' hash, the detector, what was
kept (`Selection`), file names and image sizes. An image is read by name and checked; the rest stays on disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rankfold.atomic import writing_file
from rankfold.hoi.annotations import Annotations
from rankfold.hoi.classes import ClassTable
from rankfold.hoi.detections import Detections, Selection

FORMAT = 1
_KEY = "rankfold_detections"
_TENSORS = ("boxes", "scores", "labels", "queries")


def write_detections(
    path: str | os.PathLike[str],
    found: Iterable[tuple[str, tuple[int, int], Detections]],
    table: ClassTable,
    detector: str,
    selection: Selection | None,
    known: Iterable[int] | None = None,
) -> Path:
    """Write (file name, image size (width, height), detections) of every image, whole or not at all.

    `detector`, `selection` (None for detections that no rule chose) and `known`, the object ids that the
    detector was trained on (None: all), are for the record. ValueError for no image, a name twice, detections
    that do not fit `table`, and queries of different widths.
    """
    path = Path(path)
    names: list[str] = []
    sizes: list[tuple[int, int]] = []
    every: list[Detections] = []
    for name, size, one in found:
        if one.queries.shape[-1] != (width := (every or [one])[0].queries.shape[-1]):
            raise ValueError(
                f"image {name!r} has queries of width {one.queries.shape[-1]}, the first {width}"
            )
        names.append(name)
        sizes.append(size)
        every.append(one.check(table, f"image {name!r}"))
    if not names or len(set(names)) < len(names):
        twice = next((name for name in names if names.count(name) > 1), None)
        raise ValueError(
            f"image {twice!r} comes twice" if names else "there is no image to write detections of"
        )
    tensors = {key: torch.cat([getattr(one, key) for one in every]).contiguous() for key in _TENSORS}
    tensors["starts"] = torch.tensor([0, *(len(one) for one in every)]).cumsum(0)
    body = {
        "format": FORMAT,
        "table": table.hash,
        "objects": list(table.objects),
        "detector": detector,
        "known": sorted(range(len(table.objects)) if known is None else known),
        "selection": None if selection is None else selection.to_json(),
        "filenames": names,
        "sizes": sizes,
    }
    with writing_file(path) as beside:
        save_file(tensors, beside, metadata={_KEY: json.dumps(body)})
    return path


class DetectionFile:
    """A file that `write_detections` wrote, open for reading; it may go to other processes.

    filenames, sizes    the images, in order, and their (width, height)
    width               of the query vectors
    detector, selection, known    as they were written

    ValueError where the file is damaged, of another format, or of other classes than `table`.
    """

    def __init__(self, path: str | os.PathLike[str], table: ClassTable) -> None:
        self.path, self.table = Path(path), table
        if not self.path.is_file():
            raise ValueError(f"{self.path} is no file; detections were expected there")
        self._open()
        try:
            body = json.loads((self._handle.metadata() or {}).get(_KEY, "null"))
        except ValueError:
            body = None
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            version = body.get("format") if isinstance(body, dict) else None
            raise ValueError(
                f"{self.path} does not hold rankfold detections of format {FORMAT} (found {version}): "
                f"extract them again"
            )
        if body.get("table") != table.hash:
            mine, theirs = list(table.objects), body.get("objects", [])
            place = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
            how = "the interactions differ"
            if place is not None or len(mine) != len(theirs):
                pair = (mine[place], theirs[place]) if place is not None else (len(mine), len(theirs))
                how = f"objects[{place}] is {pair[1]!r}, expected {pair[0]!r}"
            raise ValueError(f"{self.path} was made for other classes: {how}. Extract the detections again")
        shapes = {key: tuple(self._handle.get_slice(key).get_shape()) for key in self._names()}
        rows = shapes.get("boxes", (0,))[0]
        wanted = {"boxes": (rows, 4), "scores": (rows,), "labels": (rows,)}
        bad = [key for key, shape in wanted.items() if shapes.get(key) != shape]
        queries = shapes.get("queries", ())
        if bad or len(queries) != 2 or queries[0] != rows:
            key = bad[0] if bad else "queries"
            raise ValueError(
                f"{self.path}: {key} have shape {shapes.get(key)}, but there are {rows} detections"
            )
        self.width: int = queries[1]
        try:
            self.filenames: list[str] = body["filenames"]
            self.sizes = [(width, height) for width, height in body["sizes"]]
            self.detector: str = body["detector"]
            self.known: tuple[int, ...] = tuple(body["known"])
            self.selection = None if body["selection"] is None else Selection(**body["selection"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} has a damaged header ({error}): extract them again") from error
        starts = self._handle.get_tensor("starts") if "starts" in shapes else torch.zeros(0)
        if len(starts) != len(self.filenames) + 1 or int(starts[-1]) != rows or (starts.diff() < 0).any():
            raise ValueError(
                f"{self.path} is damaged: {len(starts)} starts for {len(self.filenames)} images and {rows} "
                f"detections"
            )
        self._starts: list[int] = starts.tolist()
        self._place = {name: place for place, name in enumerate(self.filenames)}

    def _open(self) -> None:
        try:
            self._handle = safe_open(self.path, framework="pt").__enter__()
        except SafetensorError as error:
            raise ValueError(f"{self.path} is damaged ({error}): extract the detections again") from error

    def _names(self) -> list[str]:
        return list(self._handle.keys())

    def __getstate__(self) -> dict[str, Any]:
        return {key: held for key, held in self.__dict__.items() if key != "_handle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        """The number of images."""
        return len(self.filenames)

    def __contains__(self, filename: object) -> bool:
        return filename in self._place

    def __getitem__(self, filename: str) -> Detections:
        """The detections of one image. ValueError for an image that is not there, and for damaged content."""
        if filename not in self._place:
            raise ValueError(f"{self.path} has no image {filename!r}; it holds {len(self)} others")
        place = self._place[filename]
        rows = slice(self._starts[place], self._starts[place + 1])
        held = [self._handle.get_slice(key)[rows] for key in _TENSORS]
        return Detections(*held).check(self.table, f"{self.path}, image {filename!r}")

    def of(self, filename: str, image: Any = None) -> Detections:
        """What a source of detections is asked for: `self[filename]`, whatever the image."""
        return self[filename]

    def check_images(self, annotations: Annotations) -> None:
        """ValueError unless every annotated image is here, with the same size."""
        missing = [scene.filename for scene in annotations.scenes if scene.filename not in self]
        if missing:
            raise ValueError(
                f"{self.path} lacks {len(missing)} of {len(annotations)} images of {annotations.source}; the "
                f"first is {missing[0]!r}"
            )
        for scene in annotations.scenes:
            size = self.sizes[self._place[scene.filename]]
            if scene.size not in ((0, 0), size):
                raise ValueError(
                    f"{self.path}: image {scene.filename!r} is {size[0]} x {size[1]} pixels there, but "
                    f"{scene.size[0]} x {scene.size[1]} in {annotations.source}"
                )

    def check_width(self, width: int) -> None:
        """ValueError unless the query vectors have `width` numbers, as a model expects."""
        if self.width != width:
            raise ValueError(
                f"{self.path}: image {self.filenames[0]!r} has queries of {self.width} numbers, the model "
                f"expects {width}: extract them with the detector that it was trained with"
            )
