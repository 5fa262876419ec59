"""Average precision of ranked detections, for all classes at once.

    precision after rank r: (true ones up to r) / r        recall after it: (true ones up to r) / ground truth
    p(t) = the highest precision at any rank whose recall is at least t

    "11"   AP = mean of p(t) over t = 0, 0.1, …, 1                   (the protocol of HICO-DET)
    "all"  AP = Σ over true detections of p(recall) / ground truth   (area under p)

Between two true detections precision only falls, so p is known from the ranks of the true ones alone. Recall
is compared with t in whole numbers: 3 of 10 reach 0.3, whatever a float makes of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

POINTS = ("11", "all")


def check_points(points: str) -> None:
    if points not in POINTS:
        raise ValueError(f"points={points!r} must be one of {POINTS}")


def average_precisions(
    classes: Tensor, scores: Tensor, hits: Tensor, truths: Tensor, points: str = "11"
) -> Tensor:
    """(N,) float64: AP of every class, 0 where none of its ground truth was found, NaN where it has none.

    classes  (n,) class of each detection, 0..N-1, any integer dtype
    scores   (n,) finite, compared as float32; within a class by falling score, ties in the order given
    hits     (n,) bool: whether it found a ground truth that no other one found
    truths   (N,) int64: ground truth of each class

    One stable sort of n whole numbers, whatever N is. Raises ValueError for an unknown `points`.
    """
    check_points(points)
    order = torch.sort(_keys(classes, scores), stable=True).indices
    size = torch.bincount(classes.int(), minlength=len(truths))
    place = hits[order].nonzero().flatten()  # where the true ones stand, class after class
    where = classes[order[place]].long()
    rank = place - (size.cumsum(0) - size)[where] + 1  # 1-based, within the class
    found = torch.bincount(where, minlength=len(truths))
    first = found.cumsum(0) - found
    precision = (torch.arange(len(where)) - first[where] + 1).double() / rank
    # p at the recall of each: the highest from there to the end of its class. From the end, every class is
    # lifted by 2 above the ones after it, so that one running maximum serves all.
    highest = (precision - 2 * where).flip(0).cummax(0).indices
    best = precision.flip(0)[highest].flip(0)
    nothing = torch.where(truths > 0, 0.0, torch.nan).double()
    if points == "all":
        return nothing + torch.bincount(where, weights=best, minlength=len(truths)) / truths
    # The first of the true ones whose recall reaches k/10: the smallest whole j > 0 with 10 j >= k·truths.
    need = ((torch.arange(11) * truths[:, None] + 9) // 10).clamp(min=1)
    reached = (need <= found[:, None]) & (truths > 0)[:, None]
    heights = torch.zeros(len(truths), 11, dtype=torch.float64)
    heights[reached] = best[(first[:, None] + need - 1)[reached]]
    return nothing + heights.sum(1) / 11


def _keys(classes: Tensor, scores: Tensor) -> Tensor:
    """(n,) int64 that rise by class and, within one, fall by score. Whole numbers sort by their digits, a few
    times as fast as floats. The bits of a float rise with it, once those of a negative one but its sign are
    turned round."""
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0: of -0.0 and 0.0 neither comes first
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (classes.long() << 32) - rising
