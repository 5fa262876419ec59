"""Detections of one image: boxes, scores, object ids and query vectors, from a detector's outputs.

    softmax over the objects and "no object" → the best object of each query → NMS per object → of the humans
    and of the rest, those that score at least 0.2, but at least 3 and at most 15 of each

Humans come first, then the rest, each by falling score: that order is what pairs are built on. An image may
have no human, or one detection: it then has no pair. Detectors count classes their own way; `columns_of`
maps them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rankfold.hoi.annotations import Scene
from rankfold.hoi.boxes import clip, nms, valid
from rankfold.hoi.classes import ClassTable, plain

QUERY_WIDTH = 256  # of a DETR decoder's states

# COCO's 80 object categories in the order of their ids, which run from 1 to 90 with ten left out.
COCO = tuple(
    name.strip()
    for name in (
        "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, "
        "stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, "
        "giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, "
        "baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, "
        "fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, "
        "donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, "
        "keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, "
        "teddy bear, hair drier, toothbrush"
    ).split(",")
)
COCO_IDS = tuple(i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))


@dataclass(frozen=True)
class Selection:
    """Which detections are kept.

    score   those that score at least this …
    least   … but at least so many humans and so many others (the best-scored fill up), if there are
    most    … and at most so many of each
    nms     IoU above which the lower-scored of two boxes of one object falls
    """

    score: float = 0.2
    least: int = 3
    most: int = 15
    nms: float = 0.5

    def __post_init__(self) -> None:
        if not (0 <= self.score <= 1 and 0 <= self.nms <= 1):
            raise ValueError(f"score {self.score} and nms {self.nms} must lie in 0 … 1")
        if not (0 <= self.least <= self.most and self.most >= 1):
            raise ValueError(f"least {self.least} and most {self.most}: 0 <= least <= most, and most >= 1")

    def to_json(self) -> dict[str, Any]:
        """The fields, for JSON; `Selection(**fields)` reads them back."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Detections:
    """What a detector found in one image: humans first, then others, each by falling score.

    boxes   (n, 4) float32, pixels of the original image, from 0
    scores  (n,) float32 in 0 … 1
    labels  (n,) int64 object ids
    queries (n, d) float32, the detector's state of each box (DETR: d = 256)
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    queries: Tensor

    def __len__(self) -> int:
        return len(self.boxes)

    def take(self, rows: Tensor) -> Detections:
        """The detections of `rows` (a bool mask, or indices), in that order."""
        return Detections(self.boxes[rows], self.scores[rows], self.labels[rows], self.queries[rows])

    def ordered(self, human: int) -> Detections:
        """Humans first (object id `human`), then others, each by falling score."""
        by_score = self.scores.argsort(descending=True, stable=True)
        return self.take(by_score[(self.labels[by_score] != human).int().argsort(stable=True)])

    def check(self, table: ClassTable, where: str) -> Detections:
        """Itself. ValueError, beginning with `where`, for what does not fit together or into `table`."""
        n = len(self)
        expected = {"boxes": (n, 4), "scores": (n,), "labels": (n,), "queries": (n, self.queries.shape[-1])}
        for name, shape in expected.items():
            if tuple(held := getattr(self, name).shape) != shape:
                raise ValueError(f"{where}: {name} have shape {tuple(held)}, expected {shape}")
            if not getattr(self, name).isfinite().all():
                raise ValueError(f"{where}: {name} hold something that is no number")
        if n and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(table.objects):
            raise ValueError(
                f"{where}: object ids {int(self.labels.min())} … {int(self.labels.max())}, but there are "
                f"{len(table.objects)} objects"
            )
        if not valid(self.boxes).all():
            row = int((~valid(self.boxes)).nonzero()[0])
            raise ValueError(f"{where}: box {row}, {self.boxes[row].tolist()}, has no area")
        if not ((self.scores >= 0) & (self.scores <= 1)).all():
            raise ValueError(
                f"{where}: scores go from {self.scores.min():.3g} to {self.scores.max():.3g}, not in 0 … 1"
            )
        human = (self.labels == table.human).tolist()
        if human != sorted(human, reverse=True):
            raise ValueError(f"{where}: humans must come before the other detections")
        return self


def none_found(width: int = QUERY_WIDTH) -> Detections:
    """The detections of an image in which nothing was found."""
    empty = torch.zeros(0)
    return Detections(empty.reshape(0, 4), empty, empty.long(), empty.reshape(0, width))


def select(found: Detections, human: int, selection: Selection) -> Detections:
    """`found`, in any order, after NMS per object and the 3 … 15 rule (`Selection`); `human` is an object
    id."""
    found = found.take(nms(found.boxes, found.scores, found.labels, selection.nms)).ordered(human)
    humans = found.labels == human
    kept = []
    for rows in (humans.nonzero().flatten(), (~humans).nonzero().flatten()):
        passing = int((found.scores[rows] >= selection.score).sum())
        kept.append(rows[: min(max(passing, selection.least), selection.most)])
    return found.take(torch.cat(kept))


# --- a detector's columns ----------------------------------------------------------------------------------


def columns_of(width: int, table: ClassTable, names: Mapping[int, str] | None = None) -> Tensor:
    """(O + 1,) int64: the logit column of each object id, then that of "no object"; -1 for an object that the
    detector does not know.

    `names`: what the detector calls its columns, where it says; the last column is "no object". Without names
    the width tells: 92 columns are COCO's ids 0 … 90, and O + 1 columns are the table's own order. ValueError
    for another width, and for names without "person".
    """
    columns: dict[str, int] = {}
    if names is not None and any(plain(name).lower() == "person" for name in names.values()):
        columns = {plain(name).lower(): column for column, name in names.items() if column < width - 1}
    elif width == COCO_IDS[-1] + 2:
        columns = dict(zip(COCO, COCO_IDS, strict=True))
    elif width == len(table.objects) + 1:
        columns = {plain(name).lower(): place for place, name in enumerate(table.objects)}
    else:
        raise ValueError(
            f"the detector has {width} columns and does not say what they are: known are "
            f"{COCO_IDS[-1] + 2} (COCO's ids and no object) and {len(table.objects) + 1} (the table's "
            f"objects and no object). Pass their names"
        )
    found = [columns.get(plain(name).lower(), -1) for name in table.objects]
    if found[table.human] < 0:
        raise ValueError("the detector knows no 'person': there would be no pair")
    return torch.tensor([*found, width - 1])


def from_outputs(
    logits: Tensor,
    boxes: Tensor,
    queries: Tensor,
    size: tuple[int, int],
    columns: Tensor,
    human: int,
    selection: Selection | None = None,
) -> Detections:
    """The detections of one image.

    logits   (Q, C) of Q queries, in the detector's columns
    boxes    (Q, 4) centre, width and height relative to the image
    queries  (Q, d), the last state of each query
    size     (width, height) of the original image
    columns  (O + 1,), as `columns_of` gives them
    human    the object id of "person"

    ValueError for shapes that do not fit, and for outputs that are not numbers.
    """
    if logits.ndim != 2 or boxes.shape != (len(logits), 4) or len(queries) != len(logits):
        raise ValueError(
            f"logits {tuple(logits.shape)}, boxes {tuple(boxes.shape)} and queries {tuple(queries.shape)} "
            f"must be (Q, columns), (Q, 4) and (Q, width)"
        )
    if int(columns[-1]) != logits.shape[1] - 1:
        raise ValueError(
            f"logits have {logits.shape[1]} columns, but the map is for {int(columns[-1]) + 1}: "
            f"`columns_of({logits.shape[1]}, table)` makes one, where that width is known"
        )
    logits, boxes, queries = (x.detach().float().cpu() for x in (logits, boxes, queries))
    if not (logits.isfinite().all() and boxes.isfinite().all() and queries.isfinite().all()):
        raise ValueError("the detector's outputs hold something that is no number")
    ours = logits[:, columns.clamp(min=0)].masked_fill(columns < 0, float("-inf"))
    scores, labels = ours.softmax(-1)[:, :-1].max(-1)
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    corners = torch.cat([centre - half, centre + half], -1) * torch.tensor([*size, *size])
    found = Detections(clip(corners, size), scores, labels, queries)
    return select(found.take(valid(found.boxes)), human, selection or Selection())


# --- detections that the annotations give ------------------------------------------------------------------


def oracle(
    scene: Scene,
    table: ClassTable,
    jitter: float = 0.0,
    seed: int = 0,
    *,
    width: int = QUERY_WIDTH,
    noise: float = 0.1,
    extra: tuple[Tensor, Tensor] | None = None,
) -> Detections:
    """Detections as a good detector would give them, made from the annotated boxes: for synthetic scenes, for
    tests, and to measure a model without the faults of a detector.

    Corners move by a normal of `jitter` times the side of their box; scores are uniform in 0.6 … 1 (1 with no
    jitter). A query vector is a fixed code of the object id plus a normal of `noise`. `extra`: more boxes
    (k, 4) and object ids (k,), of things in the image that no pair has. The same for the same scene and seed.
    """
    name = hashlib.sha256(f"{seed}/{scene.filename}".encode()).digest()
    random = torch.Generator().manual_seed(int.from_bytes(name[:7], "little"))
    boxes = torch.cat([scene.boxes_h, scene.boxes_o])
    labels = torch.cat(
        [torch.full_like(scene.interactions, table.human), table.object_of[scene.interactions]]
    )
    if extra is not None:
        boxes, labels = torch.cat([boxes, extra[0].float()]), torch.cat([labels, extra[1].long()])
    if not len(boxes):
        return none_found(width)
    both = torch.cat([boxes.double(), labels[:, None].double()], 1).unique(dim=0)  # one box of many pairs
    boxes, labels = both[:, :4].float(), both[:, 4].long()
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    moved = boxes + jitter * sides * torch.randn(boxes.shape, generator=random)
    moved = clip(moved, scene.size) if scene.size != (0, 0) else moved.clamp(min=0)
    boxes = torch.where(valid(moved)[:, None], moved, boxes)
    scores = torch.ones(len(boxes))
    if jitter:
        scores = 0.6 + 0.4 * torch.rand(len(boxes), generator=random)
    codes = torch.randn(len(table.objects), width, generator=torch.Generator().manual_seed(1))
    queries = codes[labels] + noise * torch.randn(len(boxes), width, generator=random)
    return Detections(boxes, scores, labels, queries).ordered(table.human)
