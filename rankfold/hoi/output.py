"""What a HOLa model gives: logits of pairs and verbs, and what they say of each image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class HolaOutput(ModelOutput):
    """Of a batch of B images, of which one has M pairs, the most; V verbs, N classes.

    logits, prior  (B, M, V), 0 at padding
    pairs          (B, M, 2) int64 places of two detections, -1 at padding
    pair_counts    (B,) int64
    text           (B, N, D), class texts as adapted to each image
    pair_text      (B, N, 2D), halves of action and object; the same for every image
    """

    logits: Any = None
    prior: Any = None
    pairs: Any = None
    pair_counts: Any = None
    text: Any = None
    pair_text: Any = None


@dataclass(frozen=True)
class Triplets:
    """What is found in one image: `pairs` (k, 2) int64 places of human and object among its detections,
    `interactions` (k,) int64 interaction ids, `scores` (k,)."""

    pairs: Tensor
    interactions: Tensor
    scores: Tensor


__all__ = ["HolaOutput", "Triplets"]
