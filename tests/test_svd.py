"""Truncation in any metric equals the textbook's direct formulas, and holds where those do not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankfold import SVD, Metric
from rankfold.method import DecompositionError
from rankfold.metric import root
from rankfold.testing import check_method, sample_metrics

ORIENTATIONS = [(9, 14), (14, 9), (11, 11), (1, 6), (6, 1)]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def moment(n: int, rows: int) -> Tensor:
    x = randn(rows, n) * torch.logspace(0, -2, n, dtype=torch.float64)
    return x.mT @ x / rows


def fitted(weight: Tensor, metric: Metric, rank: int) -> Tensor:
    return SVD().fit(weight, metric, rank).to_dense().detach()


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9), (33, 7), (1, 9), (9, 1), (40, 40)])
def test_laws(shape: tuple[int, int]) -> None:
    metrics = sample_metrics(shape)
    if max(shape) > 30:  # the same laws on fewer metrics
        metrics = {name: metrics[name] for name in ("plain", "both", "singular")}
    check_method(SVD(), shape, metrics=metrics, best=True)


@settings(max_examples=8)
@given(st.tuples(st.integers(1, 13), st.integers(1, 13)), st.data())
def test_laws_at_any_size(shape: tuple[int, int], data: st.DataObject) -> None:
    """Also ranks from break-even to min(out, in), which no menu offers."""
    rank = data.draw(st.integers(1, min(shape)))
    metrics = {"plain": Metric(), "both": sample_metrics(shape)["both"]}
    check_method(SVD(multiple=1), shape, metrics=metrics, sizes=sorted({rank, min(shape)}))


def test_the_laws_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    class Optimistic(SVD):
        def measure(self, weight, metric, sizes):
            errors, spectrum = super().measure(weight, metric, sizes)
            return [error * 0.99 for error in errors], spectrum

    class Second(SVD):
        def fit(self, weight, metric, size):
            return super().fit(weight, Metric(), size)

        def errors(self, weight, metric, sizes):
            return [metric.error(weight - self.fit(weight, metric, size).to_dense()) for size in sizes]

    class Rough(SVD):
        def fit(self, weight, metric, size):
            return super().fit(weight + 1e-3 * torch.randn_like(weight), metric, size)

    class Greedy(SVD):
        def menu(self, shape):
            return [*super().menu(shape), min(shape)]

    both = {"both": sample_metrics((12, 20))["both"]}
    for cls, says in (
        (Optimistic, r"errors\(\) says"),
        (Second, r"another of its kind has|errors rise"),
        (Rough, "two fits differ"),
        (Greedy, "dense"),
    ):
        monkeypatch.setitem(SVD.kinds, "svd", cls)
        with pytest.raises(AssertionError, match=says):
            check_method(cls(), (12, 20), metrics=both, best=True)


@pytest.mark.parametrize("shape", ORIENTATIONS)
def test_plain_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    weight = randn(*shape)
    for rank in range(1, min(shape) + 1):
        torch.testing.assert_close(
            fitted(weight, Metric(), rank), truncated(weight, rank), rtol=0, atol=1e-10
        )


@pytest.mark.parametrize("shape", ORIENTATIONS)
def test_one_sided_equals_the_cholesky_form(shape: tuple[int, int]) -> None:
    """SVD-LLM: W L = U Σ Vᵀ with C = L Lᵀ, truncated, times L⁻¹."""
    weight, gram = randn(*shape), moment(shape[1], 3 * shape[1])
    lower = torch.linalg.cholesky(gram)
    for rank in range(1, min(shape) + 1):
        direct = torch.linalg.solve_triangular(
            lower, truncated(weight @ lower, rank), upper=False, left=False
        )
        torch.testing.assert_close(fitted(weight, Metric(None, gram), rank), direct, rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", ORIENTATIONS)
def test_two_sided_equals_the_direct_formula(shape: tuple[int, int]) -> None:
    """K-FAC-SVD: G^-½ [G^½ W C^½]_r C^-½."""
    weight = randn(*shape)
    metric = Metric(moment(shape[0], 3 * shape[0]), moment(shape[1], 3 * shape[1]))
    for rank in range(1, min(shape) + 1):
        direct = metric.unwhiten_right(metric.unwhiten_left(truncated(metric.whiten(weight), rank)))
        torch.testing.assert_close(fitted(weight, metric, rank), direct, rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", ORIENTATIONS)
def test_diagonals_equal_the_direct_formula(shape: tuple[int, int]) -> None:
    """FWSVD and ASVD scale columns, on the input side."""
    weight, scale = randn(*shape), torch.rand(shape[1], dtype=torch.float64) + 0.1
    for rank in range(1, min(shape) + 1):
        direct = truncated(weight * scale.sqrt(), rank) / scale.sqrt()
        torch.testing.assert_close(fitted(weight, Metric(None, scale), rank), direct, rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", ORIENTATIONS)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("two_sided", [False, True])
def test_singular_gram_reaches_the_eckart_young_bound(
    shape: tuple[int, int], tokens: int, two_sided: bool
) -> None:
    """Fewer tokens than inputs, down to a single one: no Cholesky factor exists, the bound is met "
    "all the same."""
    weight, x = randn(*shape), randn(tokens, shape[1])
    left = moment(shape[0], 2) if two_sided else None
    metric = Metric(left, x.mT @ x / tokens)
    half = root(left)
    output = (weight if half is None else half @ weight) @ x.mT / tokens**0.5
    values = torch.linalg.svdvals(output).square()
    energy = float(values.sum())
    for rank in range(1, min(shape) + 1):
        error, bound = metric.error(weight - fitted(weight, metric, rank)), float(values[rank:].sum())
        assert abs(error - bound) <= 1e-10 * energy
        assert abs(SVD().errors(weight, metric, [rank])[0] - bound) <= 1e-10 * energy


