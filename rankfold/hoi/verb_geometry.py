"""Where a verb puts its object: boxes whose geometry is a linear code of the verb's text features.

    z (V, 6) = (verb features, centred) @ P

with P the six leading principal directions, whitened and turned at random. The latents of an unseen verb
follow from its text by the same linear map as those of a seen one. A pair is drawn from z plus noise; each
number of the geometry is linear in its latent, and can be read off the boxes:

    offset of the object to the right and down, in widths and heights of the human; log of the areas' ratio;
    log of width by height of the object, and of the human; log of the human's area
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rankfold.hoi.classes import ClassTable

# The centre and the reach of each geometric number; a latent of ±LIMIT is at the end of its reach.
GEOMETRY = (
    ("right", 0.0, 1.5),
    ("down", 0.0, 0.9),
    ("log area ratio", math.log(0.5), 1.0),
    ("log aspect of the object", 0.0, 0.8),
    ("log aspect of the human", math.log(0.6), 0.5),
    ("log area of the human", math.log(0.045), 0.6),  # of the image
)
LATENTS = len(GEOMETRY)
LIMIT = 2.5  # latents have variance 1; the few beyond are cut


def verb_features(classes: Tensor, actions: Tensor, table: ClassTable) -> Tensor:
    """(V, D): what the text says of each verb, on both sides that a model reads: the mean of the class
    features T (N, D) over its interactions, plus its action feature Ac (V, D), each centred and of mean norm
    1."""
    if (len(classes), len(actions)) != (len(table), len(table.verbs)):
        raise ValueError(
            f"{len(classes)} class and {len(actions)} action features; the table has {len(table)} "
            f"interactions and {len(table.verbs)} verbs"
        )
    mean = table.indicator.mT @ classes.float() / table.verb_counts.clamp(min=1)[:, None]
    sides = [side - side.mean(0) for side in (mean, actions.float())]
    return sum((side / side.norm(dim=1).mean() for side in sides), torch.zeros(()))


def verb_latents(features: Tensor, seed: int = 0) -> Tensor:
    """(V, 6) float32 latents of verbs with features (V, D): mean 0, variance 1 and uncorrelated; with fewer
    than 7 verbs of fewer dimensions. ValueError for features that are all the same, or not finite."""
    centred = features.double() - features.double().mean(0)
    left, values, _ = torch.linalg.svd(centred.nan_to_num(), full_matrices=False)
    rank = min(LATENTS, int((values > values.max() * 1e-6).sum())) if centred.isfinite().all() else 0
    if not rank:
        raise ValueError(f"verb features {tuple(features.shape)} are all the same, or not finite")
    largest = left.gather(0, left.abs().argmax(0, keepdim=True))
    left = left * largest.sign()  # a direction has two signs, and which one comes depends on the machine
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(LATENTS, LATENTS, generator=generator, dtype=torch.float64))[0]
    return (left[:, :rank] @ turn[:rank] * math.sqrt(len(features) * LATENTS / rank)).float()


def boxes_of(latents: Sequence[float], size: tuple[int, int]) -> tuple[list[float], list[float]]:
    """(human, object) boxes of one pair in pixels, with the human's centre at 0; `latents` of length 6."""
    numbers = [
        centre + reach * max(-1.0, min(1.0, z / LIMIT))
        for z, (_, centre, reach) in zip(latents, GEOMETRY, strict=True)
    ]
    right, down, ratio, aspect, human_aspect, human_area = numbers
    area = math.exp(human_area) * size[0] * size[1]
    made = []
    for whole, shape in ((area, human_aspect), (area * math.exp(ratio), aspect)):
        height = math.sqrt(whole / math.exp(shape))
        made.append((height * math.exp(shape), height))
    (w, h), (ow, oh) = made
    x, y = right * w, down * h
    return [-w / 2, -h / 2, w / 2, h / 2], [x - ow / 2, y - oh / 2, x + ow / 2, y + oh / 2]
