"""The structure: its laws, what each reading reduces to, and what has not collapsed to low rank."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from rankfold.structure import Structure, build
from rankfold.structures import Dense, LowRank, Sum
from rankfold.testing import check_structure
from rankfold.wavelet import Wavelet
from rankfold.wavelet_transform import analyze, band_shape, filters, names, synthesize

DOUBLE = torch.float64


def made(
    shape: tuple[int, int],
    name: str = "db1",
    levels: int = 1,
    rank: int = 1,
    only: tuple[str, ...] = (),
    shared: dict[str, str] | None = None,
    scale: float = 2.0,
) -> Wavelet:
    """A filled structure in float64 with random low-rank bands."""
    bands: dict[str, Structure | str] = {
        band: LowRank(band_shape(band, shape), rank=rank, dtype=DOUBLE)
        for band in only or names(levels)
        if band not in (shared or {})
    }
    return Wavelet.of(shape, bands | (shared or {}), filters(name), levels, scale)


FEATURE: dict[str, Any] = {"only": ("LL1",), "shared": {"HH1": "LL1"}}
CASES: dict[str, dict[str, Any]] = {
    "haar": {"shape": (8, 12)},
    "odd": {"shape": (7, 9), "rank": 2},
    "two levels of db2, one odd side": {"shape": (7, 10), "name": "db2", "levels": 2},
    "sym4 longer than the sides": {"shape": (5, 6), "name": "sym4", "levels": 2},
    "tall": {"shape": (16, 3), "levels": 2, "scale": 1.0},
    "shared": {"shape": (7, 10), "name": "db2", "rank": 2, **FEATURE},
    "some bands": {"shape": (7, 10), "name": "db2", "levels": 2, "only": ("LH1", "HL2")},
    "no low band": {"shape": (8, 6), "levels": 2, "only": ("HH1",)},
    "nearly full rank": {"shape": (8, 8), "rank": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_laws(case: str) -> None:
    torch.manual_seed(0)
    check_structure(made(**CASES[case]), compile=case == "odd")


def test_a_band_may_be_any_structure() -> None:
    torch.manual_seed(0)
    half = band_shape("LL1", (9, 6))
    bands: dict[str, Structure | str] = {"LL1": Dense(half, dtype=DOUBLE), "HH1": made(half, levels=1)}
    whole = Wavelet.of((9, 6), bands, filters("db2"))
    check_structure(whole)
    assert whole.factors() is None


@pytest.mark.parametrize("case", CASES)
def test_in_the_bands_or_built_it_is_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    one = made(**CASES[case])
    x = torch.randn(5, one.shape[1], dtype=DOUBLE)
    found = []
    for built in (False, True):
        monkeypatch.setattr(Wavelet, "_building_pays", lambda self, rows, built=built: built)
        found.append(one(x))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)
    left, right = one.factors() or ()
    torch.testing.assert_close(x @ (left @ right).mT, found[0], rtol=1e-10, atol=1e-12)


def test_building_pays_only_for_high_ranks_and_many_rows() -> None:
    thin, thick = made((64, 64), rank=2), made((64, 64), rank=32)
    assert not thin._building_pays(10**9)
    assert thin.macs == 4 * 2 * 64 + 2 * 64 * 2  # bands, then two taps a coefficient on either side
    assert thick._banded > 64 * 64 == thick.macs
    pays = [rows for rows in range(1, 200) if thick._building_pays(rows)]
    assert pays and pays[0] > 1 and pays == list(range(pays[0], 200))
    rows = pays[0]
    assert rows * thick._banded > thick._building + rows * 64 * 64


def matrices(side: int, name: str) -> tuple[Tensor, Tensor]:
    """L and H (⌈n/2⌉, n)."""
    low, high = analyze(torch.eye(side, dtype=DOUBLE), filters(name))
    return low.mT, high.mT


@pytest.mark.parametrize("name", ["db1", "db2", "sym4"])
@pytest.mark.parametrize("shape", [(12, 8), (7, 10)])
def test_the_page_s_formula_without_building(name: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    one = made(shape, name, rank=2, scale=1.0)
    (lo, ho), (li, hi) = (matrices(side, name) for side in shape)
    c = {band: one.active()[band].to_dense() for band in names(1)}
    x = torch.randn(3, shape[1], dtype=DOUBLE)
    low, high = x @ li.mT, x @ hi.mT
    y = (low @ c["LL1"].mT + high @ c["LH1"].mT) @ lo + (low @ c["HL1"].mT + high @ c["HH1"].mT) @ ho
    torch.testing.assert_close(one(x), y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_it_has_not_collapsed_to_low_rank(levels: int) -> None:
    """Rank 12, 21, 30 with 768, 960, 1056 numbers: more than a low-rank matrix of as many numbers has."""
    torch.manual_seed(0)
    one = made((64, 64), levels=levels, rank=3)
    rank = int(torch.linalg.matrix_rank(one.to_dense().detach()))
    assert (rank, one.params) == {1: (12, 768), 2: (21, 960), 3: (30, 1056)}[levels]
    assert rank > one.params // (64 + 64)  # the rank of a LoRA of equal count
    assert rank == (3 * levels + 1) * 3


def test_counts_of_the_page() -> None:
    shape = (768, 768)
    counts = [made(shape, levels=levels, rank=4).params for levels in (1, 2, 3)]
    assert counts == [12_288, 15_360, 16_896]
    assert made(shape, rank=4, only=("LL1",)).params == 3_072
    assert made(shape, rank=4, **FEATURE).params == 3_072


@pytest.mark.parametrize("name", ["db1", "db2", "sym4"])
def test_the_feature_reading_is_its_closed_form(name: str) -> None:
    """(b): the token transform cancels, ΔW = Lᵀ(BA)L + Hᵀ(BA)H, of rank 2r with half of LoRA's numbers."""
    torch.manual_seed(0)
    out, inner, rank = 16, 12, 2
    one = made((out, inner), name, rank=rank, scale=1.0, **FEATURE)
    pair = one.active()["LL1"].to_dense()
    (lo, ho), (li, hi) = (matrices(side, name) for side in (out, inner))
    full = lo.mT @ pair @ li + ho.mT @ pair @ hi
    torch.testing.assert_close(one.to_dense(), full, rtol=1e-10, atol=1e-10)
    assert int(torch.linalg.matrix_rank(full.detach())) == 2 * rank
    assert one.params == rank * (out + inner) // 2
    # The figure itself: transform tokens and features, one pair on all four sub-bands, transform back.
    x = torch.randn(10, inner, dtype=DOUBLE)
    taps, adapted = filters(name), []
    for band in analyze(x.mT, taps):
        tokens = band.mT
        parts = [part @ pair.mT for part in analyze(tokens, taps)]
        adapted.append(synthesize(*parts, taps, out).mT)
    figure = synthesize(*adapted, taps, 10).mT
    torch.testing.assert_close(one(x), figure, rtol=1e-10, atol=1e-10)


