"""Where the detections of an image come from: a file made before, or a detector that looks at it now.

`rankfold.hoi.loader.Source` is what both are; here they are chosen, and checked before any image is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from rankfold.hoi.classes import ClassTable
from rankfold.hoi.detection_file import DetectionFile
from rankfold.hoi.detections import Detections
from rankfold.hoi.detector import Detector
from rankfold.hoi.folder import Part
from rankfold.hoi.loader import Source

DRAWN = "annotations"  # the detector of a drawn set: there is none that could look at another image


def looking(name: str | None, table: ClassTable, device: str, workers: int = 0) -> Detector | None:
    """The detector of that name, if there is one to look at images. Raises ValueError where it cannot be
    opened, and for `workers`: it is in this process alone."""
    if name is None:
        return None
    if workers:
        raise ValueError(f"--workers {workers}: a detector runs in this process; leave that option out")
    return Detector.open(name, table, device)


def opened(part: Part, detector: Detector | None = None) -> DetectionFile | Detector:
    """What gives the detections of a part: its file, or `detector`. Raises ValueError where the file is
    missing or of other images, and says which command makes one."""
    if detector is not None:
        return detector
    if not part.detections.is_file():
        raise ValueError(
            f"no detections {part.detections}: `rankfold hoi detect DATA --part {part.name}` makes them"
        )
    found = DetectionFile(part.detections, part.annotations.table)
    found.check_images(part.annotations)
    return found


def check_queries(source: DetectionFile | Detector, width: int) -> None:
    """Raise ValueError, with both numbers, where query vectors have another width than the model reads."""
    if isinstance(source, DetectionFile):
        source.check_width(width)
    elif source.width != width:
        raise ValueError(
            f"detector {source.name!r} has queries of {source.width} numbers, the model expects {width}: use "
            "the one that it was trained with"
        )


class Kept:
    """Detections of known images, from the files that have them."""

    def __init__(self, files: Sequence[DetectionFile]) -> None:
        self.files = files

    def of(self, filename: str, image: Image.Image) -> Detections:
        """By the file's name. Raises ValueError where no file has it, or it has another size there."""
        for file in self.files:
            if filename in file:
                size = file.sizes[file.filenames.index(filename)]
                if size != image.size:
                    raise ValueError(
                        f"{filename} has {image.width} x {image.height} pixels, in {file.path} {size[0]} x "
                        f"{size[1]}: another image of this name? Name a detector with --detector"
                    )
                return file[filename]
        places = ", ".join(str(file.path) for file in self.files) or "no file of detections is there"
        raise ValueError(f"no detections of {filename} ({places}): name a detector with --detector")


def source_of(
    facts: dict[str, Any],
    table: ClassTable,
    device: str,
    *,
    detector: str | None = None,
    detections: str | None = None,
) -> Source:
    """Where detections of an image come from, see the module. Raises ValueError for both options, and for a
    detector or file that is not there."""
    if detector is not None and detections is not None:
        raise ValueError("--detector and --detections: one of them")
    if detections is not None:
        return Kept([DetectionFile(detections, table)])
    parts = facts["data"].values()
    name = detector or next((part["detector"] for part in parts if part["detector"] != DRAWN), None)
    if name is not None:
        return Detector.open(name, table, device)
    paths = [Path(part["detections"]) for part in parts if part["detections"]]
    return Kept([DetectionFile(path, table) for path in paths if path.is_file()])
