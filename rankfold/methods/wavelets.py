"""Adapters in the sub-bands of a wavelet transform, beside a frozen weight; zero at the start.

    WaRA      W + s · IDWT({B_s A_s})        one pair of factors for each band s
    WaveFT    W + s · IDWT(C)                C sparse: coefficients at random places of the whole transform
    TinyWaRA  W + s · IDWT({U_s M_s V_sᵀ})   U_s, V_s the leading singular vectors of the band of W, fixed;
                                             the small M_s trains

Outputs are as they were, bit for bit. [WaRA: arXiv 2506.24092; WaveFT: 2505.12532]
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankfold.cored import CORES, Cored
from rankfold.methods.adapter import Adapter, Ranked, check_rank, draw_
from rankfold.metric import Metric
from rankfold.sparse import Sparse
from rankfold.structure import Structure
from rankfold.structures import LowRank
from rankfold.wavelet import Wavelet
from rankfold.wavelet_bands import count, energies, energy_ranks, equal_ranks, gradient_energies
from rankfold.wavelet_transform import Taps, analyze2, band_shape, check_levels, filters, names


@dataclass(frozen=True)
class WaRA(Ranked, kind="wara"):
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
        _check_wavelet(self, self.wavelet, self.levels)
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
        taps = _taps(self.wavelet, self.levels, shape)
        ranks = size if isinstance(size, Mapping) else self._equal()
        for name, rank in ranks.items():
            check_rank(rank, band_shape(name, shape), f"band {name} of a weight {shape}")
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
                draw_(term.bands[name], self.init, random)
        return weight

    def sized(self, weight: Tensor, metric: Metric) -> Any:
        if self.bands != "energy":
            return self.rank
        shape = (weight.shape[0], weight.shape[1])
        taps = _taps(self.wavelet, self.levels, shape)
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


@dataclass(frozen=True)
class WaveFT(Adapter, kind="waveft"):
    """W + scale · IDWT(C), C zero but for trained coefficients at fixed random places. [arXiv 2505.12532]

    coefficients  how many, in each layer; drawn without replacement out of all bands' entries
    scale         of the whole update. It and the count are PEFT's defaults (0.21)
    wavelet, levels  as in WaRA; PEFT has one level
    seed          of the places

    The update has few numbers and, from about as many coefficients as it has rows, nearly full rank, so there
    is no LoRA of it. Places follow from the seed and the layer's name, differ from layer to layer, and are
    saved: 4 bytes each, beside 4 of the coefficient. ValueError for more coefficients than W has entries.
    """

    coefficients: int = 2592
    scale: float = 25.0
    wavelet: str = "db1"
    levels: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.coefficients, int) or isinstance(self.coefficients, bool):
            raise ValueError(f"WaveFT(coefficients={self.coefficients!r}): an integer of at least 1")
        if self.coefficients < 1:
            raise ValueError(f"WaveFT(coefficients={self.coefficients}): an integer of at least 1")
        good = isinstance(self.scale, int | float) and not isinstance(self.scale, bool)
        if not (good and math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"WaveFT(scale={self.scale!r}): a number above 0")
        _check_wavelet(self, self.wavelet, self.levels)

    @property
    def nominal(self) -> int:
        return self.coefficients

    def places(self, shape: tuple[int, int], coefficients: int) -> dict[str, Tensor]:
        """{band: flat places, ascending} of the coefficients of a weight (out, in); a band that none falls
        into is absent. Every choice of places in the transform is equally likely."""
        entries = shape[0] * shape[1]
        if not isinstance(coefficients, int) or not 1 <= coefficients <= entries:
            raise ValueError(
                f"{coefficients} coefficients do not fit a weight {shape}: {shape[0]} x {shape[1]} has "
                f"{entries} entries. Take fewer, or skip the layer"
            )
        bands = {name: math.prod(band_shape(name, shape)) for name in names(self.levels)}
        random = torch.Generator().manual_seed(self.seed)
        drawn = Sparse.draw((1, sum(bands.values())), coefficients, random).long()
        found, first = {}, 0
        for name, size in bands.items():
            inside = drawn[(drawn >= first) & (drawn < first + size)] - first
            if len(inside):
                found[name] = inside
            first += size
        return found

    def term(self, shape: tuple[int, int], size: Any, dtype: torch.dtype | None, device: Any) -> Wavelet:
        taps = _taps(self.wavelet, self.levels, shape)
        bands: dict[str, Structure | str] = {
            name: Sparse(band_shape(name, shape), nonzeros=len(places), dtype=dtype, device=device)
            for name, places in self.places(shape, size).items()
        }
        return Wavelet.of(shape, bands, taps, self.levels, self.scale)

    def start_(self, term: Structure, weight: Tensor) -> Tensor:
        assert isinstance(term, Wavelet)
        held = sum(band.params for band in term.active().values())
        for name, places in self.places(term.shape, held).items():
            band = term.bands[name]
            assert isinstance(band, Sparse)
            band.values.zero_()
            band.places.copy_(places)
        return weight


@dataclass(frozen=True)
class TinyWaRA(Ranked, kind="wara_tiny"):
    """W + s · IDWT({U_s M_s V_sᵀ}), U_s Σ_s V_sᵀ the truncated SVD of each band of W. Experimental.

    The paper says of Tiny-WaRA that it trains "a small set of coefficients in a fixed basis from a truncated
    SVD of the pretrained weight", and no more that we could read. This is our reading: a basis for each band,
    of orthonormal columns (Σ_s is left out), and M_s = 0 at the start. [arXiv 2506.24092, v2]

    core     "full": M_s is (rank, rank), so that every leading direction may feed every other. "diagonal":
             rank numbers, which only strengthen and weaken what the band has
    wavelet, levels  as in WaRA

    (3·levels + 1) · rank² or · rank numbers a layer, whatever its size, and rank up to (3·levels + 1) · rank.
    The bases are buffers: they never train, and are saved, since an SVD on another machine may turn them.
    """

    wavelet: str = "db1"
    levels: int = 1
    core: str = "full"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_wavelet(self, self.wavelet, self.levels)
        if self.core not in CORES:
            raise ValueError(f"TinyWaRA(core={self.core!r}): choose one of {', '.join(CORES)}")

    def term(self, shape: tuple[int, int], size: Any, dtype: torch.dtype | None, device: Any) -> Wavelet:
        taps = _taps(self.wavelet, self.levels, shape)
        bands: dict[str, Structure | str] = {}
        for name in names(self.levels):
            inner = band_shape(name, shape)
            check_rank(size, inner, f"band {name} of a weight {shape}")
            bands[name] = Cored(inner, rank=size, core=self.core, dtype=dtype, device=device)
        return Wavelet.of(shape, bands, taps, self.levels, self.scale)

    def start_(self, term: Structure, weight: Tensor) -> Tensor:
        assert isinstance(term, Wavelet)
        for name, matrix in analyze2(weight.double(), term.taps, term.levels).items():
            band = term.bands[name]
            assert isinstance(band, Cored)
            left, _, right = torch.linalg.svd(matrix, full_matrices=False)
            band.left.copy_(left[:, : band.rank])
            band.right.copy_(right[: band.rank])
            band.weights.zero_()
        return weight


def _check_wavelet(method: Adapter, wavelet: str, levels: Any) -> None:
    """Raise ValueError for a wavelet that does not exist or is not orthogonal, and for no count of levels."""
    with contextlib.suppress(ImportError):  # reports are read without PyWavelets too; `menu` asks again
        filters(wavelet)
    if not isinstance(levels, int) or isinstance(levels, bool) or levels < 1:
        raise ValueError(f"{type(method).__name__}(levels={levels!r}): an integer of at least 1")


def _taps(wavelet: str, levels: int, shape: tuple[int, int]) -> Taps:
    """The filter. Raises ValueError where the shape has fewer levels."""
    check_levels(levels, shape)
    return filters(wavelet)


def _check_ranks(ranks: Mapping[str, int], levels: int) -> None:
    wrong = [name for name in ranks if name not in names(levels)]
    if wrong or not ranks:
        raise ValueError(
            f"WaRA(bands={dict(ranks)!r}): {levels} levels have the bands {', '.join(names(levels))}"
        )
