"""Pairs of detections that may interact, where they stand, and how far the detector believes them.

    pair (x, y)     x a human, y any other detection, humans too
    prior[x, y, v]  (s_x s_y)^g where (object of y, verb v) is an interaction, else 0

Images of a batch differ in detections and pairs: padding stands last, and is -1 in labels and pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankfold.hoi.boxes import area, iou

SPATIAL = 36


def build_pairs(labels: Tensor, human: int) -> tuple[Tensor, Tensor]:
    """(pairs (B, M, 2) int64, counts (B,) int64) of detections whose object ids are `labels` (B, n), -1 where
    there is none. A pair is the places (x, y) of two detections, by x and then by y; M is the most that an
    image has, and 0 where no image has a human and something else."""
    n = labels.shape[1]
    other = ~torch.eye(n, dtype=torch.bool, device=labels.device)
    image, x, y = ((labels == human).unsqueeze(2) & (labels >= 0).unsqueeze(1) & other).nonzero(as_tuple=True)
    counts = torch.bincount(image, minlength=labels.shape[0])
    place = torch.arange(len(image), device=labels.device) - (counts.cumsum(0) - counts)[image]
    most = int(counts.max()) if counts.numel() else 0
    pairs = labels.new_full((labels.shape[0], most, 2), -1)
    pairs[image, place] = torch.stack([x, y], 1)
    return pairs, counts


def of_pairs(values: Tensor, places: Tensor) -> Tensor:
    """(B, M, …): the rows of `values` (B, n, …) at `places` (B, M), one end of each pair. Padding, -1, gives
    whatever stands first, or zeros where an image has no detection at all."""
    tail = values.shape[2:]
    if not values.shape[1]:
        return values.new_zeros(*places.shape, *tail)
    index = places.clamp(min=0).reshape(*places.shape, *(1 for _ in tail)).expand(*places.shape, *tail)
    return values.gather(1, index)


def spatial_encoding(humans: Tensor, others: Tensor, size: tuple[int, int], eps: float = 1e-4) -> Tensor:
    """(…, 36): eighteen numbers of each pair of boxes (…, 4) in an image of `size` (width, height), and the
    logarithms of those numbers plus `eps`.

    In parts of the image, human first: centres (4), widths and heights (4), areas (2), the second area by the
    first (1), width by height in pixels (2), IoU (1), and how far the second centre is to the right, left,
    below and above of the first, in widths and heights of the human (4).
    """
    whole = humans.new_tensor([*size, *size])
    a, b = humans / whole, others / whole
    centres = [(box[..., :2] + box[..., 2:]) / 2 for box in (a, b)]
    sides = [(box[..., 2:] - box[..., :2]).clamp(min=0) for box in (a, b)]
    areas = [area(a), area(b)]
    pixels = [side * whole[:2] for side in sides]
    shapes = [side[..., 0] / (side[..., 1] + eps) for side in pixels]
    offset = (centres[1] - centres[0]) / (sides[0] + eps)
    shared = iou(a.unsqueeze(-2), b.unsqueeze(-2))[..., 0, 0]
    numbers = torch.cat(
        [
            *centres,
            *sides,
            torch.stack([*areas, areas[1] / (areas[0] + eps), *shapes, shared], -1),
            offset.clamp(min=0),
            (-offset).clamp(min=0),
        ],
        -1,
    )
    return torch.cat([numbers, (numbers + eps).log()], -1)


def pair_prior(scores: Tensor, labels: Tensor, pairs: Tensor, valid: Tensor, exponent: float) -> Tensor:
    """(B, M, V): prior of every pair and verb. `scores` and `labels` (B, n) of the detections, `pairs`
    (B, M, 2) of `build_pairs`, `valid` (O, V) bool: which (object, verb) are interactions. 0 at padding."""
    x, y = pairs.unbind(-1)
    both = (of_pairs(scores, x) * of_pairs(scores, y)).pow(exponent)
    known = valid[of_pairs(labels, y).clamp(min=0)] & (x >= 0).unsqueeze(-1)
    return both.unsqueeze(-1) * known


__all__ = ["SPATIAL", "build_pairs", "of_pairs", "pair_prior", "spatial_encoding"]
