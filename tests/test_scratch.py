"""Scratch: fresh factors of the size asked for, drawn alike by all, and refused where they save nothing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankfold.method import Method, from_json
from rankfold.methods import Scratch
from rankfold.metric import Metric
from rankfold.structures import LowRank, Sum

SHAPE = (1376, 512)


def made(shape: tuple[int, int], dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    method = Scratch(**options)
    [size] = method.menu(shape)
    return method.fit(torch.ones(shape, dtype=dtype), Metric(), size)


def within(tensor: Tensor, bound: float) -> bool:
    """U(-bound, bound): nothing outside, and the variance bound² / 3 within five standard errors."""
    error = abs(float(tensor.var()) / (bound**2 / 3) - 1)
    return float(tensor.abs().max()) <= bound and error < 5 * math.sqrt(0.8 / tensor.numel())


def test_sizes() -> None:
    """A product of floats, in that order, rounded down."""
    assert Scratch(rank=128, sparsity=0.03).menu((512, 512)) == [[128, 7864]]
    assert Scratch(rank=128, sparsity=0.03).menu(SHAPE) == [[128, 21135]]
    assert Scratch(rank=1, sparsity=0.29).menu((10, 10)) == [[1, 28]]
    assert Scratch(rank=0.5).menu((512, 512)) == [128] == Scratch(rank=128).menu((512, 512))
    assert Scratch(rank=0.25).menu(SHAPE) == [93]  # 93.29
    total = Scratch(rank=128, sparsity=0.03).empty(SHAPE, [128, 21135])
    assert (total.params, total.nbytes) == (262_799, 4 * 262_799 + 4 * 21_135)
    assert type(Scratch().empty(SHAPE, 128)) is LowRank and type(total) is Sum


@pytest.mark.parametrize(
    ("options", "says"),
    [
        *(({"rank": rank}, rf"rank={rank!r}.*rank=128.*rank=0.5") for rank in (1.0, 3.7, 0, -2, True, 0.0)),
        *(({"sparsity": s}, rf"sparsity={s!r}.*above 0 and") for s in (0, 1, 0.0, 1.0, -0.1, True)),
        *(({"alpha": alpha}, r"alpha / rank") for alpha in (0, -1.0, math.inf, math.nan, True)),
        ({"init": "ones"}, "choose one of zero, torch"),
        ({"above": "warn"}, "choose one of refuse, dense"),
        ({"seed": 1.5}, "an integer"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Scratch(**options)


def test_a_size_that_saves_nothing_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"\(512, 512\).*rank 256.*break-even is at rank 256.*1 to 255"):
        Scratch(rank=256).menu((512, 512))
    with pytest.raises(ValueError, match=r"rank 250 and 7864 nonzeros.*1 to 248"):
        Scratch(rank=250, sparsity=0.03).menu((512, 512))
    assert Scratch(rank=248, sparsity=0.03).menu((512, 512)) == [[248, 7864]]
    with pytest.raises(ValueError, match=r"rank 0 would"):  # half of break-even 0.9
        Scratch().menu((9, 1))
    with pytest.raises(ValueError, match=r"0 nonzeros"):
        Scratch(rank=1, sparsity=0.01).menu((5, 5))
    dense = Scratch(rank=256, above="dense")
    assert dense.menu((512, 512)) == [] and dense.menu(SHAPE) == [256]
    assert dense.curve(torch.ones(16, 16), Metric()).sizes == (None,)


def test_fewer_parameters_may_be_more_bytes() -> None:
    """An index of four bytes beside a value of two: 0.45 of the parameters, 1.05 of the bytes."""
    options, weight = {"rank": 0.15, "sparsity": 0.3}, torch.ones(100, 100, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"takes 20800 bytes in torch.bfloat16.*dense takes 20000"):
        Scratch(**options).curve(weight, Metric())
    assert Scratch(**options, above="dense").curve(weight, Metric()).sizes == (None,)
    assert len(Scratch(**options).curve(weight, Metric(), "params").sizes) == 2
    assert len(Scratch(**options).curve(weight.float(), Metric()).sizes) == 2


def test_sltrain_starts_as_its_sparse_term() -> None:
    total = made(SHAPE, rank=128, sparsity=0.03, alpha=32.0, init="zero")
    low, rest = total.terms
    assert low.scale == 0.25 and not low.left.weight.any()
    assert within(low.right.weight.detach(), 512**-0.5) and within(rest.values.detach(), 512**-0.5)
    assert torch.equal(total.to_dense(), rest.to_dense())
    x = torch.randn(4, 512)
    total(x).square().sum().backward()
    assert not low.right.weight.grad.any()  # left is zero
    assert low.left.weight.grad.any() and rest.values.grad.all()


@pytest.mark.parametrize("alpha", [None, 32.0])
@pytest.mark.parametrize("shape", [(512, 512), (1376, 512), (512, 1376)])
def test_inits(shape: tuple[int, int], alpha: float | None) -> None:
    low = made(shape, rank=64, alpha=alpha, init="variance_preserving")
    variance = float(low.to_dense().detach().var()) * 3 * shape[1]
    assert abs(variance - 1) < 0.05  # that of nn.Linear
    assert within(low.right.weight.detach(), shape[1] ** -0.5)
    plain = made(shape, rank=64, alpha=alpha, init="torch")
    assert within(plain.right.weight.detach(), shape[1] ** -0.5)
    assert within(plain.left.weight.detach(), 1 / 8)
    assert plain.scale == low.scale == (1 if alpha is None else 0.5)


def test_svd_of_dense_keeps_what_a_truncated_svd_keeps() -> None:
    weight = torch.randn(40, 30, dtype=torch.float64)
    method = Scratch(rank=8, alpha=4.0, init="svd_of_dense")
    low = method.fit(weight, Metric(), 8)
    values = torch.linalg.svdvals(weight)
    assert isinstance(low, LowRank) and low.scale == 0.5
    lost = float((weight - low.to_dense()).detach().square().sum())
    assert lost == pytest.approx(float(values[8:].square().sum()), rel=1e-9)
    assert method.errors(weight, Metric(), [8]) == pytest.approx([lost], rel=1e-9)
    sides = low.left.weight.detach().norm(dim=0), low.right.weight.detach().norm(dim=1)
    for side in sides:
        torch.testing.assert_close(side, values[:8].sqrt() / math.sqrt(0.5), check_dtype=False)
    total = Scratch(rank=8, sparsity=0.1, init="svd_of_dense").fit(weight, Metric(), [8, 120])
    places = total.terms[1].places.long()
    torch.testing.assert_close(total.to_dense().flatten()[places], weight.flatten()[places])
    assert not method.fresh and Scratch().fresh


def test_layers_differ_and_processes_agree() -> None:
    """Never Python's hash, which differs in every process."""
    method = Scratch(rank=4, sparsity=0.1)
    seeds = {method.at(name, seed).seed for name in ("a", "b") for seed in (0, 1)}
    seeds |= {Scratch(rank=4, sparsity=0.1, seed=1).at("a", 0).seed}
    assert len(seeds) == 5
    weight = torch.ones(30, 20)
    one, again, two = (method.at(n, 0).fit(weight, Metric(), [4, 60]) for n in ("a", "a", "b"))
    assert all(torch.equal(t, again.state_dict()[key]) for key, t in one.state_dict().items())
    assert not torch.equal(one.terms[1].places, two.terms[1].places)
    code = "from rankfold.methods import Scratch; print(Scratch(rank=4, sparsity=0.1).at('a', 0).seed)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert run.stdout.split() == [str(method.at("a", 0).seed)], run.stderr


