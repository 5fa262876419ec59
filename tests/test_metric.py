"""Metrics are norms; calibrations obey the laws; moments keep their forms through roots and shrinking."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankfold import KFAC, AbsMean, Activation, Calibration, Fisher, Frobenius, Metric
from rankfold.metric import root, shrunk, times
from rankfold.testing import check_metric, sample_metrics

CALIBRATIONS = [
    Frobenius(),
    Activation(),
    Activation(shrink=0.1),
    Activation(output="scalar"),
    Activation(output="scalar", power=0.5),
    AbsMean(),
    AbsMean(alpha=1.0),
    Fisher(),
    Fisher(axes="out"),
    Fisher(axes="both", power=1.0),
    KFAC(),
    KFAC(shrink_in=0.0, shrink_out=0.0),
]


@pytest.mark.parametrize("calibration", CALIBRATIONS, ids=repr)
def test_laws(calibration: Calibration) -> None:
    check_metric(calibration)


def test_the_laws_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    class Drifting(Activation):
        def __call__(self, *args, **kwargs):
            found = super().__call__(*args, **kwargs)
            return {name: Metric(None, m.right * 1.01) for name, m in found.items()}

    monkeypatch.setitem(Calibration.kinds, "activation", Drifting)
    with pytest.raises(AssertionError, match="E changes the output by"):
        check_metric(Drifting())
    # A copy for each layer: right enough, but it does not share.
    with pytest.raises(AssertionError, match="do not share the tensor"):
        check_metric(Drifting(), exact=False)


SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(SHAPES, st.integers(0, 5))
def test_error_is_the_trace_and_the_norm_of_the_whitened(shape: tuple[int, int], seed: int) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    for name, metric in sample_metrics(shape, seed).items():
        dense = [
            torch.eye(n, dtype=torch.float64)
            if side is None
            else side * torch.eye(n, dtype=torch.float64)
            if side.dim() < 2
            else side
            for side, n in zip((metric.left, metric.right), shape, strict=True)
        ]
        trace = float((dense[0] @ weight @ dense[1] @ weight.mT).trace())
        assert metric.error(weight) == pytest.approx(trace, rel=1e-10), name
        assert float(metric.whiten(weight).square().sum()) == pytest.approx(trace, rel=1e-10), name
        back = metric.unwhiten_right(metric.unwhiten_left(metric.whiten(weight)))
        if name != "singular":
            torch.testing.assert_close(back, weight, rtol=1e-6, atol=1e-6)
        assert metric.error(weight - back) <= 1e-10 * trace


def test_error_takes_weights_that_require_gradients() -> None:
    assert Metric().error(torch.ones(2, 3, requires_grad=True)) == 6.0


def test_root_of_a_singular_moment_inverts_on_its_range_only() -> None:
    vector = torch.tensor([3.0, 4.0], dtype=torch.float64)
    side = torch.outer(vector, vector)  # eigenvalues 25 and 0
    half, inverse = root(side), root(side, -0.5)
    assert half is not None and inverse is not None
    torch.testing.assert_close(half @ half, side)
    torch.testing.assert_close(half @ inverse, side / 25)
    assert root(None) is None
    zero = root(torch.zeros(2, 2), -0.5)
    assert zero is not None and not zero.any()
    torch.testing.assert_close(
        root(torch.tensor([4.0, 0.0]), -0.5), torch.tensor([0.5, 0.0], dtype=torch.float64)
    )


def test_times_in_every_form() -> None:
    columns = torch.randn(3, 2)
    assert times(None, columns) is columns
    for side in (torch.tensor(2.0), torch.full((3,), 2.0), 2 * torch.eye(3)):
        torch.testing.assert_close(times(side, columns), 2 * columns)


@pytest.mark.parametrize("amount", [0.1, 0.9])
def test_shrinking_keeps_the_trace_and_lifts_the_floor(amount: float) -> None:
    side = torch.diag(torch.tensor([4.0, 0.0], dtype=torch.float64))
    smaller = shrunk(side.clone(), amount)
    assert float(smaller.trace()) == pytest.approx(4.0)
    assert float(torch.linalg.eigvalsh(smaller).min()) == pytest.approx(2 * amount)
    torch.testing.assert_close(shrunk(side.diagonal(), amount), smaller.diagonal())


def test_check_names_the_layer_and_both_shapes() -> None:
    Metric(torch.ones(3), torch.eye(2)).check("a", (3, 2))
    Metric(torch.tensor(1.0), None).check("a", (3, 2))
    with pytest.raises(ValueError, match=r"'a'.*right side has shape \(3, 3\).*\(3, 2\) asks for \(2,\)"):
        Metric(None, torch.eye(3)).check("a", (3, 2))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"'a'.*left side holds NaN or infinity"):
            Metric(torch.tensor([1.0, bad, 1.0])).check("a", (3, 2))


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Activation(output="matrix"),
        lambda: Activation(shrink=1.0),
        lambda: Activation(shrink=-0.1),
        lambda: KFAC(shrink_in=1.5),
        lambda: KFAC(shrink_out=math.nan),
        lambda: Fisher(axes="inner"),
    ],
)
def test_bad_options(bad) -> None:
    with pytest.raises(ValueError, match=r"choose|must lie in"):
        bad()
