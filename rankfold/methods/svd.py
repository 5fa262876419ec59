"""Truncated SVD in any metric, without an inverse of what may be singular.

min over rank r of tr(G E C Eᵀ), E = W - W′, is a plain SVD of G^½ W C^½. With T = W C Wᵀ, any factor G = F Fᵀ
and (λ, P) the leading eigenpairs of S = Fᵀ T F (out x out):

    W′ = (T F P Λ⁻¹) (Pᵀ Fᵀ W),     error(r) = Σ_{i>r} λᵢ

Only the retained eigenvalues are ever inverted, C and G may be singular, and with G = I it is the projection
P Pᵀ W. The same formula on Wᵀ works on the input side; the smaller side is taken, in float64. [FWSVD, ASVD,
SVD-LLM, K-FAC-SVD]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankfold.method import Method
from rankfold.metric import Metric, root, symmetric_eigen, times
from rankfold.structures import LowRank

RIDGE = 1e-12  # of the mean diagonal: orders the directions that a singular moment leaves undecided


@dataclass(frozen=True)
class SVD(Method, kind="svd"):
    """The best low-rank approximation in the metric. Size: the rank, an int.

    multiple  ranks on the menu are multiples of this. None picks 32, or less for small matrices, so that a
              menu has at least 16 sizes below break-even; 32 suits quantization groups, 64 and 128 tensor
              cores.
    """

    multiple: int | None = None

    def __post_init__(self) -> None:
        if self.multiple is not None and (not isinstance(self.multiple, int) or self.multiple < 1):
            raise ValueError(
                f"SVD(multiple={self.multiple!r}): a positive integer, or None to let the shape choose"
            )

    def menu(self, shape: tuple[int, int]) -> list[int]:
        """At most 64 ranks below break-even, out·in / (out + in): from there on a factor pair saves
        nothing."""
        out, inner = shape
        largest = (out * inner - 1) // (out + inner)  # the last rank that is strictly smaller than dense
        step = self.multiple or next((m for m in (32, 16, 8, 4, 2) if largest // m >= 16), 1)
        ranks = list(range(step, largest + 1, step))
        if len(ranks) <= 64:
            return ranks
        stride = math.ceil(len(ranks) / 48)
        picks = {*range(stride, len(ranks) + 1, stride), *(2**i for i in range(6))}
        return [step * pick for pick in sorted(picks)]

    def empty(
        self, shape: tuple[int, int], size: int, dtype: torch.dtype | None = None, device: Any = "meta"
    ) -> LowRank:
        return LowRank(shape, rank=size, dtype=dtype, device=device)

    def fit(self, weight: Tensor, metric: Metric, size: int) -> LowRank:
        if not 1 <= size <= min(weight.shape):
            raise ValueError(
                f"rank {size} of a matrix {tuple(weight.shape)} must lie between 1 and {min(weight.shape)}"
            )
        check_finite(weight)
        left, right = truncate(weight.double(), metric, size)
        scale = (right.norm(dim=1) / left.norm(dim=0).clamp_min(1e-300)).clamp_min(1e-300).sqrt()
        # Equal norms on both sides of every rank-one term: what later quantizes or trains the factors prefers
        # it.
        balanced = torch.where(torch.isfinite(scale) & (scale > 1e-150), scale, 1.0)
        return LowRank.of((left * balanced).to(weight.dtype), (right / balanced[:, None]).to(weight.dtype))

    def errors(self, weight: Tensor, metric: Metric, sizes: Sequence[int]) -> list[float]:
        return self.measure(weight, metric, sizes)[0]

    def measure(
        self, weight: Tensor, metric: Metric, sizes: Sequence[int]
    ) -> tuple[list[float], tuple[float, ...]]:
        """Every size from one spectrum: the error of rank r is the tail of the eigenvalues after r."""
        check_finite(weight)
        values = eigenvalues(gram(*smaller_side(weight.double(), metric))[0])
        if any(side is not None and not side.any() for side in (metric.left, metric.right)):
            values = torch.zeros_like(values)  # `fit` falls back on the identity, the error does not
        tails = torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])
        return [float(tails[min(size, len(values))]) for size in sizes], tuple(values.tolist())


def truncate(weight: Tensor, metric: Metric, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (out, rank), (rank, in) in float64 of the best rank-`rank` approximation of a float64
    weight."""
    flipped = weight.shape[0] > weight.shape[1]
    weight, left, right = smaller_side(weight, metric)
    if left is not None and left.dim() == 0:
        left = None  # a scalar changes the error, not the answer
    square, factor = gram(weight, left, right)
    values, vectors = eigenpairs(square, rank)
    basis = times(factor, vectors)  # F P
    inner = basis.mT @ weight  # Pᵀ Fᵀ W  (rank, in)
    if left is None:
        outer = vectors
    else:
        kept = values > 1e-15 * values[:1]
        inverse = torch.where(kept, 1 / values.clamp_min(torch.finfo(values.dtype).tiny), 0.0)
        outer = (weight @ times(ridged(right), inner.mT)) * inverse  # T F P Λ⁻¹  (out, rank)
    return (inner.mT, outer.mT) if flipped else (outer, inner)


def smaller_side(weight: Tensor, metric: Metric) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The problem in the orientation whose out side is the smaller: (W, G, C), or (Wᵀ, C, G). A moment that
    is zero everywhere says nothing and counts as the identity; a singular one gets a ridge at the level of
    rounding."""
    left, right = (
        None if side is None or not side.any() else side.double() for side in (metric.left, metric.right)
    )
    return (weight.mT, right, left) if weight.shape[0] > weight.shape[1] else (weight, left, right)


def gram(weight: Tensor, left: Tensor | None, right: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """S = Fᵀ W C Wᵀ F and a factor F of G = F Fᵀ, for W (out, in) with out <= in."""
    factor = factor_of(ridged(left))
    across = factor.mT if factor is not None and factor.dim() == 2 else factor
    inner = weight @ times(ridged(right), weight.mT)
    square = times(across, times(across, inner).mT)
    return (square + square.mT) / 2, factor


def factor_of(side: Tensor | None) -> Tensor | None:
    """F with F Fᵀ = side: a Cholesky factor, a fifteenth of the root's cost; the root where there is none."""
    if side is not None and side.dim() == 2:
        factor, failed = torch.linalg.cholesky_ex(side)
        if not failed.any():
            return factor
    return root(side)


def ridged(side: Tensor | None) -> Tensor | None:
    if side is None or side.dim() == 0:
        return side
    ridge = RIDGE * (side.diagonal() if side.dim() == 2 else side).mean()
    if side.dim() == 1:
        return side + ridge
    side = side.clone()
    side.diagonal().add_(ridge)
    return side


def eigenpairs(square: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading eigenpairs of a symmetric matrix, descending: values (rank,), vectors (n, rank)."""
    values, vectors = symmetric_eigen(square)
    return values[-rank:].flip(0), vectors[:, -rank:].flip(1)


def eigenvalues(square: Tensor) -> Tensor:
    """All eigenvalues of a symmetric positive semi-definite matrix, descending, clipped at zero."""
    try:
        values = torch.linalg.eigvalsh(square)
    except torch.linalg.LinAlgError:
        values = symmetric_eigen(square)[0]
    return values.flip(0).clamp_min(0)


def check_finite(weight: Tensor) -> None:
    if not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        raise ValueError(f"a weight of shape {tuple(weight.shape)} holds {bad} NaN or infinite entries")
