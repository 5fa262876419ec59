"""Any structure that is a product of two thin matrices, as those two: W = left right.

    LowRank       scale · left, right
    Wavelet       the bands' factors, through the inverse transform, side by side (`Wavelet.factors`)
    Sum           the terms' factors side by side: rank r₁ + r₂ + …

Nothing is approximated. A wavelet of rank r in each of four bands is so a matrix of rank 4r, which any LoRA
server runs; two low-rank terms are one. Dense and sparse matrices have no such form.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from rankfold.structure import Structure
from rankfold.structures import Sum


def factors_of(structure: Structure) -> tuple[Tensor, Tensor] | None:
    """left (out, rank) and right (rank, in) in float64, detached; None where a structure (or a term of it) is
    no product of two."""
    if isinstance(structure, Sum):
        pairs = [factors_of(term) for term in structure.terms if isinstance(term, Structure)]
        held = [pair for pair in pairs if pair is not None]
        if len(held) < len(pairs):
            return None
        return torch.cat([left for left, _ in held], 1), torch.cat([right for _, right in held])
    with torch.no_grad():
        factors = copy.deepcopy(structure).double().factors()
    return None if factors is None or len(factors) != 2 else (factors[0], factors[1])


def thin(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product at a rank of at most its smaller side: factors side by side may be more than that."""
    if left.shape[1] <= min(left.shape[0], right.shape[1]):
        return left, right
    full = left @ right
    eye = torch.eye(min(full.shape), dtype=full.dtype, device=full.device)
    return (eye, full) if full.shape[0] <= full.shape[1] else (full, eye)


def truncated(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of `left right` at `rank`, in balanced factors, in float64.

    The small matrix R_left R_rightᵀ has all the singular values: nothing of size (out, in) is formed.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.mT)
    u, s, vh = torch.linalg.svd(r_left @ r_right.mT)
    half = s[:rank].sqrt()
    return (q_left @ u[:, :rank]) * half, half[:, None] * (vh[:rank] @ q_right.mT)
