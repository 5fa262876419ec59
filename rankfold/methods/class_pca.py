"""PCA of a matrix of class features with the classes as variables, as low rank: class weights times a basis.

    T (out, in), a row a class        T - mean of each row = U diag(σ) Vᵀ        B = Vᵀ, unit rows (rank, in)

    upstream          W = U           orthonormal columns: W B is not near T, its error is ‖T‖² + Σ (1 - 2 σₖ)
    reconstructing    W = T B⁺        the best weights for that basis: error ‖T‖² - Σ σₖ²
    pca               the same of T as it is, not centred: the nearest matrix of its rank

Rows of T.mT, the features, are the samples, so that what is centred is each class over its features. Taking
classes as samples, which is the usual way, gives other ranks for the same variance. [HOLa: arXiv 2507.15542]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankfold.method import Curve, DecompositionError, Method
from rankfold.methods.svd import SVD, check_finite
from rankfold.metric import Metric
from rankfold.structure import is_size
from rankfold.structures import LowRank

INITS = ("upstream", "reconstructing", "pca")


class Components(NamedTuple):
    """In float64, by falling σ: `weights` (out, n) with orthonormal columns, `sigma` (n,), `basis` (n, in)
    with orthonormal rows; n = min(out, in)."""

    weights: Tensor
    sigma: Tensor
    basis: Tensor


@dataclass(frozen=True)
class ClassPCA(Method, kind="class_pca"):
    """Low rank by PCA over classes. Size: the rank, an int.

    rank      of every matrix; one that it does not make smaller stays dense. None: as `variance` says
    variance  share of the centred matrix's σ² (of T's own for "pca") that the rank shall keep, in (0, 1);
              None: the menu of `SVD`, for an allocator to choose from
    init      one of INITS, see the module

    The basis never depends on a metric; `errors` are measured in it. "upstream" starts a training in which W
    and B are adapted by themselves: as a compression it is none, and its error rises with the rank.
    """

    rank: int | None = None
    variance: float | None = 0.95
    init: str = "reconstructing"

    def __post_init__(self) -> None:
        if self.rank is not None and not is_size(self.rank):
            raise ValueError(f"ClassPCA(rank={self.rank!r}): a positive integer, or None")
        check_variance(self.variance, "ClassPCA")
        if self.init not in INITS:
            raise ValueError(f"ClassPCA(init={self.init!r}): choose one of {INITS}")

    def menu(self, shape: tuple[int, int]) -> list[int]:
        """The rank where it is given, and saves something; else what `SVD` offers."""
        if self.rank is None:
            return SVD().menu(shape)
        return [self.rank] if self.rank * sum(shape) < math.prod(shape) else []

    def empty(
        self, shape: tuple[int, int], size: int, dtype: torch.dtype | None = None, device: Any = "meta"
    ) -> LowRank:
        return LowRank(shape, rank=size, dtype=dtype, device=device)

    @torch.no_grad()
    def fit(self, weight: Tensor, metric: Metric, size: int) -> LowRank:
        """W (out, rank) as `left`, B (rank, in) as `right`. The metric is ignored. Raises ValueError for a
        rank outside [1, min(out, in)] and a weight that is not finite, DecompositionError where the singular
        value decomposition fails."""
        if not 1 <= size <= min(weight.shape):
            raise ValueError(
                f"rank {size} of a matrix {tuple(weight.shape)} must lie between 1 and {min(weight.shape)}"
            )
        left, right = self._factors(components(weight, centre=self.init != "pca"), size)
        return LowRank.of(left.to(weight.dtype), right.to(weight.dtype))

    def errors(self, weight: Tensor, metric: Metric, sizes: Sequence[int]) -> list[float]:
        """All from one decomposition."""
        found, weight = components(weight, centre=self.init != "pca"), weight.detach().double()
        errors = []
        for size in sizes:
            left, right = self._factors(found, size)
            errors.append(metric.error(weight - left @ right))
        return errors

    def curve(self, weight: Tensor, metric: Metric, unit: str = "nbytes", *, errors: bool = True) -> Curve:
        """As `Method.curve`; with `variance`, its one size is the rank that keeps that of this weight."""
        if self.rank is None and self.variance is not None:
            rank = rank_for(weight, self.variance, centre=self.init != "pca")
            return replace(self, rank=rank).curve(weight, metric, unit, errors=errors)
        return super().curve(weight, metric, unit, errors=errors)

    def _factors(self, found: Components, size: int) -> tuple[Tensor, Tensor]:
        left, right = found.weights[:, :size], found.basis[:size]
        # Rows of B are orthonormal and sum to zero where T was centred: T Bᵀ = U diag(σ) either way.
        return (left if self.init == "upstream" else left * found.sigma[:size]), right


@torch.no_grad()
def components(weight: Tensor, *, centre: bool = True) -> Components:
    """The singular value decomposition of a weight (out, in), each row less its mean with `centre`. Signs are
    fixed: the largest entry of each column of `weights` is positive. Raises as `ClassPCA.fit`."""
    check_finite(weight)
    weight = weight.detach().double()
    if centre:
        weight = weight - weight.mean(1, keepdim=True)
    try:
        left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
    except torch.linalg.LinAlgError as error:
        raise DecompositionError(
            f"the singular value decomposition of a {tuple(weight.shape)} failed ({error})"
        ) from error
    largest = left.gather(0, left.abs().argmax(0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(left)
    return Components(left * sign, sigma, right * sign.mT)


def kept(sigma: Tensor) -> Tensor:
    """Share of the variance that the first 1, 2, … components keep, (n,); 1 where there is none."""
    energy = sigma.square().cumsum(0)
    return energy / energy[-1] if float(energy[-1]) > 0 else torch.ones_like(energy)


def rank_for(weight: Tensor, variance: float, *, centre: bool = True) -> int:
    """The fewest components of a weight (out, in) that keep more than `variance` of it. Raises ValueError for
    a share outside (0, 1)."""
    check_variance(variance, "rank_for")
    share = kept(components(weight, centre=centre).sigma)
    return min(int((share <= variance).sum()) + 1, len(share))


def check_variance(variance: Any, where: str) -> None:
    """ValueError unless it is None or a share in (0, 1)."""
    number = isinstance(variance, int | float) and not isinstance(variance, bool)
    if variance is not None and not (number and 0 < variance < 1):
        raise ValueError(f"{where}(variance={variance!r}): a share of the variance, above 0 and below 1")
