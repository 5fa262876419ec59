"""A drawn data set on disk, as the command line makes it: `rankfold hoi synthetic`.

The real classes, text features of a real encoder, scenes whose geometry follows from those texts, detections
with jitter; and settings.json, the options of `rankfold hoi train` that fit it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rankfold.atomic import check_folder, writing_file
from rankfold.hoi.classes import ClassTable, from_consnet, from_hicodet
from rankfold.hoi.folder import SETTINGS, TEXT
from rankfold.hoi.synthetic import Options, write
from rankfold.hoi.text_encoder import TextEncoder
from rankfold.hoi.text_file import features_of, load_features, save_features
from rankfold.hoi.verb_geometry import verb_features
from rankfold.judge import Bars

# Found on drawn sets of 50 to 1000 images (docs/hoi.md); ours, and no paper's.
FITTING: dict[str, Any] = {
    "about": "options of `rankfold hoi train` that fit this drawn set; the paper's are for photos",
    "vision": "small",
    "batch_size": 10,
}
_STEPS, _MOST, _LEAST = 300, 60, 12  # of the optimizer; epochs


def synthetic(
    folder: str,
    *,
    images: int,
    test_images: int,
    seed: int,
    options: Options,
    classes: str | None,
    text: str,
    overwrite: bool,
    progress: Bars,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write the set into `folder` and return what is in it.

    classes  a HICO-DET annotation file whose classes are taken; None: those in the package `consnet`
    text     an encoder ("minilm", a folder, a hub id), or a file of features that are made already

    Raises ValueError for bad numbers, a missing package or file, and a folder that is not empty, before
    anything is drawn.
    """
    home = check_folder(folder, overwrite)
    if min(images, test_images) < 1:
        raise ValueError(f"--images {images} and --test-images {test_images}: at least 1 each")
    table: ClassTable = from_consnet() if classes is None else from_hicodet(classes)
    with progress() as tell:
        tell("text", 0, 1)
        if text.endswith(".safetensors"):
            features = load_features(text, table)
        else:
            features = features_of(table, TextEncoder.open(text), progress=say)
        tell("text", 1, 1)
        tell("draw", 0, 1)
        code = verb_features(features.classes, features.actions, table)
        write(home, table, code, images, test_images, seed=seed, options=options, overwrite=overwrite)
        save_features(features, home / TEXT)
        with writing_file(home / SETTINGS) as beside:
            beside.write_text(json.dumps(fitting(images), indent=1), encoding="utf-8")
        tell("draw", 1, 1)
    return {
        "out": str(home),
        "images": images,
        "test_images": test_images,
        "interactions": len(table),
        "verbs": len(table.verbs),
        "objects": len(table.objects),
        "text": features.source,
        "width": features.width,
        "seed": seed,
    }


def fitting(images: int) -> dict[str, Any]:
    """The options for so many images: a small set needs more epochs."""
    epochs = min(max(_STEPS * FITTING["batch_size"] // images, _LEAST), _MOST)
    return {**FITTING, "epochs": epochs, "drop": epochs * 5 // 6}


def settings_file(data: str | Path, given: str | None) -> Path | None:
    """The file of options: the one that is given, else settings.json of the data folder, if it has one."""
    beside = Path(data) / SETTINGS
    return Path(given) if given is not None else beside if beside.is_file() else None
