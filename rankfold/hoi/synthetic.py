"""A drawn data set in HICO-DET's format, whose geometry encodes the verb: the whole pipeline runs without a
photo.

The verb decides how human and object stand to each other (`rankfold.hoi.verb_geometry`), colour and shape
tell the object. Frequencies have a long tail, an image has several pairs, and some things belong to none.
What is hard about photos is not here: a score on this set says that the parts work together, and which of
two settings learns what the text knows.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from rankfold.atomic import check_folder, writing
from rankfold.hoi.annotations import Annotations, Scene
from rankfold.hoi.classes import ClassTable
from rankfold.hoi.detection_file import write_detections
from rankfold.hoi.detections import oracle
from rankfold.hoi.hicodet import write_hicodet
from rankfold.hoi.painting import paint
from rankfold.hoi.verb_geometry import LATENTS, boxes_of, verb_latents

_TRIES = 40  # places tried for a pair, of which the one that covers least is taken

SPLITS = ("train", "test")
IMAGES = "hico_20160224_det/images"  # where HICO-DET's archive has them


@dataclass(frozen=True)
class Options:
    """How scenes are made.

    size         (width, height) of the images
    most         pairs of an image: 1 … most, evenly
    noise        standard deviation added to the latents of each pair; verbs differ by about 1
    distractors  chance that an image has one more human without a pair, and the same for an object
    tail         training frequency of the interaction of rank r is proportional to r^-tail, rare classes
    last;
                 a test set has a third of this exponent, and both have every interaction if there are enough
                 pairs
    jitter       of the detections' boxes, as in `oracle`
    """

    size: tuple[int, int] = (160, 120)
    most: int = 3
    noise: float = 0.15
    distractors: float = 0.4
    tail: float = 0.8
    jitter: float = 0.02

    def __post_init__(self) -> None:
        if min(self.size) < 48:
            raise ValueError(
                f"images of {self.size[0]} x {self.size[1]} pixels are too small; at least 48 x 48"
            )
        if self.most < 1 or not 0 <= self.distractors <= 1 or min(self.noise, self.tail, self.jitter) < 0:
            raise ValueError("most >= 1, 0 <= distractors <= 1, and noise, tail, jitter >= 0 are needed")


@dataclass(frozen=True, eq=False)
class Drawn:
    """A scene, and what else is in the image: boxes (k, 4) and object ids (k,) of things without a pair."""

    scene: Scene
    boxes: Tensor
    labels: Tensor


def frequencies(table: ClassTable, total: int, tail: float, chance: random.Random) -> list[int]:
    """`total` interaction ids in random order: r^-tail of the interaction of rank r, rare classes last, and
    each at least once where `total` reaches."""
    order = list(range(len(table)))
    chance.shuffle(order)
    order.sort(key=lambda i: i in table.rare)
    weights = [(rank + 1) ** -tail for rank in range(len(order))]
    once = order if total >= len(order) else []
    share = (total - len(once)) / sum(weights)
    exact = [weight * share for weight in weights]
    counts = [int(x) for x in exact]
    left = total - len(once) - sum(counts)
    for rank in sorted(range(len(order)), key=lambda r: (counts[r] - exact[r], r))[:left]:
        counts[rank] += 1  # largest remainders
    ids = [*once, *(i for i, count in zip(order, counts, strict=True) for _ in range(count))]
    chance.shuffle(ids)
    return ids


def compose(
    table: ClassTable, latents: Tensor, images: int, split: str, seed: int = 0, options: Options | None = None
) -> list[Drawn]:
    """The scenes of one split ("train" or "test"), without drawing them. `latents` (V, 6) of
    `verb_latents`."""
    options = options or Options()
    if latents.shape != (len(table.verbs), LATENTS):
        raise ValueError(f"latents of shape {tuple(latents.shape)}; expected {(len(table.verbs), LATENTS)}")
    if split not in SPLITS or images < 1:
        raise ValueError(f"{images} images of {split!r}: at least 1, of {' or '.join(SPLITS)}")
    chance = random.Random(f"{seed}/{split}")
    counts = [1 + place % options.most for place in range(images)]
    chance.shuffle(counts)
    ids = frequencies(table, sum(counts), options.tail / (1 if split == "train" else 3), chance)
    rows = latents.tolist()
    drawn = []
    for number, count in enumerate(counts, start=1):
        taken, ids = ids[:count], ids[count:]
        drawn.append(_scene(f"HICO_{split}2015_{number:08d}.png", taken, table, rows, options, chance))
    return drawn


def _scene(
    filename: str,
    ids: list[int],
    table: ClassTable,
    latents: list[list[float]],
    options: Options,
    chance: random.Random,
) -> Drawn:
    held: list[tuple[list[int], int]] = []  # every box of the image, and its object id
    pairs: list[tuple[list[int], list[int], int]] = []
    for i in ids:
        verb, thing = table.interactions[i]
        z = [x + options.noise * chance.gauss(0, 1) for x in latents[verb]]
        human, other = _placed(boxes_of(z, options.size), (table.human, thing), held, options.size, chance)
        held += [(human, table.human), (other, thing)]
        pairs.append((human, other, i))
    extra = []
    for thing in (table.human, chance.randrange(len(table.objects))):
        if chance.random() < options.distractors:
            box = boxes_of([chance.gauss(0, 1) for _ in range(LATENTS)], options.size)[thing != table.human]
            [box] = _placed([box], (thing,), held, options.size, chance)
            held.append((box, thing))
            extra.append((box, thing))
    humans, others, labels = (list(column) for column in zip(*pairs, strict=True))
    scene = Scene(
        filename,
        options.size,
        torch.tensor(humans, dtype=torch.float32),
        torch.tensor(others, dtype=torch.float32),
        torch.tensor(labels),
    )
    boxes = torch.tensor([box for box, _ in extra], dtype=torch.float32).reshape(-1, 4)
    return Drawn(scene, boxes, torch.tensor([thing for _, thing in extra], dtype=torch.int64))


def _placed(
    boxes: Sequence[list[float]],
    labels: Sequence[int],
    held: list[tuple[list[int], int]],
    size: tuple[int, int],
    chance: random.Random,
) -> list[list[int]]:
    """`boxes` moved together to whole pixels of the image, where they cover least of what is there; things of
    one kind must not be taken for each other, so covering those counts ten times."""
    low = [min(box[axis] for box in boxes) for axis in (0, 1)]
    high = [max(box[axis + 2] for box in boxes) for axis in (0, 1)]
    best, least = [], math.inf
    for _ in range(_TRIES):
        shift = [
            -low[axis] + chance.random() * max(size[axis] - (high[axis] - low[axis]), 0) for axis in (0, 1)
        ]
        moved = [_whole(box, shift, size) for box in boxes]
        covered = sum(
            _shared(box, other) * (10 if label == kind else 1)
            for box, label in zip(moved, labels, strict=True)
            for other, kind in held
        )
        if covered < least:
            best, least = moved, covered
        if not covered:
            break
    return best


def _whole(box: list[float], shift: list[float], size: tuple[int, int]) -> list[int]:
    """Whole pixels, inside the image, at least four wide and high."""
    made = []
    for axis in (0, 1):
        first = min(max(round(box[axis] + shift[axis]), 0), size[axis] - 4)
        last = max(min(round(box[axis + 2] + shift[axis]), size[axis]), first + 4)
        made.append((first, last))
    return [made[0][0], made[1][0], made[0][1], made[1][1]]


def _shared(a: list[int], b: list[int]) -> float:
    """The area that two boxes share, by that of the smaller one."""
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    if wide <= 0 or high <= 0:
        return 0.0
    return wide * high / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def write(
    folder: str | os.PathLike[str],
    table: ClassTable,
    features: Tensor,
    images: int = 1000,
    test_images: int = 500,
    *,
    seed: int = 0,
    options: Options | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a training and a test set into `folder`, whole or not at all; the same for the same arguments.

        instances_{train,test}2015.json               annotations in HICO-DET's format
        hico_20160224_det/images/{train,test}2015/    PNG images
        detections_{train,test}.safetensors           `oracle` detections, of what has no pair too
        synthetic.json                                the options, the seed and the verbs' latents

    `features` (V, D): what the geometry of each verb is made from, e.g. `verb_features` of text features.
    ValueError for features that do not fit, and for a folder that is not empty, unless `overwrite`.
    """
    folder, options = check_folder(folder, overwrite), options or Options()
    if len(features) != len(table.verbs):
        raise ValueError(f"{len(features)} rows of features for {len(table.verbs)} verbs")
    latents = verb_latents(features, seed)
    drawn = {
        split: compose(table, latents, count, split, seed, options)
        for split, count in zip(SPLITS, (images, test_images), strict=True)
    }
    with writing(folder) as beside:
        for split, scenes in drawn.items():
            name = f"instances_{split}2015.json"
            write_hicodet(beside / name, Annotations(table, [one.scene for one in scenes], name))
            place = beside / IMAGES / f"{split}2015"
            place.mkdir(parents=True)
            for one in scenes:
                paint(one.scene, table, (one.boxes, one.labels)).save(place / one.scene.filename)
            found = [
                (
                    one.scene.filename,
                    options.size,
                    oracle(one.scene, table, options.jitter, seed, extra=extra),
                )
                for one, extra in ((one, (one.boxes, one.labels)) for one in scenes)
            ]
            write_detections(beside / f"detections_{split}.safetensors", found, table, "annotations", None)
        facts = {"seed": seed, **asdict(options), "latents": latents.tolist()}
        (beside / "synthetic.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder
