"""Adapters: the weight stays as it is and frozen, and something small beside it trains.

    LoRA    W + s · B A                      B = 0 at the start
    WaRA    W + s · IDWT({B_s A_s})          one pair for each sub-band, all B_s = 0 at the start
    PiSSA   (W − s · B A) + s · B A          s · B A the truncated SVD of W: trains its principal part

s = alpha / rank. LoRA and WaRA leave outputs as they were, bit for bit (`rankfold.hosts`), PiSSA up to
rounding. Factors are at least float32. [LoRA: arXiv 2106.09685; WaRA: 2506.24092; PiSSA: 2404.02948]
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
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
from rankfold.wavelet import Wavelet
from rankfold.wavelet_bands import count, energies, energy_ranks, equal_ranks, gradient_energies
from rankfold.wavelet_transform import Taps, band_shape, check_levels, filters, names

INITS = ("kaiming", "gaussian")


@dataclass(frozen=True)
class Adapter(Method):
    """A method that keeps the weight, frozen, and puts a trained structure beside it: Sum(Dense, structure).

    rank   of the structure; the nominal one of a band
    alpha  the structure's scale is alpha / rank; None: alpha = rank, scale 1
    seed   with the layer's name, of what is drawn: all processes of a run draw the same
    """

    costly: ClassVar[bool] = True
    adds: ClassVar[bool] = True

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
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"{name}(seed={self.seed!r}): an integer")
        if (init := getattr(self, "init", INITS[0])) not in INITS:  # of those that draw
            raise ValueError(f"{name}(init={init!r}): choose one of {', '.join(INITS)}")

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def term(self, shape: tuple[int, int], size: Any, dtype: torch.dtype | None, device: Any) -> Structure:
        """An unfilled adapter of this size: a low-rank one."""
        _check_rank(size, shape, f"a weight {shape}")
        return LowRank(shape, rank=size, scale=self.scale, dtype=dtype, device=device)

    @abstractmethod
    def start_(self, term: Structure, weight: Tensor) -> Tensor:
        """Fill an adapter; returns the base, a weight that with it has the outputs of `weight`."""

    def menu(self, shape: tuple[int, int]) -> list[Any]:
        """The one size that the options name. Raises ValueError where the shape is too small for it."""
        self.term(shape, self.rank, None, "meta")
        return [self.rank]

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
        size = self.sized(weight, metric) if size == self.rank else size
        # By way of meta: layers draw their start from the global generator, which is not ours to move.
        term = self.term(shape, size, _wide(weight.dtype), "meta").to_empty(device=weight.device)
        with torch.no_grad():
            base = Dense.of(self.start_(term, weight))
        return Sum.of(base.requires_grad_(False), term, frozen=True)

    def sized(self, weight: Tensor, metric: Metric) -> Any:
        """The size for one weight, where it depends on more than the shape."""
        return self.rank

    def at(self, name: str, seed: int) -> Adapter:
        digest = hashlib.sha256(f"{seed} {self.seed} {name}".encode()).digest()
        return replace(self, seed=int.from_bytes(digest[:7], "big"))

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
class LoRA(Adapter, kind="lora"):
    """W + s · B A with A random and B = 0. [arXiv 2106.09685]

    init  of A (rank, in): "kaiming" U(−1/√in, 1/√in), or "gaussian" N(0, 1/rank²), as PEFT does both
    """

    init: str = "kaiming"

    def start_(self, term: Structure, weight: Tensor) -> Tensor:
        assert isinstance(term, LowRank)
        _draw_(term, self.init, torch.Generator().manual_seed(self.seed))
        return weight


@dataclass(frozen=True)
class WaRA(Adapter, kind="wara"):
    """W + s · IDWT({B_s A_s}): low-rank factors in the sub-bands of a wavelet transform. [arXiv 2506.24092]

    domain   "weight": every band has factors of its own, rank up to (3·levels + 1) · rank, numbers of LoRA at
             rank · (3 − 2^(1 − levels)).
             "feature": all bands of input and output share one pair, which is ΔW = Lᵀ(BA)L + Hᵀ(BA)H: rank
             2 · rank with half of LoRA's numbers, one level
    wavelet  "db1" (Haar), or any orthogonal one of PyWavelets ("db2", "sym4", …);  levels of the transform
    bands    "equal": rank in each. "energy": the same count of numbers, to the bands where the energy is; a
             band may get none. Or the ranks themselves, {"LL1": 16, "HH1": 2}; bands left out are zero
    of       whose energy: "weight", the bands of W itself; "gradient", the gradient that the layer's metric
             expects (a recipe with metric KFAC())
    init     as in LoRA, of every A_s

    `rank` is the nominal one of a band, and alpha / rank scales the whole. Where a band has fewer rows or
    columns than its rank, ValueError.
    """

    wavelet: str = "db1"
    levels: int = 1
    domain: str = "weight"
    bands: str | Mapping[str, int] = "equal"
    of: str = "weight"
    init: str = "kaiming"

    def __post_init__(self) -> None:
        super().__post_init__()
        with contextlib.suppress(ImportError):  # reports are read without PyWavelets too; `menu` asks again
            filters(self.wavelet)
        if not isinstance(self.levels, int) or isinstance(self.levels, bool) or self.levels < 1:
            raise ValueError(f"WaRA(levels={self.levels!r}): an integer of at least 1")
        if self.domain == "tokens":
            raise ValueError(
                "WaRA(domain='tokens'): that reading changes activations on a grid of tokens, not the "
                "weight; wrap the layer in rankfold.token_wavelet.TokenWara"
            )
        for option, value, known in (
            ("domain", self.domain, ("weight", "feature")),
            ("of", self.of, ("weight", "gradient")),
        ):
            if value not in known:
                raise ValueError(f"WaRA({option}={value!r}): choose one of {', '.join(known)}")
        if self.domain == "feature" and (self.levels != 1 or self.bands != "equal"):
            raise ValueError(
                f"WaRA(domain='feature', levels={self.levels}, bands={self.bands!r}): the bands share one "
                "pair of factors, so there is one level and nothing to distribute"
            )
        if isinstance(self.bands, Mapping):
            _check_ranks(self.bands, self.levels)
        elif self.bands not in ("equal", "energy"):
            raise ValueError(
                f"WaRA(bands={self.bands!r}): choose 'equal', 'energy' or ranks such as {{'LL1': 16}}"
            )

    def term(self, shape: tuple[int, int], size: Any, dtype: torch.dtype | None, device: Any) -> Wavelet:
        """`size` is the nominal rank, or the ranks of the bands."""
        taps = self._checked(shape)
        ranks = size if isinstance(size, Mapping) else self._equal()
        for name, rank in ranks.items():
            _check_rank(rank, band_shape(name, shape), f"band {name} of a weight {shape}")
        bands: dict[str, Structure | str] = {
            name: LowRank(band_shape(name, shape), rank=rank, dtype=dtype, device=device)
            for name, rank in ranks.items()
        }
        shared = {"HH1": "LL1"} if self.domain == "feature" else {}
        return Wavelet.of(shape, bands | shared, taps, self.levels, self.scale)

    def start_(self, term: Structure, weight: Tensor) -> Tensor:
        assert isinstance(term, Wavelet)
        random = torch.Generator().manual_seed(self.seed)
        for name in names(self.levels):
            if name in term.bands:
                _draw_(term.bands[name], self.init, random)
        return weight

    def sized(self, weight: Tensor, metric: Metric) -> Any:
        if self.bands != "energy":
            return self.rank
        shape = (weight.shape[0], weight.shape[1])
        taps = self._checked(shape)
        if self.of == "weight":
            spectra = energies(weight, taps, self.levels)
        elif metric.left is None and metric.right is None:
            raise ValueError(
                "WaRA(of='gradient') reads the expected gradient from the layer's metric, and there is none: "
                "give the recipe one, dataclasses.replace(recipe, metric=KFAC()), or use of='weight'"
            )
        else:
            spectra = gradient_energies(metric.left, metric.right, shape, taps, self.levels)
        return energy_ranks(spectra, shape, count(equal_ranks(self.rank, self.levels), shape))

    def _equal(self) -> dict[str, int]:
        if isinstance(self.bands, Mapping):
            return dict(self.bands)
        return {"LL1": self.rank} if self.domain == "feature" else equal_ranks(self.rank, self.levels)

    def _checked(self, shape: tuple[int, int]) -> Taps:
        check_levels(self.levels, shape)
        return filters(self.wavelet)


@dataclass(frozen=True)
class PiSSA(Adapter, kind="pissa"):
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


def _draw_(pair: Any, init: str, random: torch.Generator) -> None:
    rank, inner = pair.right.weight.shape
    if init == "kaiming":
        drawn = torch.rand(rank, inner, generator=random).mul_(2).sub_(1).mul_(inner**-0.5)
    else:
        drawn = torch.randn(rank, inner, generator=random).div_(rank)
    pair.right.weight.copy_(drawn)
    pair.left.weight.zero_()


def _check_rank(rank: Any, shape: tuple[int, int], where: str) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= min(shape):
        raise ValueError(
            f"rank {rank!r} does not fit {where}: {shape[0]} x {shape[1]} allows 1 to {min(shape)}. Lower "
            "the rank, use fewer levels, or skip the layer"
        )


def _check_ranks(ranks: Mapping[str, int], levels: int) -> None:
    wrong = [name for name in ranks if name not in names(levels)]
    if wrong or not ranks:
        raise ValueError(
            f"WaRA(bands={dict(ranks)!r}): {levels} levels have the bands {', '.join(names(levels))}"
        )
