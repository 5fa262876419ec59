"""Optimizers: one made too early is found, and 8-bit Adam holds the bytes that it promises."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_steps import DATA, same, trainer

import rankfold
from rankfold.methods import SVD
from rankfold.optimizers import check_optimizer, check_unheld
from rankfold.ordered_dropout import OrderedDropout
from rankfold.step_in_backward import StepInBackward
from rankfold.straight_through import StraightThrough
from rankfold.trainer_callback import RegimeCallback, StepInBackwardCallback
from rankfold.truncate import Truncate


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32))


def restart(model: nn.Module, kind: str) -> None:
    """Each way of giving a model new parameters that are then to be trained."""
    if kind == "factorize_":
        rankfold.factorize_(model, rankfold.recipes.sltrain(rank=4, sparsity=0.05))
    elif kind == "maestro":
        OrderedDropout(penalty=0.0).start_(model)
    else:
        reading = "weight" if kind == "weight" else "coefficient"
        method = SVD() if kind == "weight" else rankfold.methods.Dictionary(width=8, ratio=2.0, sweeps=2)
        StraightThrough(method, reading=reading).start_(model, steps=2, budget=0.8)


# Made before the structure existed


@pytest.mark.parametrize("kind", ["factorize_", "maestro", "coefficient", "weight"])
def test_an_optimizer_made_too_early_is_found(kind: str) -> None:
    model = network()
    before = dict(model.named_parameters())
    early = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"AdamW made earlier holds .*'0.*Make the optimizer afterwards"):
        restart(model, kind)
    if kind in ("factorize_", "maestro"):
        after = dict(model.named_parameters())
        assert after.keys() == before.keys() and all(after[n] is p for n, p in before.items())
    del early
    gc.collect()
    restart(network(), kind)


def test_factors_that_an_optimizer_trains_are_not_made_masters() -> None:
    model = network()
    rankfold.factorize_(model, rankfold.recipes.svd, budget=0.8)
    early = torch.optim.AdamW(model.parameters())
    regime = StraightThrough(SVD(), reading="weight", freeze=0.0)
    with pytest.raises(ValueError, match=r"StraightThrough\.start_ replaces 4 .*right\.weight"):
        regime.start_(model)
    del early
    gc.collect()
    regime.start_(model)


def test_the_optimizer_of_another_model_is_not_in_the_way() -> None:
    other = network()
    optimizer = torch.optim.AdamW(other.parameters())
    for kind in ("factorize_", "maestro", "coefficient", "weight"):
        restart(network(), kind)
    check_unheld(dict(network().named_parameters()), "a test")
    with pytest.raises(ValueError, match=r"a test replaces 4 parameters, and a AdamW made earlier holds 4"):
        check_unheld(dict(other.named_parameters()), "a test")
    assert optimizer.param_groups


def test_truncation_replaces_nothing_that_an_optimizer_holds() -> None:
    """Its layers stay dense until the end, so that the optimizer may be made before."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regime = Truncate()
    regime.start_(model, targets=["*"])
    check_optimizer(model, optimizer)
    regime.finish_()


def test_check_optimizer_names_what_is_not_trained() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model[0].parameters())
    with pytest.raises(ValueError, match=r"does not hold 2 of the model's 4 parameters.*'2\.weight'"):
        check_optimizer(model, optimizer)
    model[2].requires_grad_(False)
    check_optimizer(model, optimizer)


def test_the_trainer_is_told_of_an_optimizer_made_too_early(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    """A copy of the optimizer's parameters, as another process would load it, is no live optimizer of these:
    the callback finds it all the same."""
    model, regime = tiny_llama(), OrderedDropout(penalty=0.0)
    stranger = torch.optim.AdamW(tiny_llama().parameters())
    regime.start_(model)
    run = trainer(model, tmp_path, RegimeCallback(regime), make={"optimizers": (stranger, None)})
    with pytest.raises(ValueError, match="made before the model was factorized"):
        run.train()


# 8-bit Adam


@pytest.fixture
def adam8bit() -> Iterator[Any]:
    """torchao's, uncompiled: it compiles its step, which takes a C++ compiler and seconds."""
    reason = "8-bit Adam is torchao's: pip install torchao"
    optim = pytest.importorskip("torchao.optim", reason=reason)
    with torch.compiler.set_stance("force_eager"):
        yield optim.AdamW8bit


def held(state: dict[str, Any]) -> int:
    """Bytes of the moments of one parameter, scales and tables included."""
    parts: list[Tensor] = []
    for name, tensor in state.items():
        if name != "step":
            names = getattr(tensor, "tensor_attrs", None)
            parts += [getattr(tensor, part) for part in names] if names else [tensor]
    return sum(part.nbytes for part in parts)


def test_8bit_adam_holds_two_bytes_a_parameter_of_large_tensors(adam8bit: Any) -> None:
    """And eight of small ones, and of those whose size is no multiple of 256: a sparse term's values, say."""
    sizes = {(256, 512): 8, (64, 64): 8, (63, 64): 32, (5000,): 32, (5120,): 8}
    parameters = [nn.Parameter(torch.randn(size)) for size in sizes]
    optimizer = adam8bit(parameters, lr=1e-3)
    torch.stack([p.square().sum() for p in parameters]).sum().backward()
    optimizer.step()
    for parameter, bits in zip(parameters, sizes.values(), strict=True):
        blocks = parameter.numel() // 256
        table = 0 if bits == 32 else 4 * blocks + 4 * 256  # a scale a block, and the values of the codes
        assert held(optimizer.state[parameter]) == 2 * (parameter.numel() * bits // 8 + table)
    large = held(optimizer.state[parameters[0]]) / parameters[0].numel()
    assert large < 2.05


def scratch(tiny_llama: Callable[..., Any]) -> Any:
    model = tiny_llama(hidden_size=128, intermediate_size=256, num_hidden_layers=1).train()
    rankfold.factorize_(model, rankfold.recipes.sltrain(rank=32, sparsity=0.03))
    return model


def test_8bit_adam_trains_a_fresh_sparse_and_low_rank_model(
    adam8bit: Any, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    """SLTrain as the paper's largest run trains it: 8-bit Adam, every parameter stepped in the backward pass.
    Inside and outside are bit for bit the same, and near Adam in float32."""
    ids = torch.stack([row["input_ids"] for row in DATA])
    models: list[Any] = []
    for kind in ("float32", "outside", "inside"):
        model = scratch(tiny_llama)
        make = torch.optim.AdamW if kind == "float32" else adam8bit
        optimizer = make(model.parameters(), lr=2e-3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        if kind == "inside":
            StepInBackward(optimizer)
        losses = []
        for _ in range(3):
            loss = model(ids, labels=ids).loss
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        assert losses[-1] < losses[0]
        models.append((model, losses))
    same(models[1][0], models[2][0])
    assert models[1][1] == pytest.approx(models[0][1], rel=0.01)


@pytest.mark.slow
def test_8bit_adam_in_the_trainer_resumes_bit_for_bit(
    adam8bit: Any, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    options = {"optim": "adamw_torch_8bit", "max_steps": 2}
    whole, second = scratch(tiny_llama), scratch(tiny_llama)
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer(whole, tmp_path / "run", StepInBackwardCallback(), **options, **saving).train()
    run = trainer(second, tmp_path / "run", StepInBackwardCallback(), **options)
    run.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert isinstance(getattr(run.optimizer, "optimizer", run.optimizer), adam8bit)
    same(second, whole)
