"""Optimizer steps in the backward pass: the same training, bit for bit, with one layer's gradients alive."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from toy_steps import DATA, factorized, gradients_alive, same

from rankfold.step_in_backward import StepInBackward


def network(layers: int = 3, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[m for _ in range(layers) for m in (nn.Linear(8, 8), nn.Tanh())]).to(dtype)


def batches(count: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(2)
    return [
        (torch.randn(4, 8, generator=draw, dtype=dtype), torch.randn(4, 8, generator=draw, dtype=dtype))
        for _ in range(count)
    ]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: list[tuple[Tensor, Tensor]],
    accumulate: int = 1,
    schedule: Any = None,
) -> None:
    """The plain loop: the same lines with a StepInBackward and without."""
    for i, (x, y) in enumerate(data):
        (F.mse_loss(model(x), y) / accumulate).backward()
        if (i + 1) % accumulate == 0 or i + 1 == len(data):
            optimizer.step()
            optimizer.zero_grad()
            if schedule:
                schedule.step()


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.03, weight_decay=0.1),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.03, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.03, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.03),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_steps_are_those_of_the_optimizer_bit_for_bit(kind: str) -> None:
    """With a schedule, two parameter groups, and a state dict that another may load."""
    runs = []
    for inside in (False, True):
        model = network()
        groups = [
            {"params": list(model[0].parameters())},
            {"params": list(model[2:].parameters()), "lr": 0.01},
        ]
        optimizer = OPTIMIZERS[kind](groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)
        if inside:
            StepInBackward(optimizer)
        train(model, optimizer, batches(5), schedule=schedule)
        runs.append((model, optimizer))
    (plain, one), (model, two) = runs
    same(model, plain)
    torch.testing.assert_close(two.state_dict(), one.state_dict(), rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_a_language_model_with_factors_and_a_tied_head(tiny_llama: Callable[..., Any]) -> None:
    """A tied weight has its gradients of both uses before its step."""
    ids = torch.stack([row["input_ids"] for row in DATA])
    models = []
    for inside in (False, True):
        model = factorized(tiny_llama, tie_word_embeddings=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if inside:
            StepInBackward(optimizer)
        for _ in range(3):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    same(*models)


@pytest.mark.parametrize("count", [8, 7], ids=["whole steps", "a last step of three"])
def test_accumulation_equals_the_plain_loop_and_the_large_batch(count: int) -> None:
    """SLTrain's official code steps on every micro-batch; here the step waits for the last."""
    data = batches(count, torch.float64)
    plain, model, large = (network(dtype=torch.float64) for _ in range(3))
    train(plain, OPTIMIZERS["adamw"](plain.parameters()), data, accumulate=4)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with StepInBackward(optimizer, accumulate=4):
        train(model, optimizer, data, accumulate=4)
    same(model, plain)
    if count == 8:
        joined = [tuple(torch.cat(part) for part in zip(*data[i : i + 4], strict=True)) for i in (0, 4)]
        train(large, OPTIMIZERS["adamw"](large.parameters()), joined)  # type: ignore[arg-type]
        for mine, theirs in zip(model.parameters(), large.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_what_has_no_part_in_a_micro_batch_steps_with_the_rest() -> None:
    """As an expert that no token was sent to; and a parameter that never has a gradient stays."""

    def run(inside: bool) -> nn.Module:
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        if inside:
            StepInBackward(optimizer, accumulate=2)
        for i, (x, y) in enumerate(batches(6)):
            F.mse_loss(model[0](x) if i % 2 else model[1](model[0](x)), y).backward()
            if i % 2:
                optimizer.step()
                optimizer.zero_grad()
        return model

    same(run(True), run(False))


def test_a_run_resumes_bit_for_bit_also_without_it() -> None:
    """The state is the optimizer's own: saved in one mode, loaded in the other."""
    data = batches(6)
    whole = network()
    train(whole, optimizer := OPTIMIZERS["adamw"](whole.parameters()), data)
    for inside in ((True, True), (True, False), (False, True)):
        model, state = network(), None
        for part, use in zip((data[:3], data[3:]), inside, strict=True):
            fresh = network()
            fresh.load_state_dict(model.state_dict())
            optimizer = OPTIMIZERS["adamw"](fresh.parameters())
            steps = StepInBackward(optimizer) if use else None
            if state:
                optimizer.load_state_dict(state)
            train(fresh, optimizer, part)
            model, state = fresh, optimizer.state_dict()
            if steps:
                steps.close()
        same(model, whole)


# Memory


def test_the_gradients_of_one_layer_live_at_a_time() -> None:
    model = network(layers=6)
    whole = sum(p.nbytes for p in model.parameters())
    layer = sum(p.nbytes for p in model[0].parameters())
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    data = batches(2)
    with gradients_alive(model) as most:
        train(model, optimizer, data)
    assert most[0] == whole
    with gradients_alive(model) as most, StepInBackward(optimizer):
        train(model, optimizer, data)
    assert 0 < most[0] <= layer < whole / 5
    with gradients_alive(model) as most, StepInBackward(optimizer, accumulate=2):
        train(model, optimizer, data, accumulate=2)
    assert most[0] == whole  # accumulation needs them all


# Its end


def test_close_gives_the_optimizer_back() -> None:
    model, plain = network(), network()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with StepInBackward(optimizer) as steps:
        train(model, optimizer, batches(2))
    steps.close()  # once more does no harm
    F.mse_loss(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.zero_grad()
    train(model, optimizer, batches(2))
    train(plain, OPTIMIZERS["adamw"](plain.parameters()), batches(2) + batches(2))
    same(model, plain)


def test_with_the_optimizer_its_steps_end() -> None:
    model = network()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    steps = StepInBackward(optimizer)
    del optimizer
    before = [p.detach().clone() for p in model.parameters()]
    F.mse_loss(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    with StepInBackward(OPTIMIZERS["adamw"](model.parameters())):  # the old one is not in the way
        steps.close()


# Bad input


def test_two_backward_passes_without_a_step_are_refused() -> None:
    model = network()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with (
        StepInBackward(optimizer),
        pytest.raises(ValueError, match=r"backward pass 2 after optimizer.step\(\), and accumulate=1"),
    ):
        train(model, optimizer, batches(4), accumulate=2)


def test_a_parameter_of_several_reentrant_blocks_is_refused() -> None:
    """Its gradient would come in parts; without reentrance it comes whole."""

    def run(inside: bool, reentrant: bool) -> nn.Module:
        model = network()
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        if inside:
            StepInBackward(optimizer)
        x, y = batches(1)[0]
        hidden = x.requires_grad_()
        for _ in range(2):
            hidden = checkpoint(model, hidden, use_reentrant=reentrant)
        F.mse_loss(hidden, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        return model

    with pytest.raises(ValueError, match="use_reentrant=False"):
        run(True, True)
    same(run(True, False), run(False, False))


def test_a_gradient_that_comes_back_is_refused() -> None:
    model = network()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    StepInBackward(optimizer)
    F.mse_loss(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    model[0].weight.grad = torch.ones(8, 8)  # a penalty, written afterwards
    with pytest.raises(ValueError, match=r"\(8, 8\) has a gradient again.*penalty"):
        optimizer.step()


class Counting(torch.optim.SGD):
    """Counts its steps in the group, as some optimizers do: no parameter can step alone."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


def test_an_optimizer_of_all_parameters_together_is_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="LBFGS works on all gradients"):
        StepInBackward(torch.optim.LBFGS(model.parameters()))
    StepInBackward(optimizer := Counting(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="Counting changes 'k'"):
        train(model, optimizer, batches(1))


def test_bad_arguments() -> None:
    model = network()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with pytest.raises(ValueError, match="takes an optimizer of torch; got Sequential"):
        StepInBackward(model)  # type: ignore[arg-type]
    for accumulate in (0, True, 1.5):
        with pytest.raises(ValueError, match=r"accumulate=.*at least 1"):
            StepInBackward(optimizer, accumulate)  # type: ignore[arg-type]
    with StepInBackward(optimizer), pytest.raises(ValueError, match="another StepInBackward"):
        StepInBackward(OPTIMIZERS["sgd"](model.parameters()))


def test_data_parallel_is_noticed_even_with_one_process(tmp_path: Path) -> None:
    """It puts its averages back where the gradients were. Two processes: tests/test_distributed.py."""
    dist.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    try:
        model = network()
        wrapped = DistributedDataParallel(model)
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        with (
            StepInBackward(optimizer),
            pytest.raises(ValueError, match=r"DistributedDataParallel \(take fully_shard\)"),
        ):
            train(wrapped, optimizer, batches(2))
    finally:
        dist.destroy_process_group()
