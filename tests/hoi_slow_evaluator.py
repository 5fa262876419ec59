"""The protocol of HICO-DET in plain Python, by the rule as one would read it out: the slow twin.

For each class: all its detections by falling score; each looks up the ground truth it overlaps most in its
image; it is true if that overlap is above 0.5 and nobody before it took that ground truth. This is the greedy
rule over the whole test set, where `rankfold.hoi.evaluation` picks a winner per ground truth and image. It
shares no code with it: lists, floats and fractions only.
"""

from __future__ import annotations

import math
from typing import Any

Pair = tuple[list[float], list[float]]  # human box, object box


def twin(predictions: Any, annotations: Any, points: str = "11") -> list[float]:
    """AP of every interaction; NaN for one without ground truth."""
    n = len(annotations.table)
    place = {scene.filename: at for at, scene in enumerate(annotations.scenes)}
    truth: list[dict[int, list[Pair]]] = [{} for _ in range(n)]
    for at, scene in enumerate(annotations.scenes):
        rows = zip(scene.boxes_h.tolist(), scene.boxes_o.tolist(), scene.interactions.tolist(), strict=True)
        for human, thing, c in rows:
            truth[c].setdefault(at, []).append((human, thing))
    detected: list[list[tuple[float, int, int, Pair]]] = [[] for _ in range(n)]
    for one in predictions:
        boxes = zip(one.boxes_h.tolist(), one.boxes_o.tolist(), strict=True)
        found = zip(one.interactions.tolist(), one.scores.tolist(), boxes, strict=True)
        for row, (c, score, pair) in enumerate(found):
            detected[c].append((-score, place[one.filename], row, pair))
    return [one_class(truth[c], detected[c], points) for c in range(n)]


def one_class(
    truth: dict[int, list[Pair]], detected: list[tuple[float, int, int, Pair]], points: str
) -> float:
    total = sum(map(len, truth.values()))
    if not total:
        return math.nan
    taken: set[tuple[int, int]] = set()
    hits = []
    for _, image, _, (human, thing) in sorted(detected, key=lambda item: item[:3]):
        best, which = 0.0, -1
        for at, (other_human, other_thing) in enumerate(truth.get(image, ())):
            overlap = min(iou(human, other_human), iou(thing, other_thing))
            if overlap > best:  # the first of equals
                best, which = overlap, at
        good = best > 0.5 and (image, which) not in taken
        hits.append(good)
        if good:
            taken.add((image, which))
    return average(hits, total, points)


def iou(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [max(0.0, x[2] - x[0]) * max(0.0, x[3] - x[1]) for x in (a, b)]
    either = areas[0] + areas[1] - width * height
    return width * height / either if either > 0 else 0.0


def average(hits: list[bool], total: int, points: str) -> float:
    """From the definition: p(t) = the highest precision at any rank with recall >= t."""
    true, curve = 0, []
    for rank, hit in enumerate(hits, 1):
        true += hit
        curve.append((true, true / rank))
    wanted = [(k, 10) for k in range(11)] if points == "11" else [(k, total) for k in range(1, total + 1)]
    heights, best = [], 0.0
    for k, of in reversed(wanted):
        while curve and curve[-1][0] * of >= k * total:
            best = max(best, curve.pop()[1])
        heights.append(best)
    return sum(heights) / len(heights)


def role_twin(predictions: Any, roles: Any, table: Any, scenario: int) -> list[float]:
    """V-COCO's role AP of each verb: people first, then what they do, greedily over the whole set."""
    place = {one.filename: at for at, one in enumerate(roles.images)}
    result = []
    for verb, name in enumerate(table.verbs):
        role = roles.names.index(name)
        total = sum(int(one.roles[i]) == role for one in roles.images for i in range(len(one.roles)))
        ranked = []
        for one in predictions:
            for row, c in enumerate(one.interactions.tolist()):
                if table.interactions[c][0] == verb:
                    boxes = (one.boxes_h[row].tolist(), one.boxes_o[row].tolist())
                    ranked.append((-float(one.scores[row]), place[one.filename], row, boxes))
        hits: list[bool] = []
        taken: set[tuple[int, int]] = set()
        for _, at, _, (human, thing) in sorted(ranked, key=lambda item: item[:3]):
            image = roles.images[at]
            overlaps = [iou(human, person) for person in image.people.tolist()]
            if not overlaps:
                hits.append(False)
                continue
            person = overlaps.index(max(overlaps))
            if image.unknown[person]:
                continue
            best, which = -1.0, -1
            for entry, box in enumerate(image.boxes_o.tolist()):
                if int(image.doer[entry]) != person or int(image.roles[entry]) != role:
                    continue
                if not math.isnan(box[0]):
                    overlap = iou(thing, box)
                elif scenario == 1:
                    overlap = 1.0 if thing == [0, 0, 0, 0] else 0.0
                else:
                    overlap = 1.0
                if overlap > best:
                    best, which = overlap, entry
            good = overlaps[person] >= 0.5 and best >= 0.5 and (at, which) not in taken
            hits.append(good)
            if good:
                taken.add((at, which))
        result.append(average(hits, total, "all") if total else math.nan)
    return result
