"""Trained rank pruning: the projection and its bounds, the accounting, the final decomposition.

Numbers without a comment are worked out by hand from the equations at the top of `rankfold/truncate.py`.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rankfold
from rankfold.footprint import macs_per_token
from rankfold.hosts import Conv2d, hosts
from rankfold.layers import Layer
from rankfold.truncate import Truncate
from rankfold.truncate_layers import kept, macs, product, truncated

SCHEMES = ("spatial", "channel")


def low_rank_(conv: nn.Conv2d, rank: int, spatial: bool) -> nn.Conv2d:
    """Give a convolution a kernel of this rank."""
    layer = Layer(conv, spatial)
    with torch.no_grad():
        conv.weight.copy_(layer.laid(torch.randn(layer.shape[0], rank) @ torch.randn(rank, layer.shape[1])))
    return conv


def net(**options: Any) -> nn.Sequential:
    """A stem, one convolution in question, a head."""
    conv = nn.Conv2d(6, 8, **({"kernel_size": 3, "padding": 1} | options))
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )


def started(model: nn.Module, targets: list[str] | None = None, **options: Any) -> Truncate:
    regime = Truncate(**options)
    regime.start_(model, targets=targets)
    return regime


# The projection


@pytest.mark.parametrize(("e", "rank"), [(0.0, 3), (0.05, 3), (0.10, 2), (0.36, 1), (0.99, 1)])
def test_rank_rule(e: float, rank: int) -> None:
    """σ² = 9, 4, 1: the tails are 1/14 and 5/14. By σ instead of σ², e = .10 would keep 3."""
    assert kept(torch.tensor([3.0, 2.0, 1.0]), e) == rank


def test_rank_is_free_of_scale_and_at_least_one() -> None:
    sigma = torch.rand(20).sort(descending=True).values
    assert len({kept(scale * sigma, 0.07) for scale in (1e-12, 1.0, 1e9)}) == 1
    assert kept(torch.zeros(4), 0.1) == 1
    assert (
        len(truncated(0.01 * torch.eye(3), 0.0, least=0.05).sigma) == 1
    )  # an absolute threshold above all σ
    assert len(truncated(torch.eye(3), 0.0, least=0.05).sigma) == 3


def test_projection_and_slope() -> None:
    """W = diag(3, 2, 1) in a linear layer: T = diag(3, 2, 0), G = diag(1, 1, 0), ⟨G, T⟩ = 5 = ‖T‖_*."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    parameter = model[0].weight
    regime = started(model, ["0"], e=0.10, nuclear=0.5)
    regime.before_step()
    assert model[0].weight is parameter  # what an optimizer holds
    torch.testing.assert_close(parameter.detach(), torch.diag(torch.tensor([3.0, 2.0, 0.0])))
    penalty = regime.penalty()
    assert penalty.item() == pytest.approx(0.5 * 5)
    penalty.backward()
    assert parameter.grad is not None
    torch.testing.assert_close(parameter.grad, 0.5 * torch.diag(torch.tensor([1.0, 1.0, 0.0])))
    regime.penalty_gradients_()
    torch.testing.assert_close(parameter.grad, torch.diag(torch.tensor([1.0, 1.0, 0.0])))
    regime.after_step()
    regime.before_step()
    regime.penalty_gradients_()  # off-period: λ acts on truncation steps only, its rate is λ / every
    assert float(regime.penalty()) == 0 and not regime.penalty().requires_grad
    torch.testing.assert_close(parameter.grad, torch.diag(torch.tensor([1.0, 1.0, 0.0])))


