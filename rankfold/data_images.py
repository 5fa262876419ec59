"""Sets of labelled images: folders of class folders, and packaged ones.

    photos/cat/1.jpg, photos/dog/2.png      the name of a folder is the class of what is below it
    photos/train/cat/1.jpg                  as `photos:train`
    fashion, textile, digits                packaged

Split `test` of `textile` and `digits` is the even-numbered images of each class (0, 2, 4, …), `train` the
odd-numbered; `fashion` has its authors' own split, 60,000 and 10,000. Nothing is decoded here.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rankfold.data import Spec
from rankfold.data_classes import SPLITS
from rankfold.data_files import downloaded, members
from rankfold.data_pictures import SUFFIXES, Arrays, Files, Members, Pictures

_IDX = {2051: 3, 2049: 1}  # magic number of an idx file of bytes -> dimensions
_INSTALLED = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts its files
_PARTS = ("train", "val", "valid", "validation", "test")  # folders that look like splits, not like classes
IMAGES: dict[str, tuple[str, ...]] = {
    "fashion": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "textile": ("nominal", "local", "global"),
    "digits": tuple("0123456789"),
}


@dataclass(frozen=True)
class ImageSet:
    """Images in order.

    labels    the class of each
    places    how an error names each
    names     the classes in an order that the set itself declares, or None
    warnings  what was left out, in words
    """

    pictures: Pictures
    labels: list[str]
    places: list[str]
    names: list[str] | None = None
    warnings: list[str] = field(default_factory=list)


def image_spec(spec: str) -> tuple[str, str | None]:
    """(name, split) of `NAME[:split]`. Raises ValueError for what cannot be one."""
    if Path(spec).exists():
        return spec, None
    parsed = Spec.parse(spec)
    if parsed.sequences:
        raise ValueError(
            f"{spec!r} names a number of windows, which images have not: leave out "
            f"':{parsed.sequences}x{parsed.length}' (--per-class takes some of each class)"
        )
    if parsed.name in IMAGES and parsed.split is not None and parsed.split not in SPLITS:
        raise ValueError(f"{parsed.name!r} has no split {parsed.split!r}: choose {', '.join(SPLITS)}")
    return parsed.name, parsed.split


def folder(path: Path) -> ImageSet:
    """The images of `path`/CLASS/…, by class and name; folders below a class are part of it.

    Raises ValueError, naming the file or folder, where there are no class folders, where one holds no image,
    and for images beside them.
    """
    entries = sorted(item for item in path.iterdir() if not item.name.startswith("."))
    kinds = [item for item in entries if item.is_dir()]
    stray = next((item for item in entries if item.is_file() and _is_image(item)), None)
    if not kinds:
        raise ValueError(
            f"'{path}' has no class folders in it: it should hold {path}/CLASS/IMAGE for every class"
        )
    if stray is not None:
        raise ValueError(
            f"'{stray}' lies beside the class folders of '{path}'; move it into the one of its class"
        )
    splits = [
        item.name for item in kinds if item.name in _PARTS and any(sub.is_dir() for sub in item.iterdir())
    ]
    if splits and len(splits) == len(kinds):
        raise ValueError(
            f"'{path}' holds splits, not classes ({', '.join(splits)}): name one, such as {path}:{splits[0]}"
        )
    found: list[Path] = []
    labels: list[str] = []
    others: list[Path] = []
    for kind in kinds:
        files = sorted(Path(root) / name for root, _, names in os.walk(kind) for name in names)
        files = [file for file in files if not file.name.startswith(".")]
        images = [file for file in files if _is_image(file)]
        if not images:
            raise ValueError(
                f"class folder '{kind}' has no image in it ({', '.join(SUFFIXES)}): fill it, or take it out"
            )
        others += [file for file in files if not _is_image(file)]
        found += images
        labels += [kind.name] * len(images)
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    said = [f"left out, as no image: '{others[0]}'{more}"] if others else []
    return ImageSet(Files(found), labels, [f"'{file}'" for file in found], warnings=said)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def packaged_images(name: str, split: str = "all") -> ImageSet:
    """A packaged set.

    fashion  Fashion-MNIST [Xiao et al. 2017, arXiv 1708.07747]: 70,000 grey images of 28 x 28, 10 classes
    textile  2,000 simulated pictures of cloth, 250 x 250: 1,000 nominal, 500 each with a local or global
             defect
    digits   1,797 grey images of 8 x 8, 10 classes (scikit-learn's)

    Raises ValueError where it is not there: how to get it.
    """
    if name == "fashion":
        return _fashion(split)
    if name == "textile":
        archive = downloaded(name)
        pattern = re.compile(r"conformal_clip_data/data/textile_images/simulated/(\w+)/textile_(\d+)\.jpg")
        with zipfile.ZipFile(archive) as wheel:
            matches = [match for item in wheel.namelist() if (match := pattern.fullmatch(item))]
        matches.sort(key=lambda match: (IMAGES[name].index(match[1]), int(match[2])))
        pictures: Pictures = Members(archive, [match[0] for match in matches])
        labels = [match[1] for match in matches]
        places = [f"'{archive}', {match[0]}" for match in matches]
    else:
        pixels, labels = _digits()
        pictures, places = Arrays(pixels), [f"'{name}', image {at}" for at in range(len(pixels))]
    order = _alternate(labels, split)
    return ImageSet(
        Picked(pictures, order),
        [labels[row] for row in order],
        [places[row] for row in order],
        list(IMAGES[name]),
    )


class Picked:
    """Some pictures of others, in another order."""

    def __init__(self, pictures: Pictures, rows: Sequence[int]) -> None:
        self.pictures, self.rows = pictures, list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> bytes | np.ndarray:
        return self.pictures.read(self.rows[index])


def _alternate(labels: Sequence[str], split: str) -> list[int]:
    """The even- or odd-numbered rows of each class, or all, in their order."""
    kinds: dict[str, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        kinds[label].append(row)
    return sorted(row for rows in kinds.values() for row in rows[SPLITS[split]])


def _fashion(split: str) -> ImageSet:
    files = {
        f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    }
    if all((_INSTALLED / name).is_file() for name in files):
        blobs = {name: (_INSTALLED / name).read_bytes() for name in files}
    else:
        found = members("fashion", r"(?:\./)?usr/share/datasets/fashion-mnist/(.+\.gz)")
        blobs = {match[1]: blob for match, blob in found}
    parts = {"train": ("train",), "test": ("t10k",), "all": ("train", "t10k")}[split]
    images, numbers = (
        np.concatenate([idx(blobs.get(name), name) for name in (f"{part}-{kind}-ubyte.gz" for part in parts)])
        for kind in ("images-idx3", "labels-idx1")
    )
    labels = [IMAGES["fashion"][number] for number in numbers]
    places = [f"'fashion:{split}', image {at}" for at in range(len(images))]
    return ImageSet(Arrays(images), labels, places, list(IMAGES["fashion"]))


def idx(blob: bytes | None, name: str) -> np.ndarray:
    """The bytes of a gzipped idx file: a big-endian magic number and sizes, then the data. Raises ValueError,
    with its name, for a damaged one."""
    try:
        data = gzip.decompress(blob or b"")
    except (OSError, EOFError, zlib.error):
        data = b""
    dims = _IDX.get(int.from_bytes(data[:4], "big"), 0)
    sizes = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    if not dims or len(data) != 4 + 4 * dims + math.prod(sizes):
        raise ValueError(f"{name} is not an idx file of images or labels")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(sizes)


def _digits() -> tuple[np.ndarray, list[str]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("images 'digits' come with scikit-learn: pip install scikit-learn") from error
    found: Any = load_digits()
    return (found.images * (255 / 16)).round().astype(np.uint8), [str(number) for number in found.target]