@pytest.mark.parametrize("init", ["zero", "torch", "variance_preserving", "svd_of_dense"])
@pytest.mark.parametrize("sparsity", [None, 0.05])
def test_it_is_a_method(init: str, sparsity: float | None) -> None:
    """JSON and back; the cost before the work; of each dtype; nothing from the global generator."""
    method = Scratch(rank=0.4, sparsity=sparsity, alpha=2.0, init=init)
    assert method == from_json(Method.kinds, "method", json.loads(json.dumps(method.to_json())))
    [size] = method.menu((30, 20))
    assert json.loads(json.dumps(size)) == size
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        weight = torch.randn(30, 20, dtype=dtype)
        state = torch.random.get_rng_state()
        fitted, empty = method.fit(weight, Metric(), size), method.empty((30, 20), size, dtype)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert (fitted.dtype, fitted.spec(), fitted.nbytes) == (dtype, empty.spec(), empty.nbytes)
    curve = method.curve(torch.randn(30, 20), Metric())
    assert curve.sizes == (size, None) and (curve.errors[0] > 0) == (init == "svd_of_dense")


def test_bad_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"float16.*bfloat16 or float32"):
        made((30, 20), torch.float16, rank=4)
    with pytest.raises(ValueError, match="1 NaN"):
        Scratch(rank=4).fit(torch.tensor([[math.nan] * 1 + [1.0] * 29] * 1).expand(1, 30), Metric(), 1)
    with pytest.raises(ValueError, match="rank of at least 1"):
        Scratch(rank=4).fit(torch.ones(30, 20), Metric(), 0)


def test_a_bias_is_left_as_it_is() -> None:
    """Bounded by 1/√in as nn.Linear's, because it is nn.Linear's."""
    from rankfold import factorize_, recipes

    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    biases = [model[i].bias.detach().clone() for i in (0, 2)]
    factorize_(model, recipes.sltrain(rank=8))
    for layer, bias, inner in zip((model[0], model[2]), biases, (64, 256), strict=True):
        assert torch.equal(layer.bias, bias) and float(bias.abs().max()) <= inner**-0.5