@pytest.mark.parametrize("shape", ORIENTATIONS)
def test_a_scalar_side_changes_the_error_not_the_answer(shape: tuple[int, int]) -> None:
    weight, x = randn(*shape), randn(3, shape[1])
    plain, scaled = Metric(None, x.mT @ x), Metric(torch.tensor(0.01, dtype=torch.float64), x.mT @ x)
    for rank in range(1, min(shape) + 1):
        torch.testing.assert_close(fitted(weight, scaled, rank), fitted(weight, plain, rank))
        ours, theirs = (SVD().errors(weight, metric, [rank])[0] for metric in (scaled, plain))
        assert ours == pytest.approx(0.01 * theirs)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_the_whole_rank_gives_the_weight_back_even_where_the_data_say_nothing(shape: tuple[int, int]) -> None:
    weight, x = randn(*shape), randn(3, shape[1])
    for left in (None, torch.tensor(0.3)):
        torch.testing.assert_close(fitted(weight, Metric(left, x.mT @ x), min(shape)), weight)


@pytest.mark.parametrize("shape", ORIENTATIONS)
def test_an_all_zero_gram_counts_as_the_identity(shape: tuple[int, int]) -> None:
    weight = randn(*shape)
    for metric in (Metric(None, torch.zeros(shape[1], shape[1])), Metric(torch.zeros(shape[0]), None)):
        torch.testing.assert_close(fitted(weight, metric, 1), truncated(weight, 1))
        assert SVD().errors(weight, metric, [1]) == [metric.error(weight)] == [0.0]
    assert torch.equal(fitted(torch.zeros(shape), Metric(), 1), torch.zeros(shape))


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
@pytest.mark.parametrize("tokens", [3, 40])
def test_the_unit_of_the_data_is_irrelevant(shape: tuple[int, int], tokens: int, scale: float) -> None:
    weight, x, g = randn(*shape), randn(tokens, shape[1]), moment(shape[0], 30)
    for left in (None, g):
        one = fitted(weight, Metric(left, x.mT @ x), 2)
        two = fitted(weight, Metric(left, (scale * x).mT @ (scale * x)), 2)
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10)


def test_factors_are_balanced() -> None:
    low = SVD().fit(randn(9, 14), Metric(None, moment(14, 30)), 4)
    torch.testing.assert_close(low.left.weight.norm(dim=0), low.right.weight.norm(dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_are_cast_once_at_the_end(dtype: torch.dtype) -> None:
    weight = randn(9, 14).to(dtype)
    low = SVD().fit(weight, Metric(), 3)
    exact = SVD().fit(weight.double(), Metric(), 3)
    assert torch.equal(low.left.weight, exact.left.weight.to(dtype))
    assert torch.equal(low.right.weight, exact.right.weight.to(dtype))


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_menu(out: int, inner: int) -> None:
    """At most 64 ranks, rising, every one below break-even; the last one close to it."""
    menu = SVD().menu((out, inner))
    assert len(menu) <= 64 and menu == sorted(set(menu))
    assert all(0 < rank and rank * (out + inner) < out * inner for rank in menu)
    breakeven = out * inner / (out + inner)
    if breakeven >= 16:
        assert len(menu) >= 16 and menu[-1] >= 0.9 * breakeven - 32
    assert all(rank % 8 == 0 for rank in SVD(multiple=8).menu((out, inner)))


@pytest.mark.parametrize("multiple", [0, -8, 1.5, "8"])
def test_bad_multiple(multiple) -> None:
    with pytest.raises(ValueError, match="SVD\\(multiple="):
        SVD(multiple=multiple)


@pytest.mark.parametrize("rank", [0, -1, 10])
def test_rank_out_of_range(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank {rank} of a matrix \(9, 14\) must lie between 1 and 9"):
        SVD().fit(randn(9, 14), Metric(), rank)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(bad: float) -> None:
    weight = randn(4, 5)
    weight[1, 2] = bad
    for work in (lambda: SVD().fit(weight, Metric(), 2), lambda: SVD().errors(weight, Metric(), [2])):
        with pytest.raises(ValueError, match=r"shape \(4, 5\) holds 1 NaN or infinite"):
            work()


def fail(*args: object, **kwargs: object) -> Tensor:
    raise torch.linalg.LinAlgError("did not converge")


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_a_failing_eigensolver_is_replaced_by_an_svd(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    weight, metric = randn(*shape), Metric(moment(shape[0], 40), moment(shape[1], 40))
    expected, error = fitted(weight, metric, 3), SVD().errors(weight, metric, [3])[0]
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    monkeypatch.setattr(torch.linalg, "eigvalsh", fail)
    with pytest.warns(UserWarning, match="falling back to a singular value decomposition"):
        torch.testing.assert_close(fitted(weight, metric, 3), expected)
        assert SVD().errors(weight, metric, [3])[0] == pytest.approx(error)
    monkeypatch.setattr(torch.linalg, "svd", fail)
    with pytest.raises(DecompositionError, match=r"eigh failed .* and so did svd"), pytest.warns(UserWarning):
        fitted(weight, metric, 3)
