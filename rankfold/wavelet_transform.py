"""The orthonormal wavelet transform of vectors and of matrices, in torch: any dtype and device, autograd, no
buffers.

    low[k] = Σᵢ hᵢ x[2k + 1 − L/2 + i],   high[k] = Σᵢ gᵢ x[2k + 1 − L/2 + i],   gᵢ = (−1)ⁱ h[L−1−i]

Indices wrap around (periodization), so n numbers give n numbers; an odd n is padded with one zero first, and
the inverse is cropped: bands have ⌈n/2⌉ entries. For even n the map is orthogonal. For every n `synthesize`
is the adjoint of `analyze`, and undoes it: synthesize(analyze(x)) = x.
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

HAAR = (math.sqrt(0.5), math.sqrt(0.5))
LONGEST = 512  # taps; the longest of PyWavelets has 102
TOLERANCE = 1e-6  # of Σ h[i] h[i + 2m]: PyWavelets' tables are exact to 1e-12, its dmey to 1e-7


@dataclass(frozen=True)
class Taps:
    """The low-pass filter h of an orthonormal wavelet, in the order in which it meets the signal, and the
    wavelet's name, which says where the numbers are from and is not used. Raises ValueError for a filter that
    is not orthonormal: its transform has no adjoint that inverts it."""

    name: str
    low: tuple[float, ...]

    def __post_init__(self) -> None:
        check_taps(self.name, self.low)

    @property
    def high(self) -> tuple[float, ...]:
        return tuple(tap if place % 2 == 0 else -tap for place, tap in enumerate(reversed(self.low)))


def check_taps(name: Any, low: Any) -> None:
    """Raise ValueError where `low` is no orthonormal filter: Σ h[i] h[i + 2m] is 1 for m = 0, else 0."""
    good = isinstance(low, list | tuple) and 2 <= len(low) <= LONGEST and len(low) % 2 == 0
    if not good or not all(type(tap) in (int, float) and math.isfinite(tap) for tap in low):
        raise ValueError(
            f"wavelet {name!r}: its taps are between 2 and {LONGEST} finite numbers, an even count"
        )
    for shift in range(0, len(low), 2):
        product = math.fsum(one * two for one, two in zip(low, low[shift:], strict=False))
        if abs(product - (shift == 0)) > TOLERANCE:
            raise ValueError(
                f"wavelet {name!r} is not orthonormal: Σ h[i] h[i + {shift}] is {product:.6g}, not "
                f"{int(shift == 0)}"
            )


def filters(name: str) -> Taps:
    """The taps of an orthogonal wavelet of PyWavelets: "db1", "db2", …, "sym4", "coif1", … ("db1", which is
    "haar", is known without that package).

    Raises ValueError for a name that does not exist, with the nearest ones, and for a wavelet that is not
    orthogonal; ImportError without PyWavelets.
    """
    if name in ("db1", "haar"):
        return Taps(name, HAAR)
    try:
        pywt: Any = importlib.import_module("pywt")
    except ImportError as error:
        raise ImportError(
            f"wavelet {name!r} needs PyWavelets: pip install 'rankfold[wavelet]'; 'db1' (Haar) works without"
        ) from error
    known = pywt.wavelist(kind="discrete")
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"Unknown wavelet {name!r}.{hint} Families: db, sym, coif, haar, dmey")
    wavelet: Any = pywt.Wavelet(name)
    if not wavelet.orthogonal:
        raise ValueError(
            f"wavelet {name!r} is biorthogonal, and an orthogonal one is needed: the inverse transform must "
            "be the transpose. Choose one of db, sym, coif, e.g. 'sym4'"
        )
    return Taps(name, tuple(float(tap) for tap in reversed(wavelet.dec_lo)))


def analyze(x: Tensor, taps: Taps) -> tuple[Tensor, Tensor]:
    """(low, high), each (..., ⌈n/2⌉), of x (..., n)."""
    if x.shape[-1] % 2:
        x = F.pad(x, (0, 1))
    halves = x[..., 0::2], x[..., 1::2]
    low = high = None
    for place, (h, g) in enumerate(zip(taps.low, taps.high, strict=True)):
        shift, side = divmod(place + 1 - len(taps.low) // 2, 2)
        part = _rolled(halves[side], -shift)
        low = part * h if low is None else low + part * h
        high = part * g if high is None else high + part * g
    assert low is not None and high is not None
    return low, high


def synthesize(low: Tensor | None, high: Tensor | None, taps: Taps, n: int) -> Tensor:
    """x (..., n) of low and high (..., ⌈n/2⌉); None stands for zeros, and one of the two is given."""
    halves: list[Tensor | None] = [None, None]
    for place, (h, g) in enumerate(zip(taps.low, taps.high, strict=True)):
        shift, side = divmod(place + 1 - len(taps.low) // 2, 2)
        parts = [band * tap for band, tap in ((low, h), (high, g)) if band is not None]
        part = _rolled(parts[0] if len(parts) == 1 else parts[0] + parts[1], shift)
        held = halves[side]
        halves[side] = part if held is None else held + part
    even, odd = halves
    assert even is not None and odd is not None
    x = torch.stack((even, odd), -1).flatten(-2)
    return x if x.shape[-1] == n else x[..., :n]


def analyze2(matrix: Tensor, taps: Taps, levels: int) -> dict[str, Tensor]:
    """The bands of a matrix (out, in): "LH1" is low over out and high over in at level 1, "LL2" what is low
    over both after two levels. 3·levels + 1 of them, by falling level."""
    bands: dict[str, Tensor] = {}
    for level in range(1, levels + 1):
        halves = analyze(matrix, taps)
        quarters = [analyze(half.mT, taps) for half in halves]
        (matrix, rough), (left, fine) = ((low.mT, high.mT) for low, high in quarters)
        bands = {f"LH{level}": left, f"HL{level}": rough, f"HH{level}": fine, **bands}
    return {f"LL{levels}": matrix, **bands}


def synthesize2(bands: Mapping[str, Tensor], taps: Taps, levels: int, shape: tuple[int, int]) -> Tensor:
    """The matrix (out, in) of `shape` with these bands; absent ones are zero. At least one is given."""
    out, inner = (sides(side, levels) for side in shape)
    matrix = bands.get(f"LL{levels}")
    for level in range(levels, 0, -1):
        pairs = ((matrix, bands.get(f"HL{level}")), (bands.get(f"LH{level}"), bands.get(f"HH{level}")))
        low, high = (
            None
            if one is None and two is None
            else synthesize(*(b if b is None else b.mT for b in (one, two)), taps, out[level - 1]).mT
            for one, two in pairs
        )
        if low is not None or high is not None:
            matrix = synthesize(low, high, taps, inner[level - 1])
    assert matrix is not None, "a matrix has at least one band"
    return matrix


def names(levels: int) -> list[str]:
    """The names of all bands, by falling level."""
    details = [f"{kind}{level}" for level in range(levels, 0, -1) for kind in ("LH", "HL", "HH")]
    return [f"LL{levels}", *details]


def sides(n: int, levels: int) -> list[int]:
    """n, ⌈n/2⌉, ⌈n/4⌉, …: the side before any level, and after each."""
    found = [n]
    for _ in range(levels):
        found.append((found[-1] + 1) // 2)
    return found


def band_shape(name: str, shape: tuple[int, int]) -> tuple[int, int]:
    """The shape of a band of a matrix of `shape`."""
    level = int(name[2:])
    return sides(shape[0], level)[level], sides(shape[1], level)[level]


def deepest(shape: tuple[int, int]) -> int:
    """How often both sides can be halved while two entries are left to split."""
    return math.ceil(math.log2(min(shape))) if min(shape) > 1 else 0


def check_levels(levels: Any, shape: tuple[int, int]) -> int:
    """`levels` as an int. Raises ValueError, with both numbers, where a matrix of `shape` has fewer."""
    if not isinstance(levels, int) or isinstance(levels, bool) or levels < 1:
        raise ValueError(f"levels={levels!r} is a number of halvings, at least 1")
    if levels > deepest(shape):
        raise ValueError(
            f"levels={levels} is too deep for a matrix {shape}: its smaller side {min(shape)} can be halved "
            f"{deepest(shape)} times. Use fewer levels, or skip the layer"
        )
    return levels


def _rolled(x: Tensor, shift: int) -> Tensor:
    return x.roll(shift, -1) if shift % max(x.shape[-1], 1) else x
