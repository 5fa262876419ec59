"""V-COCO's annotations as published with UPT (instances_vcoco_trainval.json, instances_vcoco_test.json).

    annotations        a list of images: file_name, boxes_h, boxes_o, and per pair actions, objects (ids)
    classes, objects   the names; object 0 is "background"
    images             COCO's image ids
    action_to_object   the objects that each action takes

Boxes are COCO's, pixel corners from 0. The files hold no image sizes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

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
from rankfold.hoi.classes import ClassTable, content, from_vcoco

_KEYS = ("annotations", "classes", "objects", "images", "action_to_object")


def read_vcoco(
    source: str | os.PathLike[str] | Mapping[str, Any],
    table: ClassTable | None = None,
    images: str | os.PathLike[str] | None = None,
    bad: Bad = "raise",
) -> Annotations:
    """The annotations of a V-COCO file (a path, or its content), images without a pair included.

    `images`: the folder of the images. The sizes are then read from the files' headers, which decodes none;
    without it sizes are (0, 0) and only negative corners count as outside. `table` and `bad` as in
    `read_hicodet`. ValueError names the file, the image and the field.
    """
    check_bad(bad)
    where, body = content(source, "V-COCO annotations")
    if missing := [key for key in _KEYS if key not in body]:
        other = "; these are HICO-DET annotations" if "correspondence" in body else ""
        raise ValueError(f"{where} has no {missing[0]!r}: another version of the V-COCO annotations?{other}")
    own = from_vcoco(body, where)
    if table is None:
        table = own
    else:
        table.check_same(own, where)
    same_lengths({key: body[key] for key in ("annotations", "images")}, where)
    scenes = [_scene(where, place, held, table) for place, held in enumerate(body["annotations"])]
    different((scene.filename for scene in scenes), where)
    made = Annotations(table, scenes, where)
    if images is not None:
        folder = made.check_images(images)
        scenes = [_sized(scene, folder) for scene in scenes]
    return Annotations(table, checked(scenes, bad, where), where)


def _scene(where: str, place: int, held: Any, table: ClassTable) -> Scene:
    keys = ("file_name", "boxes_h", "boxes_o", "actions", "objects")
    if not isinstance(held, Mapping) or any(key not in held for key in keys):
        raise ValueError(f"{where}: annotations[{place}] must hold {', '.join(keys)}")
    where = f"{where}, image {held['file_name']!r}"
    same_lengths({key: held[key] for key in keys[1:]}, where)
    verbs = numbers(held["actions"], len(table.verbs), f"{where}: 'actions'")
    things = numbers(held["objects"], len(table.objects) + 1, f"{where}: 'objects'")
    ids = []
    for pair, (verb, thing) in enumerate(zip(verbs, things, strict=True)):
        i = int(table.interaction_at[thing - 1, verb]) if thing else -1
        if i < 0:
            name = "background" if not thing else table.objects[thing - 1]
            raise ValueError(f"{where}: pair {pair} is ({table.verbs[verb]}, {name}), which is no class here")
        ids.append(i)
    humans, others = (read_boxes(held[key], 0, f"{where}: {key!r}") for key in ("boxes_h", "boxes_o"))
    return Scene(held["file_name"], (0, 0), humans, others, torch.tensor(ids, dtype=torch.int64))


def _sized(scene: Scene, folder: Path) -> Scene:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(folder / scene.filename) as image:  # reads the header; pixels only when asked for
            size = image.size
    except UnidentifiedImageError as error:
        raise ValueError(f"{folder / scene.filename} is no image that can be opened") from error
    return replace(scene, size=size)
