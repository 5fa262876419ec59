"""Trained rank pruning in a loop: where the gradient is taken, when, what resumes, and what is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_truncate import net, started
from torch import Tensor, nn
from torch.nn import functional as F

import rankfold
from rankfold.hosts import hosts
from rankfold.layers import Layer
from rankfold.metric import DecompositionError
from rankfold.truncate import Truncate

X, Y = torch.randn(24, 3, 9, 9, generator=torch.Generator().manual_seed(5)), torch.arange(24) % 4


def rank_of(weight: Tensor, spatial: bool = True) -> int:
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], (weight.shape[2], weight.shape[3]))
    return int(torch.linalg.matrix_rank(Layer(conv, spatial).read(weight.detach()), rtol=1e-5))


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)


def train(model: nn.Module, regime: Truncate, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(regime.step, steps):
        at = slice(8 * (step % 3), 8 * (step % 3) + 8)
        regime.before_step()
        optimizer.zero_grad()
        (F.cross_entropy(model(X[at]), Y[at]) + regime.penalty()).backward()
        optimizer.step()
        regime.after_step()


def equal(one: nn.Module, two: nn.Module) -> bool:
    mine, theirs = one.state_dict(), two.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_the_forward_pass_and_its_gradient_are_at_the_truncated_weight() -> None:
    """No straight-through copy: the parameter itself has rank k, and the step starts from there."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)  # made before start_: nothing is replaced
    regime = started(model, e=0.3, nuclear=0.0)
    regime.before_step()
    weight = model[1].weight.detach().clone()
    assert rank_of(weight) < 18
    seen: list[Tensor] = []
    handle = model[1].register_forward_hook(lambda module, *_: seen.append(module.weight.detach().clone()))
    F.cross_entropy(model(X), Y).backward()
    handle.remove()
    assert torch.equal(seen[0], weight)
    twin = copy.deepcopy(model)
    twin.zero_grad()
    F.cross_entropy(twin(X), Y).backward()
    gradient = twin[1].weight.grad
    assert gradient is not None and torch.equal(model[1].weight.grad, gradient)
    optimizer.step()
    torch.testing.assert_close(model[1].weight.detach(), weight - 0.5 * gradient)


def test_the_period_is_counted_over_the_whole_training() -> None:
    """Batches repeat after three steps: no epoch restarts the count."""
    model, low = net(), []
    regime = started(model, e=0.3, every=4)
    handle = model[1].register_forward_pre_hook(lambda module, _: low.append(rank_of(module.weight) < 18))
    train(model, regime, sgd(model), 10)
    handle.remove()
    assert low == [True, *[False] * 3, True, *[False] * 3, True, False]


@pytest.mark.parametrize("stop", [3, 4])
def test_resumes_bit_for_bit(stop: int) -> None:
    torch.manual_seed(2)
    first = net()
    start = copy.deepcopy(first)
    regime, optimizer = started(first, e=0.1, every=4, nuclear=1e-2), sgd(first)
    train(first, regime, optimizer, 9)
    second = copy.deepcopy(start)
    regime, optimizer = started(second, e=0.1, every=4, nuclear=1e-2), sgd(second)
    train(second, regime, optimizer, stop)
    third = net()
    third.load_state_dict(second.state_dict())
    again = started(third, e=0.1, every=4, nuclear=1e-2)
    again.schedule(9, stop)
    other = sgd(third)
    other.load_state_dict(optimizer.state_dict())
    train(third, again, other, 9)
    assert equal(first, third)


def test_the_penalty_may_go_to_the_gradients_instead() -> None:
    model = net()
    regime = started(model, e=0.1, nuclear=0.3)
    regime.before_step()
    regime.penalty().backward()
    by_loss = model[1].weight.grad
    assert by_loss is not None
    model.zero_grad()
    regime.penalty_gradients_()
    torch.testing.assert_close(model[1].weight.grad, by_loss)
    assert model[0].weight.grad is None


def test_a_look_at_the_truncated_model_changes_nothing() -> None:
    """A best checkpoint is chosen by what finish_ would leave."""
    model = net()
    regime = started(model, e=0.4)
    before = copy.deepcopy(model)
    ranks = regime.ranks()
    with pytest.raises(KeyError), regime.truncated():
        assert rank_of(model[1].weight) == ranks["1"]
        logits = model(X).detach()
        raise KeyError
    assert equal(model, before)
    assert regime.finish_() == ranks
    torch.testing.assert_close(model(X).detach(), logits, rtol=0, atol=1e-5)


def test_tuning_after_finish_trains_the_factors() -> None:
    model = net()
    started(model, e=0.4).finish_()
    factors = [model[1].weight.left.weight, model[1].weight.right.weight]
    before = [factor.detach().clone() for factor in factors]
    optimizer = sgd(model)
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    assert not any(torch.equal(now, old) for now, old in zip(factors, before, strict=True))


