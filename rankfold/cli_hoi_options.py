"""The options of `rankfold hoi` that several of its commands share; and those of a training, gathered."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

DATA = Annotated[
    str, typer.Argument(metavar="DATA", help="folder of annotations, images and detections (docs/hoi.md)")
]
Folder = Annotated[str, typer.Argument(metavar="OUT", help="a folder that `hoi train` wrote")]
PartName = Annotated[str, typer.Option("--part", help="train or test")]
AnnotationFile = Annotated[str | None, typer.Option("--annotations", help="a file, instead of DATA's own")]
Images = Annotated[str | None, typer.Option(help="the folder of the images, instead of DATA's own")]
Detections = Annotated[
    str | None, typer.Option(help="a file of `hoi detect`, instead of DATA's detections_PART.safetensors")
]
DetectorName = Annotated[
    str | None, typer.Option("--detector", help="folder or hub id of a DETR that looks at each image now")
]
BadBoxes = Annotated[
    str, typer.Option("--bad", help="boxes that leave the image or have no area: raise, clip or drop")
]
Points = Annotated[str, typer.Option(help="of average precision: 11, as the protocol, or all")]
Workers = Annotated[int | None, typer.Option(help="processes that decode images; default 0: this one")]
Top = Annotated[int, typer.Option(help="triplets of an image, the best ones")]

# Options of `train` that a file of settings may give; None is what was not given.
TRAINING: dict[str, Any] = {
    "setting": str,
    "unseen": str,
    "vision": str,
    "text": str,
    "descriptions": str,
    "upstream": bool,
    "set": dict,
    "weights": dict,
    "epochs": int,
    "lr": (int, float),
    "batch_size": int,
    "accumulate": int,
    "weight_decay": (int, float),
    "clip": (int, float),
    "drop": int,
    "seed": int,
    "workers": int,
}


def training_options(file: Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a training: those of the settings file, and above them those that were given.

    given  by the names of TRAINING; "set" and "weights" are lists of KEY=VALUE

    Raises ValueError for a file that is not such a one, and for weights that are no numbers.
    """
    from rankfold.hoi.build import setting_items
    from rankfold.hoi.settings import read_settings

    held = {} if file is None else read_settings(file, TRAINING)
    found = {name: value for name, value in {**held}.items() if name not in ("set", "weights")}
    found |= {
        name: value for name, value in given.items() if name not in ("set", "weights") and value is not None
    }
    found["set"] = (*setting_items(held.get("set") or {}), *(given.get("set") or ()))
    weights = {**(held.get("weights") or {})}
    for item in given.get("weights") or ():
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--weight {item!r}: write TERM=NUMBER, such as sem=0")
        weights[name] = value
    found["weights"] = {name: _number(name, value) for name, value in weights.items()}
    return found


def _number(name: str, value: Any) -> float | bool:
    """A weight; the two switches among them are true or false."""
    if isinstance(value, bool) or str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--weight {name}={value!r}: a number") from error
