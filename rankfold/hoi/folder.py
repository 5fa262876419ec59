"""A data folder: where the annotations, images, detections and text features of its two parts stand.

    instances_train2015.json, instances_test2015.json           HICO-DET; its images are in
    hico_20160224_det/images/train2015, …/test2015
    instances_vcoco_trainval.json, instances_vcoco_test.json    V-COCO; its images are in
    mscoco2014/train2014, mscoco2014/val2014
    detections_train.safetensors, detections_test.safetensors   `rankfold hoi detect` writes them
    text.safetensors                                            text features, where there are any
    settings.json                                               options of `rankfold hoi train` that fit it

Every path can be given by itself instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rankfold.hoi.annotations import Annotations, Bad
from rankfold.hoi.classes import RARE_BELOW, ClassTable, content
from rankfold.hoi.hicodet import read_hicodet
from rankfold.hoi.vcoco import read_vcoco

PARTS = ("train", "test")
TEXT, SETTINGS = "text.safetensors", "settings.json"
_LAYOUTS = (  # part: (annotations, images)
    {
        "train": ("instances_train2015.json", "hico_20160224_det/images/train2015"),
        "test": ("instances_test2015.json", "hico_20160224_det/images/test2015"),
    },
    {
        "train": ("instances_vcoco_trainval.json", "mscoco2014/train2014"),
        "test": ("instances_vcoco_test.json", "mscoco2014/val2014"),
    },
)


@dataclass(frozen=True)
class Part:
    """One part of a data set on disk. `detections` need not exist."""

    name: str
    annotations: Annotations
    images: Path
    detections: Path


def has_part(data: str | Path, part: str) -> bool:
    """Whether the folder has annotations of that part."""
    return any((Path(data) / layout[part][0]).is_file() for layout in _LAYOUTS)


def open_part(
    data: str | Path,
    part: str,
    *,
    table: ClassTable | None = None,
    annotations: str | Path | None = None,
    images: str | Path | None = None,
    detections: str | Path | None = None,
    bad: Bad = "raise",
) -> Part:
    """Part "train" or "test" of a data folder; no image is opened, but all must be there.

    table   the classes that are expected; None: those of the annotations. Where those of a training part name
            no rare class, rare is what has fewer than 10 pairs in it
    bad     see `read_hicodet`

    Raises ValueError, naming the file, for what is not there, is not such a file, or has other classes.
    """
    if part not in PARTS:
        raise ValueError(f"no part {part!r}; there are {', '.join(PARTS)}")
    home = Path(data)
    if not home.is_dir():
        raise ValueError(f"no data folder {home}")
    layout = next((item for item in _LAYOUTS if (home / item[part][0]).is_file()), None)
    if layout is None and annotations is None:
        names = " or ".join(item[part][0] for item in _LAYOUTS)
        raise ValueError(f"{home} has no {names}; name the file with --annotations")
    file = Path(annotations) if annotations is not None else home / (layout or {})[part][0]
    if images is None and layout is None:
        raise ValueError(f"the images of {file}: name their folder with --images")
    folder = Path(images) if images is not None else home / (layout or {})[part][1]
    if layout is None:
        vcoco = "action_to_object" in content(file, "annotations")[1]
    else:
        vcoco = layout is _LAYOUTS[1]
    # Sizes of V-COCO's images are in the images alone.
    found = read_vcoco(file, table, folder, bad) if vcoco else read_hicodet(file, table, folder, bad)
    if table is None and part == "train" and not found.table.rare and not vcoco:
        few = (found.counts() < RARE_BELOW).nonzero().squeeze(1).tolist()
        found = replace(found, table=replace(found.table, rare=frozenset(few)))
    kept = Path(detections) if detections is not None else home / f"detections_{part}.safetensors"
    return Part(part, found, folder, kept)
