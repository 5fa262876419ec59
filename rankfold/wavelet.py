"""Wavelet: a matrix held as structured sub-bands of its orthonormal wavelet transform.

    W = scale · crop(Tᵀ_out {C_s} T_in)          C_s a structure for each band s; an absent band is 0

With bands of rank r at one level W has rank up to 4r and 2r(out + in) numbers, those of a matrix of rank 2r:
it is not low rank in disguise. One low-rank pair over the *whole* transform would be (only rotated), and two
bands that share one pair have rank 2r with r(out + in)/2 numbers. [WaRA, arXiv 2506.24092]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.structure import Structure, build
from rankfold.wavelet_transform import (
    Taps,
    analyze,
    band_shape,
    check_levels,
    names,
    sides,
    synthesize,
    synthesize2,
)


class Wavelet(Structure, kind="wavelet"):
    """W = scale · crop(IDWT2({C_s})), with one inner structure a band.

    wavelet  name and `taps` low-pass filter of an orthonormal wavelet (`rankfold.wavelet_transform.filters`)
    levels   the low-low band is split so often
    bands    {name: spec}, names as "LH1": low over out, high over in, level 1. A name in place of a spec:
             the very factors of that band
    scale    of the whole matrix [alpha / rank]

    `forward` works in the bands, without building W, unless building it takes fewer multiply-adds for that
    many rows: bands of nearly full rank, see `_building_pays`.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        wavelet: str,
        taps: Sequence[float],
        levels: int,
        bands: Mapping[str, Any],
        scale: float = 1.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(shape)
        if not isinstance(wavelet, str) or not isinstance(taps, list | tuple):
            raise ValueError(f"a wavelet structure has a name and taps; got {wavelet!r} and {taps!r}")
        self.taps = Taps(wavelet, tuple(taps))
        self.levels = check_levels(levels, self.shape)
        if not isinstance(bands, Mapping) or not bands:
            raise ValueError(f"a wavelet structure has at least one band, {{name: spec}}; got {bands!r}")
        if (
            not isinstance(scale, int | float)
            or isinstance(scale, bool)
            or not math.isfinite(scale)
            or not scale
        ):
            raise ValueError(f"a wavelet structure's scale is a finite number other than 0; got {scale!r}")
        self.scale = float(scale)
        for name in bands:
            if name not in names(self.levels):
                raise ValueError(
                    f"a wavelet structure of {self.levels} levels has no band {name!r}; it has "
                    f"{', '.join(names(self.levels))}"
                )
        made = {k: v if isinstance(v, str | Structure) else build(v, dtype, device) for k, v in bands.items()}
        self._adopt(made)

    @classmethod
    def of(
        cls,
        shape: tuple[int, int],
        bands: Mapping[str, Structure | str],
        taps: Taps,
        levels: int = 1,
        scale: float = 1.0,
    ) -> Wavelet:
        """From structures of the bands, which become its children; a name means that band's factors again."""
        return cls(shape, wavelet=taps.name, taps=taps.low, levels=levels, bands=bands, scale=scale)

    def _adopt(self, bands: Mapping[str, Structure | str]) -> None:
        held = {name: band for name, band in bands.items() if not isinstance(band, str)}
        self.shared = {name: band for name, band in bands.items() if isinstance(band, str)}
        for name, band in held.items():
            if band.shape != band_shape(name, self.shape):
                raise ValueError(
                    f"band {name} of a wavelet structure {self.shape} has shape "
                    f"{band_shape(name, self.shape)}; got a structure of shape {band.shape}"
                )
        for name, other in self.shared.items():
            if other not in held or held[other].shape != band_shape(name, self.shape):
                raise ValueError(
                    f"band {name} cannot share the factors of {other!r}: that must be a band with factors of "
                    f"its own and of shape {band_shape(name, self.shape)}"
                )
        self.bands = nn.ModuleDict(held)

    def band(self, name: str) -> Structure | None:
        """The structure of a band, a shared one included; None where the band is zero."""
        name = self.shared.get(name, name)
        return self.bands[name] if name in self.bands else None  # type: ignore[return-value]

    def active(self) -> dict[str, Structure]:
        """Every band that is not zero, shared ones included."""
        found = {name: self.band(name) for name in names(self.levels)}
        return {name: band for name, band in found.items() if band is not None}

    def forward(self, x: Tensor) -> Tensor:
        if self._building_pays(x.numel() // self.shape[1]):
            return F.linear(x, self.to_dense())
        lows, highs = [x], [x]
        for _ in range(self.levels):
            low, high = analyze(lows[-1], self.taps)
            lows.append(low)
            highs.append(high)
        out = sides(self.shape[0], self.levels)
        y = self._through(f"LL{self.levels}", lows[-1])
        for level in range(self.levels, 0, -1):
            low, high = lows[level], highs[level]
            y = _plus(y, self._through(f"LH{level}", high))
            fine = _plus(self._through(f"HL{level}", low), self._through(f"HH{level}", high))
            if y is not None or fine is not None:
                y = synthesize(y, fine, self.taps, out[level - 1])
        assert y is not None
        return y if self.scale == 1 else y * self.scale

    def _through(self, name: str, x: Tensor) -> Tensor | None:
        """A band applied to its input. Autocast halves the product, not the transform around it."""
        band = self.band(name)
        return None if band is None else band(x).to(x.dtype)

    def _building_pays(self, rows: int) -> bool:
        """Whether building W and one product take fewer multiply-adds for so many rows than the bands do."""
        out, inner = self.shape
        return rows * (self._banded - out * inner) > self._building

    @property
    def _banded(self) -> int:
        """Multiply-adds of one row through analysis, bands and synthesis."""
        taps = len(self.taps.low)
        wide = sum(2 * taps * sum(sides(side, self.levels)[1:]) for side in self.shape)
        return wide + sum(band.macs for band in self.active().values())

    @property
    def _building(self) -> int:
        """Multiply-adds of building W: every band from its factors (r · out · in for a rank r), then the
        inverse transform."""
        out, inner = (sides(side, self.levels) for side in self.shape)
        bands = self.active().values()
        total = sum(band.macs * band.shape[0] * band.shape[1] // sum(band.shape) for band in bands)
        for level in range(self.levels):
            total += len(self.taps.low) * out[level] * (inner[level] + 2 * inner[level + 1])
        return total

    @property
    def macs(self) -> int:
        return min(self._banded, self.shape[0] * self.shape[1])

    def to_dense(self) -> Tensor:
        bands = {name: band.to_dense() for name, band in self.active().items()}
        full = synthesize2(bands, self.taps, self.levels, self.shape)
        return full.contiguous() if self.scale == 1 else full * self.scale

    def rows(self, index: Tensor) -> Tensor:
        factors = self.factors()
        if factors is not None:
            return F.embedding(index, factors[0]) @ factors[1]
        if index.numel() * (len(self.taps.low) // 2) ** self.levels >= self.shape[0]:
            return F.embedding(index, self.to_dense())
        rows = self._low_rows(index, 0)
        assert rows is not None, "a matrix has at least one band"
        return rows if self.scale == 1 else rows * self.scale

    def _low_rows(self, index: Tensor, level: int) -> Tensor | None:
        """Rows of the low-low part after `level` levels, W itself at 0: each from those few rows of the bands
        that `synthesize` makes it of. None where those bands are zero."""
        if level == self.levels:
            return self._band_rows(f"LL{level}", index)
        half, count = sides(self.shape[0], level + 1)[-1], len(self.taps.low)
        parity, middle = index % 2, index // 2
        left = right = None  # low and high over the input side
        for step in range(0, count, 2):
            # Row 2m takes the one of two taps, row 2m + 1 the other.
            pair = [step + (side + 1 + count // 2) % 2 for side in (0, 1)]
            shift = index.new_tensor([(place + 1 - count // 2) // 2 for place in pair])[parity]
            here = (middle - shift) % half
            for letter, taps in (("L", self.taps.low), ("H", self.taps.high)):
                weight = torch.tensor([taps[place] for place in pair], dtype=self.dtype, device=index.device)
                weight = weight[parity][..., None]
                deeper = letter == "L"
                low = self._low_rows(here, level + 1) if deeper else self._band_rows(f"HL{level + 1}", here)
                high = self._band_rows(f"{letter}H{level + 1}", here)
                left = _plus(left, None if low is None else low * weight)
                right = _plus(right, None if high is None else high * weight)
        if left is None and right is None:
            return None
        return synthesize(left, right, self.taps, sides(self.shape[1], level + 1)[level])

    def _band_rows(self, name: str, index: Tensor) -> Tensor | None:
        band = self.band(name)
        return None if band is None else band.rows(index)

    def factors(self) -> tuple[Tensor, ...] | None:
        """left (out, R) and right (R, in) with W = left right, R the ranks of all bands together: each band's
        own factors, put through the inverse transform. None where a band is not a product of two."""
        lefts, rights = [], []
        for name, band in self.active().items():
            pair = band.factors()
            if pair is None or len(pair) != 2:
                return None
            level = int(name[2:])
            lefts.append(self._lifted(pair[0].mT, name[0], level, self.shape[0]).mT)
            rights.append(self._lifted(pair[1], name[1], level, self.shape[1]))
        left = torch.cat(lefts, 1)
        return left if self.scale == 1 else left * self.scale, torch.cat(rights)

    def _lifted(self, rows: Tensor, letter: str, level: int, side: int) -> Tensor:
        """Rows (r, ·) of a band's low ("L") or high side as rows (r, side) of the whole."""
        lengths = sides(side, level)
        rows = synthesize(*((rows, None) if letter == "L" else (None, rows)), self.taps, lengths[level - 1])
        for above in range(level - 2, -1, -1):
            rows = synthesize(rows, None, self.taps, lengths[above])
        return rows

    def sizes(self) -> dict[str, Any]:
        held = self.active()
        specs = {name: self.shared.get(name) or band.spec() for name, band in held.items()}
        sizes = {
            "wavelet": self.taps.name,
            "taps": list(self.taps.low),
            "levels": self.levels,
            "bands": specs,
        }
        return sizes if self.scale == 1 else {**sizes, "scale": self.scale}

    def extra_repr(self) -> str:
        ranks = {name: getattr(band, "rank", band.kind) for name, band in self.active().items()}
        return f"shape={self.shape}, wavelet={self.taps.name}, bands={ranks}, scale={self.scale:g}"


def _plus(one: Tensor | None, two: Tensor | None) -> Tensor | None:
    return one if two is None else two if one is None else one + two
