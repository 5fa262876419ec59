"""HICO-DET's annotation files (instances_train2015.json, instances_test2015.json), read and written.

    annotation      a list of images: boxes_h, boxes_o, and per pair hoi, object, verb (ids)
    filenames, size the images' names and [width, height]
    empty           the places in `annotation` of images without a pair
    verbs, objects, correspondence     the classes: rows [interaction, object, verb]

Boxes are 1-based pixel corners: x1 and y1 are shifted by one on reading, x2 and y2 are not, so that
(1, 1, w, h) is the whole image, (0, 0, w, h).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rankfold.atomic import writing_file
from rankfold.hoi.annotations import (
    Annotations,
    Bad,
    Scene,
    check_bad,
    checked,
    different,
    numbers,
    read_boxes,
    same_lengths,
)
from rankfold.hoi.classes import ClassTable, content, from_hicodet

_KEYS = ("annotation", "filenames", "size", "verbs", "objects", "correspondence")


def read_hicodet(
    source: str | os.PathLike[str] | Mapping[str, Any],
    table: ClassTable | None = None,
    images: str | os.PathLike[str] | None = None,
    bad: Bad = "raise",
) -> Annotations:
    """The annotations of a HICO-DET file (a path, or its content), images without a pair included.

    `table`: the classes that are expected, else those of the file. `images`: the folder of the images, to
    check that all are there; none is opened. `bad`: what happens to a pair whose box leaves the image or has
    no area ("raise", "clip", "drop"). ValueError names the file, the image and the field.
    """
    check_bad(bad)
    where, body = content(source, "HICO-DET annotations")
    if missing := [key for key in _KEYS if key not in body]:
        other = "; these are V-COCO annotations" if "action_to_object" in body else ""
        raise ValueError(
            f"{where} has no {missing[0]!r}: another version of the HICO-DET annotations?{other}"
        )
    own = from_hicodet(body, where=where)
    if table is None:
        table = own
    else:
        table.check_same(own, where)
    same_lengths({key: body[key] for key in ("annotation", "filenames", "size")}, where)
    different(body["filenames"], where)
    rows = zip(body["filenames"], body["size"], body["annotation"], strict=True)
    scenes = [_scene(f"{where}, image {name!r}", name, size, held, table) for name, size, held in rows]
    for place in body.get("empty", []):
        if type(place) is not int or not 0 <= place < len(scenes) or body["annotation"][place]["hoi"]:
            raise ValueError(f"{where}: 'empty' holds {place!r}, which is no image without a pair")
    made = Annotations(table, checked(scenes, bad, where), where)
    if images is not None:
        made.check_images(images)
    return made


def _scene(where: str, filename: str, size: Any, held: Any, table: ClassTable) -> Scene:
    if not isinstance(size, list) or len(size) != 2 or not all(type(x) is int and x > 0 for x in size):
        raise ValueError(f"{where}: 'size' must be [width, height] in whole pixels, got {size!r}")
    keys = ("boxes_h", "boxes_o", "hoi", "object", "verb")
    if not isinstance(held, Mapping) or any(key not in held for key in keys):
        raise ValueError(f"{where}: the annotation of an image holds {', '.join(keys)}")
    same_lengths({key: held[key] for key in keys}, where)
    ids = numbers(held["hoi"], len(table), f"{where}: 'hoi'")
    for place, (i, thing, verb) in enumerate(zip(ids, held["object"], held["verb"], strict=True)):
        if table.interactions[i] != (verb, thing):
            raise ValueError(
                f"{where}: pair {place} has hoi {i} (verb, object) = {table.interactions[i]}, but says "
                f"{(verb, thing)}"
            )
    return Scene(
        filename,
        (size[0], size[1]),
        read_boxes(held["boxes_h"], 1, f"{where}: 'boxes_h'"),
        read_boxes(held["boxes_o"], 1, f"{where}: 'boxes_o'"),
        torch.tensor(ids, dtype=torch.int64),
    )


def write_hicodet(path: str | os.PathLike[str], annotations: Annotations) -> Path:
    """Write `annotations` as a HICO-DET file, whole or not at all; `read_hicodet` gives the same back."""
    path, table = Path(path), annotations.table
    body = {
        "annotation": [_entry(scene, table) for scene in annotations.scenes],
        "filenames": [scene.filename for scene in annotations.scenes],
        "empty": [place for place, scene in enumerate(annotations.scenes) if not len(scene)],
        "objects": list(table.objects),
        "verbs": list(table.verbs),
        "correspondence": [[i, thing, verb] for i, (verb, thing) in enumerate(table.interactions)],
        "size": [list(scene.size) for scene in annotations.scenes],
        "rare": sorted(table.rare),
        "non_rare": sorted(set(range(len(table))) - table.rare),
    }
    with writing_file(path) as beside:
        beside.write_text(json.dumps(body), encoding="utf-8")
    return path


def _entry(scene: Scene, table: ClassTable) -> dict[str, list]:
    ids = scene.interactions.tolist()
    shift = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    return {
        "boxes_h": (scene.boxes_h.double() + shift).tolist(),
        "boxes_o": (scene.boxes_o.double() + shift).tolist(),
        "hoi": ids,
        "object": [table.interactions[i][1] for i in ids],
        "verb": [table.interactions[i][0] for i in ids],
    }
