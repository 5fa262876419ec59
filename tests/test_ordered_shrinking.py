"""Maestro's regime: ranks that only fall, `finish_`, the counts of the page, and the traps of others."""

from __future__ import annotations

import copy
import math
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy_ordered import mlp, train

from rankfold.hosts import hosts
from rankfold.layers import Layer
from rankfold.ordered import Ordered
from rankfold.ordered_dropout import OrderedDropout
from rankfold.structures import LowRank

# Shrinking


def test_ranks_fall_and_never_rise_and_no_shape_changes() -> None:
    """Trap 8, trap 10 and check C: the function after `finish_` is that of the ranks before it."""
    model = mlp(8, 24, 20, 4)
    regime = OrderedDropout(penalty=3e-2, shrink_every=10)
    regime.start_(model)
    shapes = [p.shape for p in model.parameters()]
    ranks = train(model, regime, 120)
    assert all(b[n] <= a[n] for a, b in pairwise(ranks) for n in a)
    assert all(1 <= ranks[-1][name] < ranks[0][name] for name in ("0", "2"))
    assert [p.shape for p in model.parameters()] == shapes
    assert len({tuple(r.values()) for r in ranks[10:19]}) == 1  # only at the ends of periods
    x = torch.randn(5, 8)
    expected = model.eval()(x)
    final = regime.macs()["final"]
    assert regime.finish_() == ranks[-1]
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    dense = [m for m in model if type(m) is nn.Linear]
    small = [h.weight for h in hosts(model).values()]
    assert all(isinstance(s, LowRank) for s in small) and len(small) + len(dense) == 3
    assert sum(s.macs for s in small) + sum(d.weight.numel() for d in dense) == final


def test_layers_that_do_not_pay_are_folded() -> None:
    for nested in (False, True):
        model = mlp(8, 24, 20, 4)
        regime = OrderedDropout(penalty=0, nested=nested, shrink_every=None)
        regime.start_(model)
        train(model, regime, 3)
        model[2].weight.keep_(9)  # type: ignore[union-attr, operator]
        x = torch.randn(5, 8)
        regime.before_step()  # leaves a width drawn, which must not be what is folded
        expected = copy.deepcopy(model).eval()(x)
        assert regime.finish_() == {"0": 8, "2": 9, "4": 4}
        assert set(hosts(model)) == ({"0", "2", "4"} if nested else {"2"})
        assert model.training and all(p.requires_grad for p in model.parameters())
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)


def test_a_penalty_that_removes_everything_keeps_the_smallest_size_and_warns() -> None:
    for smallest in (1, 0):
        model = mlp(8, 6, 4)
        regime = OrderedDropout(penalty=1.0, shrink_every=5, smallest=smallest, eps=0.05, relative=False)
        regime.start_(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ranks = train(model, regime, 100, rate=0.02)
        said = [str(w.message) for w in caught]
        assert list(ranks[-1].values()) == [smallest, smallest]
        assert len(said) == 2  # once a layer
        assert all(f"components; it keeps {smallest}. Lower the penalty" in text for text in said)
        x = torch.randn(5, 8)
        expected = model.eval()(x)
        regime.finish_()
        assert expected.isfinite().all()
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)


def test_divergence_is_said() -> None:
    model = mlp(8, 6, 4)
    regime = OrderedDropout(penalty=0)
    regime.start_(model)
    with torch.no_grad():
        model[2].weight.left.weight[0, 0] = math.nan  # type: ignore[union-attr, index]
    with pytest.raises(ValueError, match="layer '2' holds NaN or infinity after 0 steps"):
        regime.shrink_()
    assert regime.ranks == {"0": 6, "2": 4}


def test_a_relative_threshold_shrinks_under_adam_where_the_paper_s_does_not() -> None:
    """Trap 16: the steps of Adam hold a norm near rate · √entries."""
    found = []
    for options in ({}, {"eps": 1e-7, "relative": False}):
        model = mlp(8, 24, 20, 4)
        regime = OrderedDropout(penalty=3e-2, shrink_every=10, **options)  # type: ignore[arg-type]
        regime.start_(model)
        found.append(train(model, regime, 100)[-1])
    assert found[0]["0"] < 8 and found[0]["2"] < 20
    assert found[1] == {"0": 8, "2": 20, "4": 4}


def test_one_pair_sampling_stays_finite_with_clipping() -> None:
    """Trap 14: the network of check B at rate 0.05 and momentum 0.9, as the documented loop has it."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32)
    x, y = (x - x.mean(0)) / x.std(0).clamp_min(1e-3), torch.tensor(digits.target)
    model = mlp(64, 128, 128, 10)
    regime = OrderedDropout(penalty=0, shrink_every=20)
    regime.start_(model)
    assert sum(s.params for s in (h.weight for h in hosts(model).values())) == 46_436
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(200):
        index = torch.randint(len(x), (64,))
        regime.before_step()
        noisy = x[index] + 0.3 * torch.randn(64, 64)
        (F.cross_entropy(model(noisy), y[index]) + regime.penalty()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        regime.after_step()
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.9


# Counts


def test_counts() -> None:
    """Vectors 4 to 6, and trap 20: what training costs is said beside what the result costs."""
    model = mlp(64, 128, 128, 10)
    regime = OrderedDropout(penalty=0)
    regime.start_(model)
    for ranks, parameters in (((64, 128, 10), 46_436), ((16, 11, 8), 6_992), ((8, 6, 5), 3_762)):
        for host, rank in zip(hosts(model).values(), ranks, strict=True):
            host.weight.keep_(rank)  # type: ignore[operator]
        assert sum(host.weight.macs for host in hosts(model).values()) == parameters
        assert regime.macs()["dense"] == 25_856
    assert regime.macs()["final"] == 3_762
    assert 0.5 * 3_762 < regime.macs()["training"] < 3_762
    assert regime.macs({"0": 3})["dense"] == 25_856 + 2 * 64 * 128
    regime.finish_()
    assert sum(host.weight.params for host in hosts(model).values()) == 3_762
    for shape, rank in (((512, 512), 255), ((64, 64 * 9), 57)):
        kept = []
        for each in (rank, rank + 1):
            held = nn.ModuleList([Layer(nn.Linear(*shape[::-1])).wrap(Ordered(shape, rank=min(shape)))])
            regime.start_(held)
            held[0].weight.keep_(each)  # type: ignore[union-attr, operator]
            regime.finish_()
            kept.append(set(hosts(held)))
        assert kept == [{"0"}, set()]
    one = nn.ModuleList([nn.Linear(128, 128)])
    regime.start_(one)
    assert regime.macs() == {"dense": 16_384, "training": 16_512, "final": 16_384}
    assert one[0].weight.macs == 32_768  # type: ignore[union-attr]