def test_the_feature_reading_with_haar_is_two_interleaved_copies() -> None:
    torch.manual_seed(0)
    one = made((16, 12), rank=2, scale=1.0, **FEATURE)
    pair = one.active()["LL1"].to_dense()
    torch.testing.assert_close(
        one.to_dense(), torch.kron(pair, torch.eye(2, dtype=DOUBLE)), atol=1e-12, rtol=0
    )


def test_one_pair_over_the_whole_transform_is_low_rank() -> None:
    """(T_oᵀ B)(A T_i): rotated factors, the same rank and count; hence we do not ship it."""
    torch.manual_seed(0)
    pair = LowRank((16, 12), rank=3, dtype=DOUBLE)
    full = pair.to_dense()
    bands: dict[str, Any] = {}
    for band, rows in (("L", slice(0, 8)), ("H", slice(8, 16))):
        for other, columns in (("L", slice(0, 6)), ("H", slice(6, 12))):
            bands[f"{band}{other}1"] = Dense.of(full[rows, columns].detach().clone())
    whole = Wavelet.of((16, 12), bands, filters("db2")).to_dense()
    assert int(torch.linalg.matrix_rank(whole.detach())) == 3
    turned = [torch.cat(matrices(side, "db2")) for side in (16, 12)]
    rotated = (turned[0].mT @ pair.left.weight) @ (pair.right.weight @ turned[1])
    torch.testing.assert_close(whole, rotated, rtol=1e-10, atol=1e-10)


