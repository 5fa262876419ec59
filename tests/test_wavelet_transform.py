"""The transform against PyWavelets, its inverse, its adjoint, and what it refuses."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankfold.wavelet_transform import (
    Taps,
    analyze,
    analyze2,
    band_shape,
    check_levels,
    deepest,
    filters,
    names,
    sides,
    synthesize,
    synthesize2,
)

pywt: Any = pytest.importorskip("pywt")
WAVELETS = ("haar", "db1", "db2", "db7", "sym4", "coif2")


def matrix_of(n: int, name: str) -> Tensor:
    """T (2⌈n/2⌉, n), low rows first."""
    low, high = analyze(torch.eye(n, dtype=torch.float64), filters(name))
    return torch.cat([low, high], 1).mT


def test_a_worked_example() -> None:
    bands = analyze2(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64), filters("haar"), 1)
    found = {name: round(float(band), 12) + 0.0 for name, band in bands.items()}
    assert found == {"LL1": 5.0, "LH1": -1.0, "HL1": -2.0, "HH1": 0.0}


@pytest.mark.filterwarnings("ignore:Level value of 3 is too high")  # more wraps around; it is the same map
@pytest.mark.parametrize("name", WAVELETS)
def test_bands_are_those_of_pywavelets(name: str) -> None:
    """With cH = our HL (high over out) and cV = our LH. At odd sides PyWavelets repeats the last entry where
    we pad with a zero, so it is given the padded matrix."""
    for shape in ((16, 24), (2, 4), (6, 10)):
        x = torch.randn(shape, dtype=torch.float64)
        ll, (ch, cv, cd) = pywt.dwt2(x.numpy(), name, mode="periodization")
        mine = analyze2(x, filters(name), 1)
        for band, theirs in (("LL1", ll), ("HL1", ch), ("LH1", cv), ("HH1", cd)):
            np.testing.assert_allclose(mine[band].numpy(), theirs, atol=1e-11)
    x = torch.randn(7, 9, dtype=torch.float64)
    padded = np.pad(x.numpy(), ((0, 1), (0, 1)))
    np.testing.assert_allclose(
        analyze2(x, filters(name), 1)["LL1"].numpy(),
        pywt.dwt2(padded, name, mode="periodization")[0],
        atol=1e-11,
    )
    deep = torch.randn(16, 32, dtype=torch.float64)
    coefficients = pywt.wavedec2(deep.numpy(), name, mode="periodization", level=3)
    mine = analyze2(deep, filters(name), 3)
    np.testing.assert_allclose(mine["LL3"].numpy(), coefficients[0], atol=1e-11)
    np.testing.assert_allclose(mine["HL1"].numpy(), coefficients[3][0], atol=1e-11)
    np.testing.assert_allclose(mine["LH2"].numpy(), coefficients[2][1], atol=1e-11)


def test_every_orthogonal_wavelet_of_pywavelets() -> None:
    for name in pywt.wavelist(kind="discrete"):
        if pywt.Wavelet(name).orthogonal and name != "dmey":  # dmey is orthogonal in name: ‖h‖² = 1.002
            taps, high = filters(name), list(reversed(pywt.Wavelet(name).dec_hi))
            np.testing.assert_allclose(taps.high, high, atol=1e-12)
            t = matrix_of(16, name)
            assert torch.allclose(t @ t.mT, torch.eye(16, dtype=torch.float64), atol=1e-8), name


@pytest.mark.parametrize("name", ["db1", "db2", "sym4", "db7"])
@pytest.mark.parametrize("shape", [(2, 2), (7, 10), (16, 15), (9, 9), (5, 3), (32, 6)])
def test_perfect_reconstruction_and_sizes(name: str, shape: tuple[int, int]) -> None:
    taps = filters(name)
    for levels in range(1, deepest(shape) + 1):
        x = torch.randn(shape, dtype=torch.float64)
        bands = analyze2(x, taps, levels)
        assert list(bands) == names(levels)
        for band, value in bands.items():
            assert tuple(value.shape) == band_shape(band, shape)
        torch.testing.assert_close(synthesize2(bands, taps, levels, shape), x, atol=1e-10, rtol=0)
    x = torch.randn(shape)
    torch.testing.assert_close(synthesize2(analyze2(x, taps, 1), taps, 1, shape), x, atol=2e-6, rtol=0)
    half = torch.randn(shape).bfloat16()
    again = synthesize2(analyze2(half, taps, 1), taps, 1, shape)
    assert again.dtype == torch.bfloat16
    torch.testing.assert_close(again, half, atol=0.08, rtol=0.05)


def test_band_sizes_are_not_those_of_the_default_mode_of_pywavelets() -> None:
    assert pywt.dwt2(np.zeros((7, 10)), "db2")[0].shape == (5, 6)
    assert band_shape("LL1", (7, 10)) == (4, 5) and band_shape("HH2", (7, 10)) == (2, 3)
    assert sides(15, 3) == [15, 8, 4, 2]


def test_orthogonality() -> None:
    """Even sides: a rotation, so norms stay. Odd ones: the padded map is, and only the crop is not."""
    for name, tolerance in (("haar", 1e-15), ("db2", 1e-12), ("sym4", 1e-9)):
        t = matrix_of(16, name)
        assert (t @ t.mT - torch.eye(16, dtype=torch.float64)).abs().max() < tolerance * 10
        x = torch.randn(16, 10, dtype=torch.float64)
        norm = sum(
            band.square().sum() for band in analyze2(x, filters(name), 2 if name == "haar" else 1).values()
        )
        torch.testing.assert_close(norm, x.square().sum(), rtol=1e-8, atol=0)
    t = matrix_of(15, "db2")
    assert t.shape == (16, 15)
    assert (t @ t.mT - torch.eye(16, dtype=torch.float64)).abs().max() > 0.3
    assert torch.allclose(t.mT @ t, torch.eye(15, dtype=torch.float64), atol=1e-11)
    assert float(analyze2(torch.ones(2, 2), filters("haar"), 1)["LL1"]) == pytest.approx(2.0)  # 1/√2 an axis


@given(st.integers(1, 20), st.sampled_from(["db1", "db2", "sym4"]))
def test_synthesis_is_the_adjoint_of_analysis(n: int, name: str) -> None:
    taps, half = filters(name), (n + 1) // 2
    x, low, high = (torch.randn(3, size, dtype=torch.float64) for size in (n, half, half))
    one, two = analyze(x, taps)
    left = (one * low).sum() + (two * high).sum()
    torch.testing.assert_close(left, (x * synthesize(low, high, taps, n)).sum(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        synthesize(low, None, taps, n) + synthesize(None, high, taps, n), synthesize(low, high, taps, n)
    )


def test_gradcheck() -> None:
    taps = filters("db2")

    def there(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(analyze2(x, taps, 2).values())

    def back(*bands: Tensor) -> Tensor:
        return synthesize2(dict(zip(names(2), bands, strict=True)), taps, 2, (5, 6))

    assert torch.autograd.gradcheck(there, torch.randn(5, 6, dtype=torch.float64, requires_grad=True))
    bands = [torch.randn(band_shape(n, (5, 6)), dtype=torch.float64, requires_grad=True) for n in names(2)]
    assert torch.autograd.gradcheck(back, tuple(bands))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("db22222", r"Unknown wavelet 'db22222'\. Did you mean 'db22'"),
        ("simlet4", "Unknown wavelet 'simlet4'"),
        ("sym44", r"Did you mean .*'sym4'"),
        ("morl", r"Unknown wavelet 'morl'"),  # it exists, but is continuous
        ("bior2.2", "'bior2.2' is biorthogonal, and an orthogonal one is needed"),
        ("rbio3.1", "is biorthogonal"),
        ("dmey", "'dmey' is not orthonormal: .* is 1.00224, not 1"),
    ],
)
def test_wavelets_that_are_refused(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        filters(name)


def test_biorthogonal_filters_would_break_the_identities() -> None:
    low, high = (list(reversed(pywt.Wavelet("bior2.2").filter_bank[i])) for i in (0, 1))
    rows = []
    for taps in (low, high):
        for k in range(8):
            row = torch.zeros(16, dtype=torch.float64)
            for place, tap in enumerate(taps):
                row[(2 * k + 1 - len(taps) // 2 + place) % 16] += tap
            rows.append(row)
    t = torch.stack(rows)
    assert float((t @ t.mT - torch.eye(16, dtype=torch.float64)).abs().max()) == pytest.approx(0.4375)
    with pytest.raises(ValueError, match="not orthonormal"):
        Taps("bior2.2", tuple(low))


@pytest.mark.parametrize(
    "low", [(), (1.0,), (1.0, 0.0, 0.0), (float("nan"), 1.0), (1.0, 1.0), ("1", "0"), (True, 0.0), None]
)
def test_taps_that_are_no_filter(low: Any) -> None:
    with pytest.raises(ValueError, match=r"taps are between|not orthonormal"):
        Taps("mine", low)


def test_levels_too_deep_say_both_numbers() -> None:
    assert [deepest(shape) for shape in ((1, 8), (2, 8), (3, 8), (8, 8), (9, 64))] == [0, 1, 2, 3, 4]
    with pytest.raises(
        ValueError, match=r"levels=4 is too deep for a matrix \(6, 10\): .* 6 can be halved 3"
    ):
        check_levels(4, (6, 10))
    for bad in (0, -1, True, 1.5, "2", None):
        with pytest.raises(ValueError, match="at least 1"):
            check_levels(bad, (8, 8))


def test_without_pywavelets_haar_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pywt", None)
    assert len(filters("haar").low) == 2 == len(filters("db1").low)
    with pytest.raises(ImportError, match=r"pip install 'rankfold\[wavelet\]'"):
        filters("db2")
