"""Labelled images by name: a folder of class folders, a table of paths, a data set, a packaged set.

    photos/  photos:train  list.csv  list.jsonl  fashion:train  a hub data set, a folder that it was saved to

They are `Examples` whose texts are the digests of the files: what is held out, which images are on both
sides, and what a run was trained on are found as they are for texts, from the content alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rankfold.classify.examples import Examples
from rankfold.classify.rows import SUFFIXES, file_rows, hub_names, hub_set, is_saved_set, label_of, named
from rankfold.data_images import IMAGES, ImageSet, folder, image_spec, packaged_images
from rankfold.data_packaged import TEXTS
from rankfold.data_pictures import Files, Pictures, check_pillow, checked, decode
from rankfold.metrics import Progress

COLUMN = "image"


@dataclass(frozen=True)
class Images(Examples):
    """Examples whose texts are digests; `rows`: which of the pictures they are; `where`: how errors name
    each."""

    pictures: Pictures = field(default_factory=lambda: Files([]))
    rows: list[int] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    noun: ClassVar[str] = "image"

    def at(self, index: int) -> str:
        return self.where[index]

    def take(self, rows: Sequence[int]) -> Images:
        found: Any = super().take(rows)
        return replace(found, rows=[self.rows[row] for row in rows], where=[self.where[row] for row in rows])

    def open(self, index: int, channels: int) -> Any:
        """One of them as a PIL image, RGB or grey. Raises ValueError, with its name, where it cannot be
        read."""
        try:
            return decode(self.pictures.read(self.rows[index]), channels)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{self.where[index]}: {said(error)}") from error


def check_images(spec: str) -> tuple[str, str | None]:
    """(name, split) of what is to be read, looking at names alone. Raises ValueError for what cannot be
    one."""
    check_pillow()
    name, split = image_spec(spec)
    path = Path(name)
    if path.suffix in SUFFIXES or path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"'{name}': images are listed in {', '.join(SUFFIXES)} files")
        if split is not None:
            raise ValueError(f"the file {name!r} has no splits, but {split!r} was asked for")
        if not path.is_file():
            raise ValueError(f"no file '{name}'")
    elif path.is_dir() and split is not None and not is_saved_set(path) and not (path / split).is_dir():
        raise ValueError(f"no folder '{path / split}'")
    elif name in TEXTS:
        raise ValueError(
            f"{name!r} is text, and the model reads images: {', '.join(IMAGES)}, a folder, a table"
        )
    elif not path.exists() and name not in IMAGES and (near := difflib.get_close_matches(name, IMAGES, n=1)):
        raise ValueError(f"no images {name!r}. Did you mean {near[0]!r}?")
    elif not path.exists() and name.endswith(("/", "\\")):
        raise ValueError(f"no folder '{name}'")
    return name, split


def read_images(
    spec: str, tell: Progress, *, image_column: str | None = None, label_column: str = "label"
) -> Images:
    """The images that a SPEC names, in order, each looked at and none kept. A packaged set without a split
    is read whole; a hub data set without one is its split "train".

    image_column  of a table or data set; None: "image", or the one column of images that a data set has

    Raises ValueError for anything that is missing or malformed, with the file, the line, or the image.
    """
    name, split = check_images(spec)
    path = Path(name)
    source = name if split is None else f"{name}:{split}"
    if name in IMAGES and not path.exists():
        found = packaged_images(name, split or "all")
    elif path.suffix in SUFFIXES:
        found = _table(path, image_column or COLUMN, label_column)
    elif path.is_dir() and not is_saved_set(path):
        found = folder(path / split if split else path)
    else:
        try:
            found = _data_set(name, split or "train", image_column, label_column)
        except ValueError as error:
            raise ValueError(f"{'' if path.exists() else f'no folder {name!r}, and '}{error}") from error
    if not found.labels:
        raise ValueError(f"'{spec}' has no images in it")
    for place, label in zip(found.places, found.labels, strict=True):
        if not label:
            raise ValueError(f"{place}: the label is empty; take the row out, or give it a label")
    digests = []
    count = len(found.labels)
    for index in range(count):
        try:
            digests.append(checked(found.pictures.read(index)))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{found.places[index]}: {said(error)}; mend it, or take it out") from error
        if index % 256 == 0 or index == count - 1:
            tell(f"read {source}", index + 1, count)
    numbers = list(range(count))
    return Images(
        digests,
        found.labels,
        numbers,
        source,
        found.names,
        "image",
        None,
        found.pictures,
        numbers,
        found.places,
        found.warnings,
    )


def said(error: BaseException) -> str:
    """The first line of what an error says."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return (str(error) or type(error).__name__).splitlines()[0]


def _table(path: Path, image_column: str, label_column: str) -> ImageSet:
    """A table of paths, which are relative to it."""
    try:
        rows = list(file_rows(path, image_column, label_column, labelled=True))
    except ValueError as error:
        raise ValueError(str(error).replace("--text-column", "--image-column")) from error
    for row in rows:
        if not row.text.strip():
            raise ValueError(f"'{path}', line {row.place}: the path of the image is empty")
    return ImageSet(
        Files([path.parent / row.text.strip() for row in rows]),
        [row.label or "" for row in rows],
        [f"'{path}', line {row.place}, '{row.text.strip()}'" for row in rows],
    )


class _Rows:
    """The images of a data set, undecoded."""

    def __init__(self, found: Any, column: str) -> None:
        self.found, self.column = found, column

    def __len__(self) -> int:
        return len(self.found)

    def read(self, index: int) -> bytes | np.ndarray:
        record = self.found[index][self.column]
        if not isinstance(record, dict) or (record.get("bytes") is None and not record.get("path")):
            raise ValueError("there is no image in it")
        return record["bytes"] if record.get("bytes") is not None else Path(record["path"]).read_bytes()


def _data_set(name: str, split: str, image_column: str | None, label_column: str) -> ImageSet:
    found, where = hub_set(name, split)
    import datasets

    features = found.features or {}
    images = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    column = image_column or (images[0] if len(images) == 1 else COLUMN)
    if column not in images:
        raise ValueError(
            f"{where}: {column!r} is no column of images; those are "
            f"{', '.join(map(repr, images)) or 'none'}. Name one with --image-column"
        )
    if label_column not in features:
        raise ValueError(
            f"{where}: no column {label_column!r}; it has {', '.join(map(repr, features))}. Name one with "
            "--label-column"
        )
    names = hub_names(found, label_column)
    places = [f"{where}, row {number}" for number in range(1, len(found) + 1)]
    labels = [
        named(label_of(value, place, label_column), names)
        for value, place in zip(found[label_column], places, strict=True)
    ]
    pictures = _Rows(found.cast_column(column, datasets.Image(decode=False)), column)
    return ImageSet(pictures, labels, places, names)
