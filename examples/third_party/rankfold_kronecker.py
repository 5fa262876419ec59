"""Sums of Kronecker products, as a third party would add them to rankfold: one file, one entry point.

    W = Σₖ leftₖ ⊗ rightₖ,    leftₖ (a, b), rightₖ (c, d),  out = a·c,  in = b·d

Reorder W so that each c x d block becomes a row: then every term is a rank-one matrix, and the best sum of
`terms` of
them in the plain norm is a truncated SVD. [Van Loan & Pitsianis, Approximation with Kronecker products, 1993]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankfold import Frobenius, Method, Metric, Recipe, Structure, allocate
from rankfold.structure import check_size


class Kronecker(Structure, kind="kronecker"):
    """W = Σₖ leftₖ ⊗ rightₖ, with parameters `left` (terms, a, b) and `right` (terms, c, d); a·c = "
    "out, b·d = in."""

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        left: Sequence[int],
        terms: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(shape)
        if not isinstance(left, list | tuple) or len(left) != 2:
            raise ValueError(
                f"kronecker structure: left={left!r} must be two integers, the shape of the left factor"
            )
        a, b = (check_size("kronecker left", n, side) for n, side in zip(left, self.shape, strict=True))
        if self.shape[0] % a or self.shape[1] % b:
            raise ValueError(f"kronecker left={(a, b)} does not divide the shape {self.shape}")
        c, d = self.shape[0] // a, self.shape[1] // b
        self.terms = check_size("kronecker terms", terms, min(a * b, c * d))
        self.left = nn.Parameter(torch.empty(self.terms, a, b, dtype=dtype, device=device))
        self.right = nn.Parameter(torch.empty(self.terms, c, d, dtype=dtype, device=device))
        for factor in (self.left, self.right):
            nn.init.normal_(factor, std=(self.terms * self.shape[1]) ** -0.25)

    def forward(self, x: Tensor) -> Tensor:
        b, d = self.left.shape[2], self.right.shape[2]
        grid = x.unflatten(-1, (b, d)).unsqueeze(-3)  # (..., 1, b, d)
        y = (self.left @ grid @ self.right.mT).sum(-3)  # (..., a, c)
        return y.flatten(-2)

    def rows(self, index: Tensor) -> Tensor:
        c = self.right.shape[1]
        left, right = self.left[:, index // c], self.right[:, index % c]  # (terms, ..., b), (terms, ..., d)
        return (left.unsqueeze(-1) * right.unsqueeze(-2)).sum(0).flatten(-2)

    @property
    def macs(self) -> int:
        (terms, a, b), (_, c, d) = self.left.shape, self.right.shape
        return terms * (a * b * d + a * d * c)

    def sizes(self) -> dict[str, Any]:
        return {"left": list(self.left.shape[1:]), "terms": self.terms}


@dataclass(frozen=True)
class KroneckerSVD(Method, kind="kronecker_svd"):
    """The best sum of Kronecker products in the plain norm. Size: the number of terms.

    The sides of the left factor are the divisors of (out, in) nearest to their square roots.
    """

    def menu(self, shape: tuple[int, int]) -> list[int]:
        (a, b), (c, d) = factors(shape)
        most = (a * b * c * d - 1) // (a * b + c * d)  # the last one smaller than dense
        step = max(1, math.ceil(most / 48))
        return list(range(step, min(most, a * b, c * d) + 1, step))

    def empty(
        self, shape: tuple[int, int], size: int, dtype: torch.dtype | None = None, device: Any = "meta"
    ) -> Kronecker:
        return Kronecker(shape, left=factors(shape)[0], terms=size, dtype=dtype, device=device)

    def fit(self, weight: Tensor, metric: Metric, size: int) -> Kronecker:
        u, s, vt = torch.linalg.svd(rearranged(weight, metric), full_matrices=False)
        structure = self.empty((weight.shape[0], weight.shape[1]), size, weight.dtype, weight.device)
        root = s[:size].sqrt()
        with torch.no_grad():
            structure.left.copy_((root[:, None] * u.mT[:size]).view_as(structure.left))
            structure.right.copy_((root[:, None] * vt[:size]).view_as(structure.right))
        return structure

    def errors(self, weight: Tensor, metric: Metric, sizes: Sequence[int]) -> list[float]:
        squares = torch.linalg.svdvals(rearranged(weight, metric)).square()
        return [float(squares[size:].sum()) for size in sizes]


def factors(shape: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes (a, b) and (c, d) of the two factors of one term."""
    a, b = (max(n for n in range(1, math.isqrt(side) + 1) if side % n == 0) for side in shape)
    return (a, b), (shape[0] // a, shape[1] // b)


def rearranged(weight: Tensor, metric: Metric) -> Tensor:
    """W with its c x d blocks as rows, (a·b, c·d) in float64: a Kronecker product becomes an outer "
    "product."""
    if metric.left is not None or metric.right is not None:
        raise ValueError("kronecker_svd is optimal in the plain norm only; use it with the Frobenius metric")
    if not torch.isfinite(weight).all():
        raise ValueError(f"a weight of shape {tuple(weight.shape)} holds NaN or infinite entries")
    (a, b), (c, d) = factors((weight.shape[0], weight.shape[1]))
    return weight.double().reshape(a, c, b, d).permute(0, 2, 1, 3).reshape(a * b, c * d)


kronecker = Recipe(
    "kronecker",
    KroneckerSVD(),
    Frobenius(),
    allocate.uniform,
    "Van Loan & Pitsianis 1993",
    "sums of Kronecker products",
)
