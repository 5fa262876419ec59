"""Images as a model reads them: its own processor, by way of Pillow and numpy, and what is varied in
training.

    file -> RGB or grey -> (flip, crop) -> processor of the model: resize, rescale, normalise -> pixel_values

Batches are made when they are needed. What is varied depends on the seed, the epoch and the image alone, so
that a run that goes on sees the same.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rankfold.adapt.pictures import Images, said
from rankfold.classify.build import source

FILE, PIXELS = "preprocessor_config.json", "pixel_values"
VARIATIONS = ("flip", "crop")
_AREA, _RATIO = (0.5, 1.0), (3 / 4, 4 / 3)  # of a crop: share of the image, width to height


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How images are read. None is what the model's own processor says.

    column     of a table or data set that has the images
    size       pixels of a side
    mean, std  of each channel, of values from 0 to 1
    augment    what is varied at random in training: "flip" (left and right, every second time), "crop" (half
               to all of the image, at most 4:3 out of its shape)
    """

    column: str | None = None
    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        column: str | None = None,
        size: int | None = None,
        mean: str | None = None,
        std: str | None = None,
        augment: str | None = None,
    ) -> Reading:
        """From the words of a command line. Raises ValueError."""
        chosen = [] if augment in (None, "none") else [name.strip() for name in str(augment).split(",")]
        for name in chosen:
            if name not in VARIATIONS:
                raise ValueError(f"--augment {augment!r}: none, or some of {', '.join(VARIATIONS)}")
        if size is not None and size < 1:
            raise ValueError(f"--image-size {size}: at least 1 pixel")
        found = cls(
            column=column,
            size=size,
            mean=_numbers(mean, "--mean"),
            std=_numbers(std, "--std"),
            augment=tuple(name for name in VARIATIONS if name in chosen),
        )
        if found.std is not None and min(found.std) <= 0:
            raise ValueError(f"--std {std}: above 0")
        return found


def _numbers(words: str | None, flag: str) -> tuple[float, ...] | None:
    if words is None:
        return None
    try:
        found = tuple(float(item) for item in words.split(","))
    except ValueError:
        found = ()
    if not found or not all(map(math.isfinite, found)):
        raise ValueError(f"{flag} {words!r}: a number, or one for each channel: 0.485,0.456,0.406")
    return found


def processor_of(model: str, config: Any, reading: Reading) -> Any:
    """The processor of a model, with what `reading` says in place of its own. Raises ValueError where it has
    none and not all is said, and where it does not make images of one size."""
    import transformers

    auto: Any = transformers.AutoImageProcessor
    channels = channels_of(model, config)
    try:
        found = auto.from_pretrained(source(model), backend="pil")
    except (OSError, ValueError, ImportError) as error:
        size = reading.size or getattr(config, "image_size", None)
        if reading.mean is None or reading.std is None or not isinstance(size, int):
            shown = "" if isinstance(error, OSError) else f" that can be used ({said(error)})"
            raise ValueError(
                f"{model!r} has no {FILE}{shown}, which says how images become numbers: copy that of the "
                f"model it was made from, or say --image-size 224 --mean 0.5 --std 0.5"
            ) from error
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / FILE).write_text("{}")  # what transformers says of models of this kind
            try:
                found = auto.from_pretrained(folder, config=config, backend="pil")
            except (OSError, ValueError) as other:
                raise ValueError(
                    f"transformers has no image processor for {model!r} ({said(other)})"
                ) from other
        reading = replace(reading, size=size)
    if reading.size is not None:
        _resize_(found, reading.size)
    for name, values in (("image_mean", reading.mean), ("image_std", reading.std)):
        if values is not None:
            if len(values) not in (1, channels):
                raise ValueError(f"--{name[6:]}: {len(values)} numbers, and images have {channels} channels")
            setattr(found, name, list(values) * (channels // len(values)))
    _check(model, found, channels, reading)
    return found


def _resize_(found: Any, size: int) -> None:
    """Make a processor give squares of `size`. A crop in the middle keeps its share of the image."""
    old = dict(found.size or {})
    if getattr(found, "do_center_crop", None) and found.crop_size:
        crop = dict(found.crop_size)
        share = size / min(crop.get("height") or size, crop.get("width") or size)
        found.size = type(found.size)(
            **{key: max(size, round(side * share)) for key, side in old.items() if side}
        )
        found.crop_size = type(found.crop_size)(height=size, width=size)
    elif old.get("shortest_edge"):
        found.size = type(found.size)(shortest_edge=size)
    else:
        found.size = type(found.size)(height=size, width=size)


def _check(model: str, found: Any, channels: int, reading: Reading) -> None:
    from PIL import Image

    mode = "RGB" if channels == 3 else "L"
    shapes = []
    for shape in ((64, 48), (48, 64)):
        try:
            made = found([Image.new(mode, shape)], return_tensors="pt")
            shapes.append(tuple(made[PIXELS].shape[1:]))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"the image processor of {model!r} makes nothing of an image of {channels} channels "
                f"({said(error)}); say --image-size, --mean and --std"
            ) from error
    if len(set(shapes)) > 1:
        raise ValueError(
            f"the image processor of {model!r} gives images of different sizes, {shapes[0]} and {shapes[1]}, "
            "which no batch can hold: say --image-size"
        )
    wanted = reading.size
    if wanted is not None and shapes[0][-2:] != (wanted, wanted):
        raise ValueError(
            f"--image-size {wanted}: the image processor of {model!r} gives {shapes[0][-2]} x "
            f"{shapes[0][-1]} all the same; write the size into its {FILE}"
        )


def channels_of(model: str, config: Any) -> int:
    """3, or 1 of a model of grey images. Raises ValueError for another number."""
    found = getattr(config, "num_channels", 3)
    if found not in (1, 3):
        raise ValueError(
            f"{model!r} reads images of {found} channels; 3 (RGB) and 1 (grey) can be made of files"
        )
    return found


@dataclass(frozen=True)
class Pixels:
    """Images as tensors, made when they are asked for (see `rankfold.classify.encode.Inputs`)."""

    images: Images
    processor: Any
    channels: int
    augment: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def length_of(self, row: int) -> int:
        return 1

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """pixel_values (rows, channels, height, width) float32."""
        return self._made([self.images.open(row, self.channels) for row in rows])

    def varied(self, rows: Sequence[int], seed: int, epoch: int) -> dict[str, Tensor]:
        found = [self.images.open(row, self.channels) for row in rows]
        if self.augment:
            draws = (random.Random(f"{seed} {epoch} {row}") for row in rows)
            found = [vary(image, self.augment, draw) for image, draw in zip(found, draws, strict=True)]
        return self._made(found)

    def _made(self, found: list[Any]) -> dict[str, Tensor]:
        made = self.processor(found, return_tensors="pt")
        return {PIXELS: made[PIXELS]}


def vary(image: Any, augment: Sequence[str], draw: random.Random) -> Any:
    """A PIL image, cropped and turned as `draw` decides."""
    from PIL import ImageOps

    if "crop" in augment:
        area = draw.uniform(*_AREA) * image.width * image.height
        ratio = math.exp(draw.uniform(math.log(_RATIO[0]), math.log(_RATIO[1]))) * image.width / image.height
        width = min(image.width, max(1, round(math.sqrt(area * ratio))))
        height = min(image.height, max(1, round(math.sqrt(area / ratio))))
        left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
        image = image.crop((left, top, left + width, top + height))
    if "flip" in augment and draw.random() < 0.5:
        image = ImageOps.mirror(image)
    return image
