"""Mean average precision of human-object interactions, by the protocol of HICO-DET, for whole test sets.

    overlap of a detection and a ground truth = min(IoU of the humans, IoU of the objects)

A detection (pair of boxes, interaction, score) belongs to the ground truth of its image and interaction that
it overlaps most. It can be true only if that overlap is above 0.5, strictly. Of the detections that belong to
one ground truth the one with the highest score is true, the others are false. Recall counts all the ground
truth of a class. Ties are settled by order: among ground truths the one annotated first, among equal scores
the image that stands first in the annotations, and in it the row that stands first in its predictions.

Nothing loops over images or classes: detections are joined with the ground truth by one key for image and
interaction, some hundred thousand at a time, and only class, score and verdict of each are kept.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rankfold.hoi.annotations import Annotations, Scene
from rankfold.hoi.boxes import pair_iou
from rankfold.hoi.precision import average_precisions, check_points
from rankfold.hoi.scores import Scores, summarise

if TYPE_CHECKING:
    from rankfold.hoi.classes import ClassTable
    from rankfold.hoi.splits import Split

OVERLAP = 0.5  # a true detection overlaps its ground truth by more than this
_ROWS, _IMAGES = 400_000, 2_000  # at most so many detections, and images, are joined at a time
_MEETINGS = 1_000_000  # pairs of a detection and a ground truth compared at a time: 8 numbers of 8 bytes each


@dataclass(frozen=True, eq=False)
class Predicted:
    """What was predicted in one image: m triplets, one row for each pair and interaction.

    boxes_h, boxes_o  (m, 4) float32, corners x1 y1 x2 y2 in pixels of the image, 0-based
    interactions      (m,) int64 interaction ids      scores  (m,) float32, higher is surer
    """

    filename: str
    boxes_h: Tensor
    boxes_o: Tensor
    interactions: Tensor
    scores: Tensor

    def __len__(self) -> int:
        return len(self.scores)

    def check(self, interactions: int) -> None:
        """Raises ValueError, naming the image, for other shapes, ids outside 0..interactions-1, or numbers
        that are not finite."""
        m = len(self.scores)
        shapes = [tuple(t.shape) for t in (self.boxes_h, self.boxes_o, self.interactions, self.scores)]
        if shapes != [(m, 4), (m, 4), (m,), (m,)]:
            raise ValueError(
                f"{self.filename}: predictions have shapes boxes_h {shapes[0]}, boxes_o {shapes[1]}, "
                f"interactions {shapes[2]}, scores {shapes[3]}; they must be (m, 4), (m, 4), (m,), (m,)"
            )
        if self.interactions.is_floating_point():
            raise ValueError(f"{self.filename}: interactions are {self.interactions.dtype}, must be integers")
        if not m:
            return
        low, high = self.interactions.aminmax()
        if low < 0 or high >= interactions:
            wrong = int(low if low < 0 else high)
            raise ValueError(
                f"{self.filename}: predicted interaction {wrong} is not one of 0..{interactions - 1}: "
                "were the predictions made with another class table?"
            )
        for name in ("boxes_h", "boxes_o", "scores"):
            values = getattr(self, name)
            if math.isfinite(values.sum()):  # in one pass; a sum may overflow, so the rest decides
                continue
            for row in (~values.isfinite().reshape(m, -1).all(1)).nonzero().flatten().tolist():
                raise ValueError(f"{self.filename}: {name}[{row}] = {values[row].tolist()} is not finite")


def evaluate(
    predictions: Iterable[Predicted],
    annotations: Annotations,
    split: Split | None = None,
    *,
    points: str = "11",
    detector_saw: Collection[int] | None = None,
) -> Scores:
    """AP of every interaction and the means that papers report, of `predictions` for all of `annotations`.

    predictions   one per image, in any order; may be a generator, whose items are not kept. An image without
                  ground truth may be left out; what is predicted in it counts as false
    split         whose unseen list separates seen from unseen; it hides nothing here
    points        "11" (the protocol) or "all", see `rankfold.hoi.precision`
    detector_saw  object ids the detector was trained on, for the note of `Scores.detector`

    Raises ValueError for predictions that `Predicted.check` refuses, of an image twice or that is not
    annotated, for annotated images without predictions, and a split of another table.
    """
    check_points(points)
    table, total = annotations.table, len(annotations.table)
    if split is not None and max(split.unseen, default=0) >= total:
        raise ValueError(
            f"the unseen list of split {split.name} holds interaction {max(split.unseen)}, "
            f"but the annotations have {total} interactions"
        )
    place = {scene.filename: at for at, scene in enumerate(annotations.scenes)}
    if len(place) < len(annotations.scenes):
        raise ValueError(f"the annotations name {len(annotations.scenes) - len(place)} images twice")
    truth = Truth(annotations)
    done: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    given: dict[str, int] = {}
    batch: list[Predicted] = []
    waiting = 0
    for one in predictions:
        if one.filename in given:
            raise ValueError(f"{one.filename} is predicted twice")
        if one.filename not in place:
            raise ValueError(
                f"predictions for {one.filename}, which is not among the {len(place)} annotated images"
            )
        one.check(total)
        given[one.filename] = len(given)
        batch.append(one)
        waiting += len(one)
        if waiting >= _ROWS or len(batch) >= _IMAGES:
            done.append(_match(batch, place, truth))
            batch, waiting = [], 0
    done.append(_match(batch, place, truth))
    absent = [s.filename for s in annotations.scenes if len(s.interactions) and s.filename not in given]
    if absent:
        raise ValueError(
            f"no predictions for {len(absent)} of {len(place)} annotated images, the first is {absent[0]}; "
            "give an empty Predicted where nothing was found, or evaluate on fewer annotations"
        )
    image, classes, scores, found = (torch.cat(parts) for parts in zip(*done, strict=True))
    del done
    hits = found >= 0
    if (image[1:] < image[:-1]).any():  # ties are settled in the order of the annotations
        order = torch.sort(image, stable=True).indices
        classes, scores, hits = classes[order], scores[order], hits[order]
    return summarise(
        average_precisions(classes, scores, hits, truth.count, points),
        truth.count,
        torch.bincount(classes[hits].long(), minlength=total),
        torch.bincount(classes.long(), minlength=total),
        images=len(place),
        points=points,
        table=table,
        split=split,
        detector_saw=detector_saw,
    )


def matches(one: Predicted, scene: Scene, table: ClassTable) -> Tensor:
    """(m,) int64: the pair of `scene` that each prediction of its image is the true detection of, -1 for the
    false ones. Raises ValueError as `Predicted.check`, and for another image."""
    if one.filename != scene.filename:
        raise ValueError(f"predictions of {one.filename} go with the annotations of {scene.filename}")
    one.check(len(table))
    truth = Truth(Annotations(table, [scene], scene.filename))
    found = _match([one], {scene.filename: 0}, truth)[3].long()
    return torch.where(found >= 0, truth.order[found.clamp(min=0)], -1) if len(scene) else found


class Truth:
    """Ground truth of a set, sorted by key = image · N + interaction; stable, so first annotated is first.

    keys, start, size (k,) int64: the keys there are, and where and how many pairs each has
    order (T,) int64: where each of these pairs stands in the annotations
    boxes (T, 8) float64: human and object box of each pair     count (N,) int64 pairs of each interaction
    """

    def __init__(self, annotations: Annotations) -> None:
        scenes, self.interactions = annotations.scenes, len(annotations.table)
        sizes = torch.tensor([len(scene.interactions) for scene in scenes], dtype=torch.int64)
        image = torch.arange(len(scenes)).repeat_interleave(sizes)
        interaction = torch.cat([torch.zeros(0, dtype=torch.int64), *(s.interactions for s in scenes)])
        boxes = [torch.cat([s.boxes_h, s.boxes_o], 1).double() for s in scenes]
        key, self.order = torch.sort(image * self.interactions + interaction, stable=True)
        self.keys, self.size = torch.unique_consecutive(key, return_counts=True)
        self.start = self.size.cumsum(0) - self.size
        self.boxes = torch.cat([torch.zeros(0, 8, dtype=torch.float64), *boxes])[self.order]
        self.count = torch.bincount(interaction, minlength=self.interactions)

    def groups(self, images: Tensor) -> Tensor:
        """(b, N) int64: where in `keys` each interaction of each image (b,) is, -1 where it has no pair."""
        n = self.interactions
        table = torch.full((len(images), n), -1)
        low = torch.searchsorted(self.keys, images * n).tolist()
        high = torch.searchsorted(self.keys, (images + 1) * n).tolist()
        for row, (start, end) in enumerate(zip(low, high, strict=True)):
            table[row, self.keys[start:end] % n] = torch.arange(start, end)
        return table


def _match(
    batch: list[Predicted], place: dict[str, int], truth: Truth
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(image int32, interaction int16 or int32, score float32, found int32) of all rows of whole images.

    found  the pair of `truth` that a row is the true detection of, -1 where it is false."""
    sizes = torch.tensor([len(one) for one in batch], dtype=torch.int64)
    owner = torch.repeat_interleave(sizes)
    places = torch.tensor([place[one.filename] for one in batch], dtype=torch.int64)
    interaction = torch.cat([torch.zeros(0, dtype=torch.int64), *(p.interactions for p in batch)])
    scores = torch.cat([torch.zeros(0), *(p.scores.float() for p in batch)])
    found = torch.full((len(scores),), -1, dtype=torch.int32)
    group = truth.groups(places)[owner, interaction]
    rows = (group >= 0).nonzero().flatten()
    if len(rows):
        starts = sizes.cumsum(0) - sizes
        inner = rows - starts[owner[rows]]
        wanted = torch.bincount(owner[rows], minlength=len(batch)).tolist()
        parts = zip(batch, inner.split(wanted), strict=True)
        boxes = torch.cat([torch.cat([p.boxes_h[i], p.boxes_o[i]], 1).double() for p, i in parts])
        owned = _belongs(boxes, group[rows], truth)
        near = owned >= 0
        rows, owned = rows[near], owned[near]
        # By falling score, then by ground truth, both stable: the first of each ground truth is its winner.
        order = torch.sort(scores[rows], descending=True, stable=True).indices
        order = order[torch.sort(owned[order], stable=True).indices]
        ranked = owned[order]
        first = torch.ones_like(ranked, dtype=torch.bool)
        first[1:] = ranked[1:] != ranked[:-1]
        found[rows[order[first]]] = ranked[first].int()
    dtype = torch.int16 if truth.interactions < 2**15 else torch.int32
    return places[owner].int(), interaction.to(dtype), scores, found


