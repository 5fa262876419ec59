"""Ranks that were decided before: for each shape of matrix the one rank that it gets.

    menu(shape) = [rank of that shape]        no shape, no rank: the layer stays dense

`SVD` offers ranks and an allocator chooses; `Scratch` has one rule for all shapes. Where somebody has said
the rank of each, as `auto_` does, there is nothing to choose: the recipe's JSON says it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankfold.method import Method
from rankfold.methods.scratch import Scratch
from rankfold.methods.svd import SVD
from rankfold.metric import Metric
from rankfold.structure import Structure, is_size
from rankfold.structures import LowRank


@dataclass(frozen=True)
class AtRanks(Method, kind="at_ranks"):
    """Low rank at the rank given for each shape. Size: the rank, an int.

    ranks  (out, in, rank) for each shape
    init   None: the best approximation of the weight; else new factors, an `init` of `Scratch`
    seed   with the layer's name, of what is drawn

    Raises ValueError for a rank that saves nothing, for two of one shape, and for an unknown `init`.
    """

    costly: ClassVar[bool] = True  # nobody reads the errors where there is one size

    ranks: tuple[tuple[int, int, int], ...] = ()
    init: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        given: Any = self.ranks  # perhaps from JSON
        for entry in given if isinstance(given, tuple | list) else [given]:
            if not isinstance(entry, tuple | list) or len(entry) != 3 or not all(map(is_size, entry)):
                raise ValueError(f"AtRanks: {entry!r} is not (out, in, rank), three positive integers")
            out, inner, rank = entry
            if rank * (out + inner) >= out * inner:
                raise ValueError(f"AtRanks: rank {rank} saves nothing on a matrix of shape {(out, inner)}")
        ranks = tuple((out, inner, rank) for out, inner, rank in self.ranks)
        if len({entry[:2] for entry in ranks}) < len(ranks):
            raise ValueError(f"AtRanks: a shape has one rank; got {ranks}")
        object.__setattr__(self, "ranks", ranks)
        if self.init is not None:
            self._scratch(1)

    @property
    def fresh(self) -> bool:
        return self.init is not None and self._scratch(1).fresh

    def menu(self, shape: tuple[int, int]) -> list[int]:
        return [rank for *sides, rank in self.ranks if sides == list(shape)]

    def empty(
        self, shape: tuple[int, int], size: int, dtype: torch.dtype | None = None, device: Any = "meta"
    ) -> LowRank:
        return LowRank(shape, rank=size, dtype=dtype, device=device)

    def fit(self, weight: Tensor, metric: Metric, size: int) -> Structure:
        """As `SVD.fit`, or as `Scratch.fit`."""
        if self.init is None:
            return SVD().fit(weight, metric, size)
        return self._scratch(size).fit(weight, metric, size)

    def at(self, name: str, seed: int) -> AtRanks:
        return self if self.init is None else replace(self, seed=self._scratch(1).at(name, seed).seed)

    def errors(self, weight: Tensor, metric: Metric, sizes: Sequence[int]) -> list[float]:
        method = SVD() if self.init is None else self._scratch(1)
        return method.errors(weight, metric, sizes)

    def _scratch(self, rank: int) -> Scratch:
        assert self.init is not None
        return Scratch(rank=rank, init=self.init, seed=self.seed)
