"""Boxes: float tensors (…, 4) of corners x1 y1 x2 y2 in pixels, from 0, x2 and y2 exclusive.

IoU = the area that two boxes share / the area that either covers; of two pairs it is the smaller one of their
human boxes' and their object boxes' IoU. A resize, even one that distorts, changes no IoU, so boxes may be
compared in any space that both are in.
"""

from __future__ import annotations

import torch
from torch import Tensor


def area(boxes: Tensor) -> Tensor:
    """(…,) areas; 0 for a box whose corners are the wrong way round."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """(…, n, m) IoU of every box of `a` (…, n, 4) with every box of `b` (…, m, 4); 0 where both are empty."""
    a, b = a.unsqueeze(-2), b.unsqueeze(-3)
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    both = (high - low).clamp(min=0).prod(-1)
    either = area(a) + area(b) - both
    return both / either.where(either > 0, 1)


def pair_iou(humans: Tensor, objects: Tensor, other_humans: Tensor, other_objects: Tensor) -> Tensor:
    """(n, m): min(IoU of the human boxes, IoU of the object boxes) of n pairs with m others; all (·, 4)."""
    return torch.minimum(iou(humans, other_humans), iou(objects, other_objects))


def union(a: Tensor, b: Tensor) -> Tensor:
    """The smallest boxes (…, 4) that hold both."""
    return torch.cat([torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])], -1)


def valid(boxes: Tensor) -> Tensor:
    """(…,) bool: finite, and with an area above 0."""
    return boxes.isfinite().all(-1) & (boxes[..., 2:] > boxes[..., :2]).all(-1)


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """`boxes` cut at the border of an image of `size` (width, height)."""
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor([*size, *size]))


def scale(boxes: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """`boxes` of an image of size `before` (width, height) in the same image resized to `after`."""
    across, down = after[0] / before[0], after[1] / before[1]
    return boxes * boxes.new_tensor([across, down, across, down])


def nms(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Indices (k,) int64, by falling score, of the boxes (n, 4) that no box of the same label with a higher
    score overlaps by an IoU above `threshold`. Equal scores: the earlier one counts as higher."""
    order = scores.argsort(descending=True, stable=True)
    boxes, labels = boxes[order], labels[order]
    overlap = (iou(boxes, boxes) > threshold) & (labels[:, None] == labels[None, :])
    keep = torch.ones(len(order), dtype=torch.bool, device=boxes.device)
    for place in range(len(order)):  # greedy: a box that fell suppresses nothing
        if keep[place]:
            keep[place + 1 :] &= ~overlap[place, place + 1 :]
    return order[keep]
