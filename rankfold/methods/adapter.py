"""Adapters: the weight stays as it is and frozen, and something small beside it trains.

    LoRA    W + s · B A                      B = 0 at the start
    PiSSA   (W − s · B A) + s · B A          s · B A the truncated SVD of W: trains its principal part

s = alpha / rank. LoRA leaves outputs as they were, bit for bit (`rankfold.hosts`), PiSSA up to rounding;
those with a wavelet transform are in `rankfold.methods.wavelets`. What trains is at least float32.
[LoRA: arXiv 2106.09685; PiSSA: 2404.02948]
"""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankfold.method import Curve, Method, cost_of
from rankfold.methods.scratch import balanced
from rankfold.methods.svd import check_finite
from rankfold.metric import Metric
from rankfold.structure import Structure
from rankfold.structures import Dense, LowRank, Sum

INITS = ("kaiming", "gaussian")


class Adapter(Method):
    """A method that keeps the weight, frozen, and puts a trained structure beside it: Sum(Dense, structure).
    Concrete ones are frozen dataclasses with an option `seed`: with the layer's name, of what is drawn, so
    that all processes of a run draw the same."""

    costly: ClassVar[bool] = True
    adds: ClassVar[bool] = True

    seed: int

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"{name}(seed={self.seed!r}): an integer")
        if (init := getattr(self, "init", INITS[0])) not in INITS:  # of those that draw
            raise ValueError(f"{name}(init={init!r}): choose one of {', '.join(INITS)}")

    @property
    @abstractmethod
    def nominal(self) -> Any:
        """The size that the options name, one for all layers."""

    @abstractmethod
    def term(self, shape: tuple[int, int], size: Any, dtype: torch.dtype | None, device: Any) -> Structure:
        """An unfilled adapter of this size. Raises ValueError for one that the shape is too small for."""

    @abstractmethod
    def start_(self, term: Structure, weight: Tensor) -> Tensor:
        """Fill an adapter; returns the base, a weight that with it has the outputs of `weight`."""

    def menu(self, shape: tuple[int, int]) -> list[Any]:
        """The one size that the options name. Raises ValueError where the shape is too small for it."""
        self.term(shape, self.nominal, None, "meta")
        return [self.nominal]

    def empty(
        self, shape: tuple[int, int], size: Any, dtype: torch.dtype | None = None, device: Any = "meta"
    ) -> Sum:
        base = Dense(shape, dtype=dtype, device=device)
        return Sum.of(base, self.term(shape, size, _wide(base.dtype), device), frozen=True)

    def fit(self, weight: Tensor, metric: Metric, size: Any) -> Sum:
        """The weight, which is not copied, and a fresh adapter beside it. Raises ValueError for a weight that
        is not finite, and for sizes that its shape cannot have."""
        check_finite(weight)
        weight, shape = weight.detach(), (weight.shape[0], weight.shape[1])
        size = self.sized(weight, metric) if size == self.nominal else size
        # By way of meta: layers draw their start from the global generator, which is not ours to move.
        term = self.term(shape, size, _wide(weight.dtype), "meta").to_empty(device=weight.device)
        with torch.no_grad():
            base = Dense.of(self.start_(term, weight))
        return Sum.of(base.requires_grad_(False), term, frozen=True)

    def sized(self, weight: Tensor, metric: Metric) -> Any:
        """The size for one weight, where it depends on more than the shape."""
        return self.nominal

    def at(self, name: str, seed: int) -> Adapter:
        digest = hashlib.sha256(f"{seed} {self.seed} {name}".encode()).digest()
        return replace(self, seed=int.from_bytes(digest[:7], "big"))  # type: ignore[type-var]

    def errors(self, weight: Tensor, metric: Metric, sizes: Sequence[Any]) -> list[float]:
        """Zero: at the start the outputs are as they were."""
        return [0.0 for _ in sizes]

    def curve(self, weight: Tensor, metric: Metric, unit: str = "nbytes", *, errors: bool = True) -> Curve:
        """The adapter's one size, which costs more than dense, and dense."""
        check_finite(weight)
        self.menu(shape := (weight.shape[0], weight.shape[1]))
        size = self.sized(weight, metric)
        dense = weight.numel() * (weight.element_size() if unit == "nbytes" else 1)
        cost = cost_of(self.empty(shape, size, weight.dtype), unit)
        return Curve((size, None), (cost, dense), (0.0, 0.0), metric.error(weight))