def test_nuclear_descent_lowers_every_singular_value() -> None:
    """Descent on λ‖W‖_* alone: diag(3, 2, 1) -> diag(2.9, 1.9, .9) for lr · λ = .1, and so on."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    regime, optimizer = started(model, ["0"], e=0.0, every=1, nuclear=0.2), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for expected in ([2.9, 1.9, 0.9], [2.8, 1.8, 0.8]):
        regime.before_step()
        optimizer.zero_grad()
        regime.penalty().backward()
        optimizer.step()
        regime.after_step()
        torch.testing.assert_close(model[0].weight.detach(), torch.diag(torch.tensor(expected)))


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=st.integers(0, 10**6), e=st.sampled_from([0.02, 0.1, 0.3]), size=st.floats(0, 1))
def test_rank_does_not_rise_under_a_bounded_move(seed: int, e: float, size: float) -> None:
    """‖Δ‖ <= √e ‖T + Δ‖ implies that the next truncation keeps no more than rank T."""
    decay = torch.linspace(0, 4, 8, dtype=torch.float64).neg().exp()
    terms = truncated(random(seed, 12, 8) * decay, e)
    move = random(seed + 1, 12, 8)
    whole = product(terms)
    # ‖Δ‖ = t ‖T‖ with t <= √e / (1 + √e) is within the bound, by the triangle inequality.
    move *= size * math.sqrt(e) / (1 + math.sqrt(e)) * whole.norm() / move.norm()
    moved = whole + move
    assert move.norm() <= math.sqrt(e) * moved.norm() * (1 + 1e-12)
    assert len(truncated(moved, e).sigma) <= len(terms.sigma)


@given(seed=st.integers(0, 10**6))
def test_subgradient_inequality(seed: int) -> None:
    """‖W'‖_* >= ‖W‖_* + ⟨G, W' - W⟩ for the truncated W and any W'."""
    terms = truncated(random(seed, 7, 5), 0.2)
    slope, weight, other = terms.left @ terms.right, product(terms), random(seed + 1, 7, 5)
    nuclear = torch.linalg.svdvals
    assert nuclear(other).sum() >= nuclear(weight).sum() + (slope * (other - weight)).sum() - 1e-9


@pytest.mark.parametrize("spatial", [True, False])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 3), (5, 1), (2, 5)])
def test_matricization_has_an_inverse(kernel: tuple[int, int], spatial: bool) -> None:
    layer = Layer(nn.Conv2d(3, 4, kernel), spatial)
    assert torch.equal(layer.laid(layer.matrix()), layer.tensor)


def test_spatial_matrix_has_the_spectrum_of_the_papers() -> None:
    """The authors' matrix is (C·kh) x (N·kw), ours its transpose."""
    weight = torch.randn(4, 3, 2, 5)
    theirs = weight.permute(1, 2, 0, 3).reshape(3 * 2, 4 * 5)
    ours = Layer(nn.Conv2d(3, 4, (2, 5)), spatial=True).read(weight)
    assert torch.equal(ours, theirs.mT)


# What it costs


