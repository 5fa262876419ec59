"""Cored: a small trained matrix between two fixed bases.

    W = scale · left M right        left (out, rank), right (rank, in) fixed; M (rank, rank), or diagonal

What trains is M alone: rank² or rank numbers, whatever the sides of W. The bases are buffers, so nothing
makes them train: `requires_grad_`, optimizers and counts of parameters pass them by. They are part of the
state, and of `nbytes`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.structure import Structure, check_size

CORES = ("full", "diagonal")


class Cored(Structure, kind="cored"):
    """W = scale · left M right. [a band of Tiny-WaRA: the leading singular vectors of a weight on both sides]

    left     (out, rank), a buffer
    right    (rank, in), a buffer
    weights  M, a parameter: (rank, rank), or with core="diagonal" (rank,)
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        rank: int,
        core: str = "full",
        scale: float = 1.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(shape)
        out, inner = self.shape
        where = f"cored structure of shape {self.shape}"
        self.rank = check_size(f"{where}: rank", rank, min(out, inner))
        if not isinstance(core, str) or core not in CORES:
            raise ValueError(f"{where}: core={core!r}; choose one of {', '.join(CORES)}")
        good = isinstance(scale, int | float) and not isinstance(scale, bool) and math.isfinite(scale)
        if not good or scale == 0:
            raise ValueError(f"{where}: its scale is a finite number other than 0; got {scale!r}")
        self.core, self.scale = core, float(scale)
        place: dict[str, Any] = {"dtype": dtype, "device": device}
        self.left: Tensor
        self.right: Tensor
        self.register_buffer("left", torch.zeros(out, self.rank, **place))
        self.register_buffer("right", torch.zeros(self.rank, inner, **place))
        sides = (self.rank, self.rank) if core == "full" else (self.rank,)
        self.weights = nn.Parameter(torch.zeros(sides, **place))

    @classmethod
    def of(cls, left: Tensor, weights: Tensor, right: Tensor, scale: float = 1.0) -> Cored:
        """From bases left (out, rank) and right (rank, in) and M, (rank, rank) or (rank,), of one dtype."""
        shape, core = (left.shape[0], right.shape[1]), CORES[weights.dim() == 1]
        structure = cls(shape, rank=left.shape[1], core=core, scale=scale, dtype=weights.dtype, device="meta")
        structure.left, structure.right = left.contiguous(), right.contiguous()
        structure.weights = nn.Parameter(weights.contiguous())
        return structure

    def forward(self, x: Tensor) -> Tensor:
        linear = nn.functional.linear
        inside = linear(x, self.right)
        inside = inside * self.weights if self.core == "diagonal" else linear(inside, self.weights)
        return linear(inside if self.scale == 1 else inside * self.scale, self.left)

    def rows(self, index: Tensor) -> Tensor:
        left, right = self.factors()
        return nn.functional.embedding(index, left) @ right

    @property
    def macs(self) -> int:
        return self.rank * sum(self.shape) + self.weights.numel()

    def sizes(self) -> dict[str, Any]:
        sizes = {"rank": self.rank, "core": self.core}
        return sizes if self.scale == 1 else {**sizes, "scale": self.scale}

    def factors(self) -> tuple[Tensor, Tensor]:
        """scale · left M, and right: two factors, as of a low-rank matrix."""
        left = self.left * self.weights if self.core == "diagonal" else self.left @ self.weights
        return left if self.scale == 1 else left * self.scale, self.right
