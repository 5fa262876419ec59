"""The method Dictionary: the laws of methods, the sizes of the page, and matrices made to break it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from rankfold import dictionary, factorize_, recipes
from rankfold.methods import SVD, Dictionary
from rankfold.methods.dictionary import least_squares
from rankfold.metric import Metric
from rankfold.testing import check_method, sample_metrics

SOLVERS = sorted(dictionary.SOLVERS)
# A matrix on the output side counts through its diagonal while fitting: the bounds then speak of that.
ROWWISE = ("plain", "diagonal", "input", "scaled", "mixed", "singular")


def metrics(shape: tuple[int, int]) -> dict[str, Metric]:
    return {name: metric for name, metric in sample_metrics(shape).items() if name in ROWWISE}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_laws(solver: str, shape: tuple[int, int]) -> None:
    some = metrics(shape)
    if solver == "rocket":  # its own worth of a code: the bound holds where all atoms are worth the same
        some = {name: some[name] for name in ("plain",)}
    check_method(Dictionary(solver=solver, sweeps=3), shape, metrics=some, exact=False, bound=True)


@pytest.mark.parametrize("orient", ["in", "out"])
def test_laws_in_blocks(orient: str) -> None:
    shape = (24, 16)
    method = Dictionary(width=8, ratio=4, orient=orient, sweeps=2)
    some = {name: sample_metrics(shape)[name] for name in ("plain", "diagonal")}
    check_method(method, shape, metrics=some, exact=False, bound=True)


@pytest.mark.parametrize("storage", ["bf14", "int8"])
def test_packed_values_cost_less(storage: str) -> None:
    method, shape = Dictionary(storage=storage, sweeps=2), (32, 32)
    loose = dataclasses.replace(method, storage="float")
    fitted = method.fit(torch.randn(shape, dtype=torch.bfloat16), Metric(), [10, 5])
    assert fitted.spec() == method.empty(shape, [10, 5]).spec()
    assert fitted.nbytes == method.empty(shape, [10, 5], torch.bfloat16).nbytes
    assert fitted.nbytes < loose.empty(shape, [10, 5], torch.bfloat16).nbytes
    assert len(method.menu(shape)) >= len(loose.menu(shape))


# (in, out) by the page: atoms, nonzeros at 0.8, 0.7, 0.6 of the bytes, 14-bit and bf16 conventions
SIZES = {
    (576, 576): ((307, 268, 230), (294, 258, 221)),
    (576, 192): ((131, 115, 98), (129, 113, 97)),
    (576, 1536): ((526, 460, 394), (491, 430, 368)),
    (1536, 576): ((388, 339, 291), (380, 332, 291)),
    (4096, 4096): ((2184, 1911, 1638), (2097, 1835, 1572)),
}


@pytest.mark.parametrize("shape", SIZES)
def test_sizes_follow_the_page(shape: tuple[int, int]) -> None:
    """The page's size is the largest that fits, up to rounding the nonzeros down."""
    weight = (shape[1], shape[0])
    for storage, row in zip(("bf14", "float"), SIZES[shape], strict=True):
        method = Dictionary(storage=storage)
        for kept, atoms in zip((0.8, 0.7, 0.6), row, strict=True):
            limit = kept * 2 * shape[0] * shape[1]
            if (shape, storage, kept) == ((1536, 576), "float", 0.6):
                continue  # 291 is the page's 14-bit figure printed twice; the bf16 formula gives 285
            fits = method.empty(weight, method.size(atoms), torch.bfloat16).nbytes
            over = method.empty(weight, method.size(atoms + 2), torch.bfloat16).nbytes
            assert fits <= limit < over