def test_layers_that_share_a_weight_share_the_factors() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, 2, padding=1))
    model[2].weight = model[1].weight
    regime = started(model, e=0.4)
    with regime.truncated():
        expected = model(X)
    assert regime.finish_(X) == {"1": model[1].weight.rank, "2": model[1].weight.rank}
    assert model[1].weight is model[2].weight and model[2].stride == (2, 2)
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ["autocast", "compiled", "channels_last"])
def test_ways_to_train(how: str) -> None:
    model = net()
    if how == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    regime, optimizer = started(model, e=0.3, every=2), sgd(model)
    forward: Any = torch.compile(model, backend="eager") if how == "compiled" else model
    for _ in range(5):
        regime.before_step()
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            loss = F.cross_entropy(forward(X), Y) + regime.penalty()
        optimizer.zero_grad()
        loss.backward()
        assert math.isfinite(loss.item())
        optimizer.step()
        regime.after_step()
        torch.testing.assert_close(forward(X), model(X))
    with regime.truncated():
        expected = model(X)
    regime.finish_(X)
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-5)


def test_with_the_trainer(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from rankfold.trainer_callback import RegimeCallback

    ids = torch.randint(4, 128, (8, 12))
    model = tiny_llama()
    regime = Truncate(e=0.5, every=2)
    regime.start_(model, targets=["*.down_proj"])
    callback = RegimeCallback(regime)
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=3, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    data: Any = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    assert callback.facts == {name: host.weight.rank for name, host in hosts(model).items()}
    assert len(callback.facts) == 2
    recipe = {"name": "trp", "regime": regime.to_json()}
    assert model.config.quantization_config["recipe"] == recipe and regime.to_json()["every"] == 2
    rankfold.save(model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


# Which layers, and what is refused


def test_default_layers() -> None:
    """Convolutions larger than 1 x 1, but the first one, and none of several groups."""
    model = nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 8, 3),
            "square": nn.Conv2d(8, 8, 3),
            "strided": nn.Conv2d(8, 8, 3, stride=2),
            "point": nn.Conv2d(8, 8, 1),
            "depthwise": nn.Conv2d(8, 8, 3, groups=8),
            "flat": nn.Conv2d(8, 8, (1, 3)),
            "head": nn.Linear(8, 4),
        }
    )
    regime = started(model)
    assert list(regime.ranks()) == ["square", "strided", "flat"]
    regime.start_(model, skip=["fl*"])
    assert list(regime.ranks()) == ["square", "strided"]
    with pytest.raises(ValueError, match=r"depthwise.*grouped convolution \(8 groups\)"):
        Truncate().start_(model, targets=["depthwise"])


def test_layers_that_cannot_be_truncated() -> None:
    with pytest.raises(ValueError, match=r"no convolution is left.*targets"):
        Truncate().start_(nn.Sequential(nn.Conv2d(3, 3, 3), nn.Linear(3, 3)))
    with pytest.raises(ValueError, match=r"layer '0' is an embedding"):
        Truncate().start_(nn.Sequential(nn.Embedding(4, 3)), targets=["0"])
    with pytest.raises(ValueError, match=r"layer '1' is torch.bfloat16.*float32.*autocast"):
        Truncate().start_(net().to(torch.bfloat16))
    bad = net()
    with torch.no_grad():
        bad[1].weight[0, 0, 0, 0] = math.inf
    with pytest.raises(ValueError, match=r"'1.weight'.*holds 1 NaN or infinite"):
        Truncate().start_(bad)
    with pytest.raises(ValueError, match="not in training"):
        Truncate().before_step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"e": 1.0}, r"e=1.0.*below 1"),
        ({"e": -0.1}, r"e=-0.1.*at least 0"),
        ({"e": math.nan}, "e=nan"),
        ({"e": True}, "e=True"),
        ({"every": 0}, r"every=0.*at least 1"),
        ({"every": 2.0}, "every=2.0"),
        ({"nuclear": -1e-4}, "nuclear=-0.0001"),
        ({"nuclear": math.inf}, "nuclear=inf"),
        ({"scheme": "depthwise"}, r"scheme='depthwise'.*spatial"),
        ({"final": 0.0}, r"final=0.0.*'energy'"),
        ({"final": "rank"}, "final='rank'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Truncate(**options)


@pytest.mark.parametrize(("final", "weight"), [("energy", 0.0), (0.05, 1e-4)])
def test_a_layer_that_vanished_is_kept_at_rank_one(final: Any, weight: float) -> None:
    model = net()
    regime = started(model, final=final)
    with torch.no_grad():
        model[1].weight.mul_(weight)
    expected = model(X)
    with pytest.warns(UserWarning, match=r"layer '1' has vanished.*rank 1.*nuclear"):
        assert regime.finish_() == {"1": 1}
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-3)


def test_an_absolute_threshold_is_that_of_finish_alone() -> None:
    model = net()
    sigma = torch.linalg.svdvals(Layer(model[1], True).matrix())
    least = float((sigma[4] + sigma[5]) / 2)
    assert started(model, e=0.0, final=least).finish_() == {"1": 5}


def test_a_failed_svd_is_counted_and_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    regime = started(model)
    before = model[1].weight.detach().clone()

    def fails(*_: Any, **__: Any) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    with monkeypatch.context() as patched:
        patched.setattr(torch.linalg, "svd", fails)
        for verb in (regime.before_step, regime.finish_):
            with pytest.raises(DecompositionError, match=r"layer '1'.*\(24, 18\) failed at step 0.*converge"):
                verb()
    assert regime.failures == 2 and torch.equal(model[1].weight, before)
    with torch.no_grad():
        model[1].weight[0, 0, 0, 0] = math.nan
    with pytest.raises(DecompositionError, match=r"layer '1'.*finite.*diverged"):
        regime.before_step()
