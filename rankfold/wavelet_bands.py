"""Where the energy of an update lies, and what to give each band of a `Wavelet`.

The transform is orthogonal for even sides, so the bands of an update are independent problems, and each has
its truncated SVD as the best answer: ‖ΔW − W′‖² = Σ_s Σ_{k > r_s} σ²_{s,k}. One more rank in band s costs
(o_s + i_s) numbers and saves σ²_{s,k}; the best shares of a budget take the largest σ² / (o + i) first.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rankfold.structures import LowRank
from rankfold.wavelet import Wavelet
from rankfold.wavelet_transform import Taps, analyze, analyze2, band_shape, check_levels, names


def equal_ranks(rank: int, levels: int) -> dict[str, int]:
    """The same rank in all 3·levels + 1 bands."""
    return dict.fromkeys(names(levels), rank)


def count(ranks: Mapping[str, int], shape: tuple[int, int]) -> int:
    """The numbers that low-rank bands of these ranks have: Σ r_s (o_s + i_s)."""
    return sum(rank * sum(band_shape(name, shape)) for name, rank in ranks.items())


def energies(update: Tensor, taps: Taps, levels: int) -> dict[str, Tensor]:
    """σ² of each band of an update (out, in), descending, in float64."""
    bands = analyze2(update.detach().double(), taps, levels)
    return {name: torch.linalg.svdvals(band).square() for name, band in bands.items()}


def gradient_energies(
    left: Tensor | None, right: Tensor | None, shape: tuple[int, int], taps: Taps, levels: int
) -> dict[str, Tensor]:
    """The same of the gradient that moments left E[g gᵀ] (out, out) and right E[x xᵀ] (in, in) let expect, as
    if g and x were independent [K-FAC]: the products λ_k μ_k of the moments' eigenvalues in the band.

    A side may be None (identity), a number or a diagonal.
    """
    found = {}
    for name in names(levels):
        pair = [
            _spectrum(side, length, letter, int(name[2:]), taps)
            for side, length, letter in zip((left, right), shape, name[:2], strict=True)
        ]
        size = min(len(values) for values in pair)
        found[name] = pair[0][:size] * pair[1][:size]
    return found


def energy_ranks(spectra: Mapping[str, Tensor], shape: tuple[int, int], budget: int) -> dict[str, int]:
    """Ranks of the bands that keep the most energy with at most `budget` numbers; a band may get none, and is
    then absent. Raises ValueError where the budget does not pay for one."""
    offers = [
        (float(value) / sum(band_shape(name, shape)), -place, name)
        for name, values in spectra.items()
        for place, value in enumerate(values)
    ]
    ranks: dict[str, int] = {}
    left = budget
    for _, _, name in sorted(offers, key=lambda offer: offer[:2], reverse=True):
        price = sum(band_shape(name, shape))
        if price <= left:
            ranks[name] = ranks.get(name, 0) + 1
            left -= price
    if not ranks:
        least = min(sum(band_shape(name, shape)) for name in spectra)
        raise ValueError(f"a budget of {budget} numbers pays for no band of {shape}, which needs {least}")
    return {name: ranks[name] for name in spectra if name in ranks}


def nearest(update: Tensor, ranks: Mapping[str, int], taps: Taps, levels: int = 1) -> Wavelet:
    """The Wavelet of these ranks nearest to an update (out, in) in the Frobenius norm, in its dtype (exactly
    so for even sides; for odd ones the crop leaves room for a little better)."""
    shape = (update.shape[0], update.shape[1])
    check_levels(levels, shape)
    bands = analyze2(update.detach().double(), taps, levels)
    fitted = {}
    for name, rank in ranks.items():
        u, s, v = torch.linalg.svd(bands[name], full_matrices=False)
        root = s[:rank].sqrt()
        left, right = u[:, :rank] * root, root[:, None] * v[:rank]
        fitted[name] = LowRank.of(left.to(update.dtype), right.to(update.dtype))
    return Wavelet.of(shape, fitted, taps, levels)


def _spectrum(side: Tensor | None, length: int, letter: str, level: int, taps: Taps) -> Tensor:
    """Eigenvalues, descending, of T M Tᵀ for the low ("L") or high rows T of a level and a moment M."""
    if side is None or side.dim() < 2:
        ones = torch.ones(length, dtype=torch.float64, device=None if side is None else side.device)
        side = torch.diag(ones if side is None else ones * side.double())
    moment = side.double()
    for _ in range(2):
        for step in range(1, level + 1):
            moment = analyze(moment, taps)[letter == "H" and step == level]
        moment = moment.mT
    return torch.linalg.eigvalsh((moment + moment.mT) / 2).flip(0).clamp_min(0)
