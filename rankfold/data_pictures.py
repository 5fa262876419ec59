"""One picture: read from where it lies, checked without being decoded, decoded into RGB or grey.

    file, member of an archive, row of a data set   bytes as they were written
    packaged arrays                                 pixels (height, width) uint8

EXIF says which way is up; transparent pixels are put on white; 16 bits are scaled to 8; of several frames the
first is taken. What is no picture is a ValueError that says why; who asks for it adds the name.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

# What Pillow is let try: its other readers start programs, or read what is no picture.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_END, _TAIL = b"\xff\xd9", 4096  # of a JPEG, which some cameras write a little after


class Pictures(Protocol):
    """Pictures in order, read one by one."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes | np.ndarray:
        """The bytes of a file, or pixels (height, width) uint8. Raises OSError where it cannot be read."""
        ...


class Files:
    """Files on disk."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        return self.paths[index].read_bytes()


class Members:
    """Files in a zip archive, which stays open; each process opens it for itself."""

    def __init__(self, archive: Path, names: Sequence[str]) -> None:
        self.archive, self.names = archive, list(names)
        self._open: tuple[int, zipfile.ZipFile] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        if self._open is None or self._open[0] != os.getpid():
            self._open = os.getpid(), zipfile.ZipFile(self.archive)
        return self._open[1].read(self.names[index])

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_open": None}


class Arrays:
    """Pixels (n, height, width) uint8 in memory."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: int) -> np.ndarray:
        return self.pixels[index]


def checked(found: bytes | np.ndarray) -> str:
    """The BLAKE2b digest (hex) of a picture's bytes, after a look at them: the header, the checksums of a
    PNG, the end of a JPEG; a JPEG without it, and every other kind, is decoded once. Raises ValueError."""
    if isinstance(found, np.ndarray):
        return hashlib.blake2b(np.ascontiguousarray(found).data, digest_size=16).hexdigest()
    with _opened(found) as image:
        if image.format == "PNG":
            image.verify()
        elif image.format not in ("JPEG", "MPO") or _END not in found[-_TAIL:]:
            image.load()
    return hashlib.blake2b(found, digest_size=16).hexdigest()


def decode(found: bytes | np.ndarray, channels: int = 3) -> Any:
    """The picture as a PIL image, RGB (`channels` 3) or grey (1). Raises ValueError."""
    from PIL import Image, ImageOps

    if isinstance(found, np.ndarray):
        return _eight_bits(Image.fromarray(found), channels)
    with _opened(found) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
    return _eight_bits(upright, channels)


@contextmanager
def _opened(found: bytes) -> Iterator[Any]:
    check_pillow()
    from PIL import Image, UnidentifiedImageError

    if not found:
        raise ValueError("the file is empty")
    Image.init()  # all readers that Pillow was built with, once
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, which is not read
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(found), formats=formats) as image:
                yield image
    except UnidentifiedImageError as error:
        raise ValueError(f"it is no picture of a kind that is read here ({', '.join(formats)})") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(
            f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller, as no model reads so many"
        ) from error
    except Exception as error:  # a damaged file makes each reader raise its own kinds
        raise ValueError(f"it is damaged or cut short ({str(error) or type(error).__name__})") from error


def _eight_bits(image: Any, channels: int) -> Any:
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of an unknown range; write it with 8 bits")
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("its pixels have 32 bits; write it with 8 or 16")
        image = Image.fromarray((pixels // 257).astype(np.uint8))
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        clear = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    return image.convert("RGB" if channels == 3 else "L")


def check_pillow() -> None:
    """Raise ValueError where Pillow is not installed."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ValueError("images are read with Pillow, which is not installed: pip install pillow") from error