def _belongs(boxes: Tensor, group: Tensor, truth: Truth) -> Tensor:
    """(n,) int64: the pair of ground truth that each detection belongs to, -1 where it overlaps none enough.

    boxes (n, 8) float64 and group (n,), the index into `truth.keys`: all that a detection can belong to."""
    found = []
    size = truth.size[group]
    last = size.cumsum(0)
    cuts = torch.searchsorted(last, torch.arange(0, int(last[-1]), _MEETINGS), right=True)
    for low, high in zip(cuts.tolist(), [*cuts[1:].tolist(), len(group)], strict=True):
        some, counts = group[low:high], size[low:high]
        if not len(some):
            continue
        row = torch.arange(len(some)).repeat_interleave(counts)
        step = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
        pair = truth.start[some][row] + step
        mine, theirs = (
            each.view(-1, 2, 1, 4).unbind(1) for each in (boxes[low:high][row], truth.boxes[pair])
        )
        overlap = pair_iou(*mine, *theirs).flatten()
        best = torch.zeros(len(some), dtype=torch.float64).scatter_reduce(0, row, overlap, "amax")
        tops = overlap == best[row]  # several where they tie: the smallest index wins
        owner = torch.full((len(some),), len(truth.boxes)).scatter_reduce(0, row[tops], pair[tops], "amin")
        found.append(torch.where(best > OVERLAP, owner, -1))
    return torch.cat(found)