@pytest.mark.parametrize(
    ("stride", "scheme", "cost"),
    [(1, "channel", 10_485_760), (1, "spatial", 6_291_456), (2, "spatial", 2_359_296)],
)
def test_accounting(stride: int, scheme: str, cost: int) -> None:
    """64 x 64 x 3 x 3 at 32 x 32, rank 16: by formula, and as the modules really do it."""
    conv = low_rank_(nn.Conv2d(64, 64, 3, stride, 1), 16, scheme == "spatial")
    layer, after = Layer(conv, scheme == "spatial"), (32 // stride) ** 2
    assert macs(layer, None, (after, after * stride)) == 64 * 64 * 9 * after
    assert macs(layer, 16, (after, after * stride)) == cost
    assert macs(layer, 16) * after == cost  # without shapes: `stride` columns into one
    model, x = nn.Sequential(conv), torch.randn(2, 64, 32, 32)
    regime = started(model, ["0"], e=1e-6, scheme=scheme)
    assert regime.finish_(x) == {"0": 16}
    with FlopCounterMode(display=False) as flops:
        model(x)
    assert flops.get_total_flops() == 2 * len(x) * cost
    assert macs_per_token(model, x) == cost
    assert model[0].weight.params == (10_240 if scheme == "channel" else 6_144)


@pytest.mark.parametrize(
    ("spatial", "ranks", "units"),
    [(False, 45, 14_400), (True, 44, 8_448), (False, 18, 27_648 / 4.8), (True, 17, 3_264)],
)
def test_three_layers_of_width_32(spatial: bool, ranks: int, units: float) -> None:
    """Three 32 -> 32 convolutions of 3 x 3, 27,648 multiply-adds a position; `ranks` is their sum."""
    layer = Layer(nn.Conv2d(32, 32, 3, padding=1), spatial)
    assert 3 * macs(layer, None) == 27_648 and macs(layer, ranks) == units


@pytest.mark.parametrize(("scheme", "break_even"), [("channel", 57), ("spatial", 95)])
def test_break_even(scheme: str, break_even: int) -> None:
    layer = Layer(nn.Conv2d(64, 64, 3, 1, 1), scheme == "spatial")
    assert macs(layer, break_even) < macs(layer, None) <= macs(layer, break_even + 1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_does_not_pay_stays_dense(scheme: str) -> None:
    model, x = net(), torch.randn(2, 3, 9, 9)
    regime = started(model, e=0.0, scheme=scheme)
    conv, before = model[1], model(x)
    ranks = regime.finish_(x)
    assert ranks == {"1": 8 if scheme == "channel" else 18} and not hosts(model) and model[1] is conv
    torch.testing.assert_close(model(x), before)


def test_real_widths_decide_where_the_nominal_ones_would_not() -> None:
    """Stride 2 on 4 columns without padding makes one of them: the kh x 1 filters run 4 columns, not 2."""
    model, x = nn.Sequential(nn.Conv2d(4, 16, (3, 3), stride=(1, 2))), torch.randn(1, 4, 6, 4)
    low_rank_(model[0], 7, True)
    layer = Layer(model[0], True)
    assert macs(layer, 7) < macs(layer, None) and macs(layer, 7, (4, 16)) > macs(layer, None, (4, 16))
    for example, count in ((x, 0), (None, 1)):
        copied = copy.deepcopy(model)
        started(copied, ["0"], e=1e-6).finish_(example)
        assert len(hosts(copied)) == count
        torch.testing.assert_close(copied(x), model(x))


# The final decomposition

GEOMETRIES: dict[str, dict[str, Any]] = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "uneven stride": {"kernel_size": 3, "stride": (1, 2), "padding": (0, 2), "bias": False},
    "1x3": {"kernel_size": (1, 3), "padding": (0, 1)},
    "3x1": {"kernel_size": (3, 1), "stride": 2},
    "5x5": {"kernel_size": 5, "padding": 2, "stride": 2},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "same": {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
    "1x1": {"kernel_size": 1},
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=list(GEOMETRIES))
def test_small_layers_do_what_the_truncated_convolution_did(options: dict[str, Any], scheme: str) -> None:
    model, x = net(**options), torch.randn(3, 3, 13, 12)
    low_rank_(model[1], 2, scheme == "spatial" and model[1].kernel_size[1] > 1)
    with torch.no_grad():
        model[1].weight += 0.01 * torch.randn_like(model[1].weight)
    regime = started(model, ["1"], e=0.05, scheme=scheme)
    with regime.truncated():
        truncated_logits, dense = model(x), model[1].weight.detach().clone()
    bias = model[1].bias
    ranks = regime.finish_(x)
    host = model[1]
    assert isinstance(host, Conv2d) and isinstance(host.weight, rankfold.LowRank) and host.bias is bias
    assert host.weight.rank == ranks["1"] <= 2
    assert host.spatial == (scheme == "spatial" and host.kernel_size[1] > 1)  # of 1 x 1 there is one reading
    torch.testing.assert_close(model(x), truncated_logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(host.to_dense().weight.detach(), dense, rtol=0, atol=1e-5)


def test_sigma_is_where_the_authors_put_it() -> None:
    model = net()
    low_rank_(model[1], 2, True)
    started(model, e=1e-4).finish_()
    ones = model[1].weight.right.weight
    torch.testing.assert_close(ones @ ones.mT, torch.eye(2), rtol=0, atol=1e-5)
    model = net()
    low_rank_(model[1], 2, False)
    started(model, e=1e-4, scheme="channel").finish_()
    left, right = model[1].weight.left.weight, model[1].weight.right.weight
    torch.testing.assert_close(left.mT @ left, right @ right.mT, rtol=1e-4, atol=1e-4)


def test_linear_layers_by_name() -> None:
    model, x = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 12)), torch.randn(4, 12)
    regime = started(model, ["*"], e=0.5)
    with regime.truncated():
        expected = model(x)
    ranks = regime.finish_()
    assert {name: host.weight.rank for name, host in hosts(model).items()} == ranks
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, x = net(stride=2), torch.randn(2, 3, 9, 9)
    low_rank_(model[1], 2, True)
    dense = copy.deepcopy(model)
    started(model, e=0.02).finish_(x)
    rankfold.save(model, tmp_path / "small")
    again = rankfold.load_(dense, tmp_path / "small")
    assert torch.equal(again(x), model(x)) and again[1].spatial


def test_finish_truncates_once_more() -> None:
    """Weights that moved since the last truncation have full rank; finish_ drops at most e of the energy."""
    model = net()
    low_rank_(model[1], 2, True)
    regime = started(model, e=0.02)
    regime.before_step()
    with torch.no_grad():
        model[1].weight += 0.002 * torch.randn_like(model[1].weight)
    full = model[1].weight.detach().clone()
    assert regime.finish_() == {"1": 2}
    lost = (model[1].to_dense().weight - full).square().sum() / full.square().sum()
    assert 0 < lost.item() <= 0.02