def test_menu() -> None:
    for shape in ((576, 576), (192, 576), (1536, 576), (576, 1536)):
        menu = Dictionary().menu(shape)
        assert 40 <= len(menu) <= 64
        assert all(nonzeros == atoms // 2 for atoms, nonzeros in menu)
        dense = 2 * shape[0] * shape[1]
        kept = [Dictionary().empty(shape, size, torch.bfloat16).nbytes / dense for size in menu]
        assert kept[0] < 0.05 and 0.95 < kept[-1] < 1
    assert max(Dictionary(solver="compot", ratio=8).menu((512, 16)))[0] <= 16  # orthonormal rows: no more
    assert max(Dictionary(solver="ksvd", ratio=8).menu((512, 16)))[0] > 16
    assert Dictionary().menu((1, 1)) == [] and Dictionary().menu((1, 50)) == []


BAD: dict[str, dict[str, Any]] = {
    "an unknown solver": {"solver": "lasso"},
    "an unknown start": {"start": "zeros"},
    "an unknown storage": {"storage": "fp4"},
    "an unknown orientation": {"orient": "up"},
    "a ratio below one": {"ratio": 0.5},
    "a ratio that is no number": {"ratio": float("nan")},
    "no sweeps": {"sweeps": 0},
    "no width": {"width": 0},
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused(case: str) -> None:
    with pytest.raises(ValueError, match=rf"Dictionary\({next(iter(BAD[case]))}="):
        Dictionary(**BAD[case])


def test_blocks_must_divide() -> None:
    with pytest.raises(ValueError, match=r"Dictionary\(width=64\) does not divide the 100 input features"):
        Dictionary(width=64).menu((128, 100))
    with pytest.raises(ValueError, match="the 100 output features"):
        Dictionary(width=64, orient="out").menu((100, 128))


def test_the_layer_that_does_not_divide_is_named() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(100, 64))
    with pytest.raises(ValueError, match=r"layer '1': Dictionary\(width=64\) does not divide the 100"):
        factorize_(model, recipes.dsformer, budget=0.5)
    report = factorize_(model, recipes.dsformer, budget=0.5, skip=["1"])
    assert [row.structure for row in report.layers] == ["sparse_code"]


def test_what_cannot_be_smaller_stays_dense() -> None:
    """Codes of a matrix of few rows cost more than it does: no atoms are worth their bytes."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 1))
    report = factorize_(model, recipes.cospadi, budget=0.7, batches=[torch.randn(80, 64)])
    assert [row.structure for row in report.layers] == ["sparse_code", "dense"]
    assert "no size of the method is smaller" in report.layers[1].note


@pytest.mark.parametrize("size", [[4, 5], [0, 0], [4, 0], [40, 4]])
def test_bad_sizes_are_refused(size: list[int]) -> None:
    with pytest.raises(ValueError, match=r"atoms|nonzeros"):
        Dictionary().fit(torch.randn(12, 10), Metric(), size)


def rank_one(size: int) -> Tensor:
    x = torch.randn(size, dtype=torch.float64)
    return torch.outer(x, x)


@pytest.mark.parametrize("solver", SOLVERS)
def test_matrices_made_to_break_it(solver: str) -> None:
    """Rows of zeros, equal rows, a Gram of rank one or none, all ones: finite, and s entries a row."""
    method = Dictionary(solver=solver, sweeps=2)
    twins = torch.randn(12, 10)
    twins[1::2] = twins[::2]
    hollow = torch.randn(12, 10)
    hollow[3:9] = 0
    weights = {"twins": twins, "hollow": hollow, "ones": torch.ones(12, 10), "zeros": torch.zeros(12, 10)}
    sides = {
        "plain": None,
        "one": rank_one(10),
        "zero": torch.zeros(10, 10),
        "few": rank_one(10) + rank_one(10),
    }
    for weight in weights.values():
        for side in sides.values():
            for size in ([6, 3], [5, 5], [1, 1]):
                fitted = method.fit(weight, Metric(None, side), size)
                fitted.validate()
                assert torch.isfinite(fitted.to_dense()).all()


def test_the_scale_of_the_metric_does_not_matter() -> None:
    """Inputs a million times larger give the same matrix."""
    weight, shape = torch.randn(24, 16, dtype=torch.float64), (24, 16)
    side = sample_metrics(shape)["input"].right
    assert side is not None
    one, two = (Dictionary(sweeps=4).fit(weight, Metric(None, side * scale), [8, 4]) for scale in (1.0, 1e6))
    torch.testing.assert_close(one.to_dense(), two.to_dense(), rtol=1e-5, atol=1e-7)


def test_more_sweeps_and_calibration_pay() -> None:
    """On a correlated metric the codes beat low rank of the same bytes, and beat codes that ignore it."""
    torch.manual_seed(3)
    shape = (96, 64)
    weight = torch.randn(shape, dtype=torch.float64)
    metric = sample_metrics(shape)["input"]
    method = Dictionary(sweeps=12)
    size = method.size(30)
    fitted = metric.error(weight - method.fit(weight, metric, size).to_dense())
    blind = metric.error(weight - method.fit(weight, Metric(), size).to_dense())
    budget = method.empty(shape, size, torch.bfloat16).nbytes
    rank = budget // (2 * sum(shape))
    low = metric.error(weight - SVD().fit(weight, metric, rank).to_dense())
    assert fitted < low and fitted < blind


def test_least_squares_is_the_best_dictionary_in_every_metric() -> None:
    weight = torch.randn(1, 12, 8, dtype=torch.float64)
    index = torch.rand(1, 12, 5).topk(2).indices
    values = torch.randn(1, 12, 2, dtype=torch.float64)
    rows = torch.rand(12, dtype=torch.float64) + 0.1
    found = least_squares(weight, values, index, 5, rows)
    codes = torch.zeros(12, 5, dtype=torch.float64).scatter_(1, index[0], values[0])
    side = sample_metrics((12, 8))["input"].right
    metric = Metric(rows, side)
    best = metric.error(weight[0] - codes @ found[0])
    for _ in range(20):
        other = found[0] + 0.01 * torch.randn(5, 8, dtype=torch.float64)
        assert metric.error(weight[0] - codes @ other) >= best