def test_norms_are_those_of_the_bands_for_even_sides() -> None:
    torch.manual_seed(0)
    one = made((16, 12), "db2", levels=2, rank=2, scale=1.0)
    held = sum(band.to_dense().square().sum() for band in one.active().values())
    torch.testing.assert_close(one.to_dense().square().sum(), held, rtol=1e-10, atol=0)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    one = made((5, 6), "db2", levels=2)
    leaves = list(one.parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        state = dict(zip([name for name, _ in one.named_parameters()], values, strict=True))
        return torch.func.functional_call(one, state, (x,))

    x = torch.randn(2, 6, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *(leaf.detach().requires_grad_() for leaf in leaves)))


def test_nothing_of_the_transform_is_stored_and_it_moves_along() -> None:
    one = made((8, 12))
    assert not list(one.buffers())
    assert {key.partition(".")[0] for key in one.state_dict()} == {"bands"}
    moved = copy.deepcopy(one).to("meta", torch.float32)
    assert moved(torch.empty(3, 12, device="meta")).shape == (3, 8)


def test_under_autocast_the_transform_stays_in_float32() -> None:
    torch.manual_seed(0)
    one = made((64, 64), "db2", rank=2).float()
    x = torch.randn(7, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = one(x)
    assert y.dtype == torch.float32
    assert (y - one(x)).norm() / one(x).norm() < 0.01
    # A float32 adapter beside a bfloat16 weight: both outputs are bfloat16, the factors are not.
    both = Sum.of(Dense((64, 64), dtype=torch.bfloat16), one, frozen=True)
    assert both(x.bfloat16()).dtype == torch.bfloat16 == both.dtype
    assert [term.get("dtype") for term in both.spec()["terms"]] == [None, "float32"]
    again = build(both.spec(), dtype=torch.bfloat16, device="meta")
    assert isinstance(again, Sum) and [term.dtype for term in again.terms] == [torch.bfloat16, torch.float32]
    check_structure(both)


GOOD = made((8, 12)).spec()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"levels": 4}, r"levels=4 is too deep for a matrix \(8, 12\): its smaller side 8 can be halved 3"),
        ({"levels": 0}, "levels=0"),
        ({"bands": {}}, "at least one band"),
        ({"bands": ["LL1"]}, "at least one band"),
        (
            {"bands": {"LL2": GOOD["bands"]["LL1"]}},
            "of 1 levels has no band 'LL2'; it has LL1, LH1, HL1, HH1",
        ),
        ({"bands": {"LL": GOOD["bands"]["LL1"]}}, "has no band 'LL'"),
        ({"bands": {"HH1": "LL1"}}, "band HH1 cannot share the factors of 'LL1'"),
        ({"bands": {"HH1": "HH1"}}, "cannot share"),
        ({"bands": {"LL1": {"kind": "low_rank", "shape": [4, 5], "rank": 1}}}, r"has shape \(4, 6\); got"),
        ({"bands": {"LL1": {"kind": "low_rank", "shape": [4, 6], "rank": 7}}}, "rank=7"),
        ({"bands": {"LL1": 3}}, "a structure's spec is an object"),
        ({"taps": [1.0, 1.0]}, "not orthonormal"),
        ({"taps": "db1"}, "has a name and taps"),
        ({"taps": [0.5, 0.5, 0.5, float("nan")]}, "finite"),
        ({"wavelet": 3}, "has a name and taps"),
        ({"scale": 0.0}, "scale is a finite number"),
        ({"scale": float("inf")}, "scale is a finite number"),
        ({"scale": True}, "scale is a finite number"),
        ({"mode": "symmetric"}, "does not fit it"),
    ],
)
def test_damaged_specs(change: dict[str, Any], says: str) -> None:
    assert isinstance(build(GOOD, device="meta"), Wavelet)
    with pytest.raises(ValueError, match=says):
        build({**GOOD, **change}, device="meta")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"frozen": 2}, "frozen=2"),
        ({"frozen": None}, "frozen=None"),
        ({"terms": [{"kind": "dense", "shape": [4, 4]}], "frozen": True}, "first of several terms"),
        (
            {"terms": [{"kind": "dense", "shape": [4, 4], "dtype": "int8"}]},
            "a term's dtype is one of float64",
        ),
        ({"terms": [{"kind": "dense", "shape": [4, 4], "dtype": 3}]}, "a term's dtype"),
    ],
)
def test_damaged_sums(change: dict[str, Any], says: str) -> None:
    terms = [{"kind": "dense", "shape": [4, 4]}] * 2
    with pytest.raises(ValueError, match=says):
        build({"kind": "sum", "shape": [4, 4], "terms": terms, **change}, device="meta")