@dataclass(frozen=True)
class Ranked(Adapter):
    """An adapter of low rank, or with low-rank bands.

    rank   of the structure; the nominal one of a band
    alpha  the structure's scale is alpha / rank; None: alpha = rank, scale 1
    seed   of what is drawn
    """

    rank: int = 8
    alpha: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"{name}(rank={self.rank!r}): an integer of at least 1")
        good = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if self.alpha is not None and not (good and math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(
                f"{name}(alpha={self.alpha!r}): a number above 0: the scale is alpha / rank; None: scale 1"
            )
        super().__post_init__()

    @property
    def nominal(self) -> int:
        return self.rank

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def term(self, shape: tuple[int, int], size: Any, dtype: torch.dtype | None, device: Any) -> Structure:
        check_rank(size, shape, f"a weight {shape}")
        return LowRank(shape, rank=size, scale=self.scale, dtype=dtype, device=device)


@dataclass(frozen=True)
class LoRA(Ranked, kind="lora"):
    """W + s · B A with A random and B = 0. [arXiv 2106.09685]

    init  of A (rank, in): "kaiming" U(−1/√in, 1/√in), or "gaussian" N(0, 1/rank²), as PEFT does both
    """

    init: str = "kaiming"

    def start_(self, term: Structure, weight: Tensor) -> Tensor:
        assert isinstance(term, LowRank)
        draw_(term, self.init, torch.Generator().manual_seed(self.seed))
        return weight


@dataclass(frozen=True)
class PiSSA(Ranked, kind="pissa"):
    """Trains the truncated SVD of the weight, √σ on both sides, and freezes the rest. [arXiv 2404.02948]

    The weight is split in two, so outputs are as before only up to rounding, in the weight's dtype. The rest
    is dense, whatever the layer was: layers that are compressed already are refused by `factorize_`.
    """

    takes: ClassVar[bool] = True

    def start_(self, term: Structure, weight: Tensor) -> Tensor:
        assert isinstance(term, LowRank)
        left, right = balanced(weight.double(), term.rank, term.scale)
        term.left.weight.copy_(left)
        term.right.weight.copy_(right)
        vars(term)["taken"] = True  # out of the base, which is another matrix now: `rankfold.adapted.taken`
        held = term.left.weight.double() @ term.right.weight.double() * term.scale
        return (weight.double() - held).to(weight.dtype)

    def errors(self, weight: Tensor, metric: Metric, sizes: Sequence[Any]) -> list[float]:
        with torch.no_grad():
            fits = [self.fit(weight.double(), metric, size) for size in sizes]
            return [metric.error(weight.double() - fit.to_dense()) for fit in fits]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What an adapter of a weight of this dtype is held in: steps of 1e-4 vanish in 16 bits."""
    return torch.promote_types(dtype, torch.float32)


def draw_(pair: Any, init: str, random: torch.Generator) -> None:
    rank, inner = pair.right.weight.shape
    if init == "kaiming":
        drawn = torch.rand(rank, inner, generator=random).mul_(2).sub_(1).mul_(inner**-0.5)
    else:
        drawn = torch.randn(rank, inner, generator=random).div_(rank)
    pair.right.weight.copy_(drawn)
    pair.left.weight.zero_()


def check_rank(rank: Any, shape: tuple[int, int], where: str) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= min(shape):
        raise ValueError(
            f"rank {rank!r} does not fit {where}: {shape[0]} x {shape[1]} allows 1 to {min(shape)}. Lower "
            "the rank, use fewer levels, or skip the layer"
        )
