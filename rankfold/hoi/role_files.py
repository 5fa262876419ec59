"""Role ground truth from V-COCO's own files and COCO's boxes.

    vcoco_test.json     a list of actions: action_name, role_name ("agent", then its objects), and for each
                        person image_id, ann_id, label (1: does it) and role_object_id (one after the other
                        all people's ids of each role, the agent's first; 0: no object)
    instances_*.json    COCO's: images (id, file_name, width, height), annotations (id, image_id, bbox, area,
                        category_id) and categories

A role is called by its action and object ("eat obj"). A person whom COCO has and V-COCO has not is unknown.
Boxes are cut at the border, and annotations without an area are left out, as in the data set's own evaluator.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rankfold.hoi.classes import PERSON, content
from rankfold.hoi.role import Doers, Roles

_FIELDS = ("action_name", "role_name", "image_id", "ann_id", "label", "role_object_id")


def read_roles(
    actions: str | os.PathLike[str] | list[Any], instances: str | os.PathLike[str] | Mapping[str, Any]
) -> Roles:
    """Roles of all images that `actions` (V-COCO; a path, or its content) names, with boxes of `instances`.

    Actions without an object (only an agent) have no role. ValueError names the file, and the action or the
    annotation that is wrong: a field that is missing, lists that differ in length, an unknown id.
    """
    where, listed = _actions(actions)
    place, coco = content(instances, "COCO's instances")
    boxes = _boxes(coco, place)
    sizes = {image["id"]: image for image in coco["images"]}
    person = next((c["id"] for c in coco["categories"] if c["name"] == PERSON), None)
    names: list[str] = []
    does: dict[int, list[tuple[int, int, int]]] = {}  # image -> (annotation, role, object's annotation or 0)
    known: set[int] = set()
    images: dict[int, None] = {}
    for held in listed:
        people, label = len(held["ann_id"]), held["label"]
        ids = [
            held["role_object_id"][i : i + people] for i in range(0, people * len(held["role_name"]), people)
        ]
        known.update(held["ann_id"])
        images.update(dict.fromkeys(held["image_id"]))
        for kind, objects in zip(held["role_name"][1:], ids[1:], strict=True):
            names.append(f"{held['action_name']} {kind}")
            for i, thing in enumerate(objects):
                if label[i] == 1:
                    does.setdefault(held["image_id"][i], []).append(
                        (held["ann_id"][i], len(names) - 1, thing)
                    )
    scenes = []
    of: dict[int, list[int]] = {}
    for annotation, (image, category, _) in boxes.items():
        if category == person:
            of.setdefault(image, []).append(annotation)
    for image in images:
        if image not in sizes:
            raise ValueError(f"{place} has no image {image}, which {where} annotates")
        people = of.get(image, [])
        at = {annotation: i for i, annotation in enumerate(people)}
        rows = []
        for annotation, role, thing in does.get(image, []):
            if thing and thing not in boxes:
                raise ValueError(f"{where}: object {thing} of {names[role]!r} has no box in {place}")
            if annotation in at:  # else a person whose box has no area
                rows.append((at[annotation], role, boxes[thing][2] if thing else [torch.nan] * 4))
        scenes.append(
            Doers(
                sizes[image]["file_name"],
                torch.tensor([boxes[a][2] for a in people], dtype=torch.float32).reshape(-1, 4),
                torch.tensor([a not in known for a in people], dtype=torch.bool),
                torch.tensor([row[0] for row in rows], dtype=torch.int64),
                torch.tensor([row[1] for row in rows], dtype=torch.int64),
                torch.tensor([row[2] for row in rows], dtype=torch.float32).reshape(-1, 4),
            )
        )
    return Roles(tuple(names), scenes, where)


def _actions(source: str | os.PathLike[str] | list[Any]) -> tuple[str, list[Any]]:
    """(how errors call it, the actions), whose lists go together."""
    where, listed = "V-COCO's actions", source
    if not isinstance(listed, list):
        where = str(source)
        try:
            listed = json.loads(Path(where).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{where} cannot be read as JSON: {error}") from error
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{where} is no list of actions: another version of V-COCO's own annotations?")
    for i, held in enumerate(listed):
        if not isinstance(held, Mapping) or any(key not in held for key in _FIELDS):
            raise ValueError(f"{where}: action {i} must hold {', '.join(_FIELDS)}")
        n, roles = len(held["ann_id"]), len(held["role_name"])
        sizes = [len(held[key]) for key in ("image_id", "label", "role_object_id")]
        if sizes != [n, n, n * roles]:
            raise ValueError(
                f"{where}: action {held['action_name']!r} has {n} people and {roles} roles, but {sizes[0]} "
                f"image_id, {sizes[1]} label and {sizes[2]} role_object_id"
            )
    return where, listed


def _boxes(coco: Mapping[str, Any], where: str) -> dict[int, tuple[int, int, list[float]]]:
    """{annotation id: (image id, category id, corners)} of COCO's annotations that have an area."""
    for key in ("images", "annotations", "categories"):
        if not isinstance(coco.get(key), list):
            raise ValueError(f"{where}: {key!r} must be a list; these are not COCO's instances")
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    found = {}
    for held in coco["annotations"]:
        if held["image_id"] not in sizes:
            raise ValueError(
                f"{where}: annotation {held['id']} is of image {held['image_id']}, which is missing"
            )
        x, y, w, h = held["bbox"]
        across, down = sizes[held["image_id"]]
        low = [min(max(x, 0.0), across), min(max(y, 0.0), down)]
        high = [min(max(x + w, 0.0), across), min(max(y + h, 0.0), down)]
        # More than one pixel a side, as the evaluator of the data set asks for.
        if held["area"] > 0 and high[0] - low[0] > 1 and high[1] - low[1] > 1:
            found[held["id"]] = (held["image_id"], held["category_id"], [*low, *high])
    return found
