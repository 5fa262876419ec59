"""Reductions over the words of padded rows (B, T, …), which never read padding and give zeros for no word."""

from __future__ import annotations

import torch
from torch import Tensor


def words(mask: Tensor, states: Tensor) -> Tensor:
    """A mask (B, T) of booleans or integers as booleans, True for a word."""
    if mask.shape != states.shape[:2]:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; for these states it is {tuple(states.shape[:2])}"
        )
    if mask.is_floating_point() or mask.is_complex():
        raise ValueError(
            f"mask is {mask.dtype}, which may be one that is added to scores; give booleans or integers, "
            "where True or 1 is a word"
        )
    return mask != 0


def masked_softmax(scores: Tensor, real: Tensor | None) -> Tensor:
    """Over words: (B, heads, T) that sum to 1, zero at padding, all zero where there is no word."""
    scores = precise(scores)
    if real is None:
        return scores.softmax(-1)
    pad = ~real.unsqueeze(1)
    # Not -inf, of which a row with no word makes NaN on its way; elsewhere the lowest number is as good.
    low = torch.finfo(scores.dtype).min
    return scores.masked_fill(pad, low).softmax(-1).masked_fill(pad, 0)


def masked_mean(x: Tensor, real: Tensor | None) -> Tensor:
    """(B, T, d) to (B, d); zero where there is no word."""
    if real is None:
        return x.sum(1) / max(x.shape[1], 1)
    total = x.masked_fill(~real.unsqueeze(-1), 0).sum(1)
    return total / real.sum(1, keepdim=True).clamp_min(1).to(x.dtype)


def precise(x: Tensor) -> Tensor:
    """Half precision as float32; anything else as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
