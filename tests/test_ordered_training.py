"""Maestro's training interrupted, saved, opened, resumed; by hand and in the Trainer of transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold
from rankfold.hosts import hosts
from rankfold.ordered import Ordered
from rankfold.ordered_dropout import OrderedDropout
from rankfold.structures import LowRank
from rankfold.trainer_callback import RegimeCallback


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))


def started(sampler: str = "pair") -> tuple[nn.Sequential, OrderedDropout]:
    model = network()
    regime = OrderedDropout(penalty=3e-2, sampler=sampler, eps=0.05, shrink_every=7)
    regime.start_(model, steps=40)
    return model, regime


def go(model: nn.Module, regime: OrderedDropout, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        regime.before_step()
        for half in x.chunk(2):  # gradients accumulate; the penalty is added once
            ((model(half)[:, 0] - half.sum(1)).square().mean() / 2).backward()
        regime.penalty().backward()
        optimizer.step()
        optimizer.zero_grad()
        regime.after_step()


@pytest.mark.parametrize("sampler", ["pair", "independent"])
@pytest.mark.parametrize("stop", [21, 24])
def test_a_resumed_run_is_the_same_bit_for_bit(sampler: str, stop: int) -> None:
    model, regime = started(sampler)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    go(model, regime, optimizer, 0, stop)
    state, moments, ranks = model.state_dict(), optimizer.state_dict(), regime.ranks
    state = copy.deepcopy(state)
    again, other = started(sampler)
    second = torch.optim.Adam(again.parameters(), lr=0.02)
    again.load_state_dict(state)
    second.load_state_dict(copy.deepcopy(moments))
    other.schedule(40, stop)
    assert other.ranks == ranks and any(r < 8 for r in ranks.values())
    go(model, regime, optimizer, stop, 40)
    go(again, other, second, stop, 40)
    assert regime.finish_() == other.finish_() != ranks
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_model_in_training_is_saved_and_goes_on(tmp_path: Path) -> None:
    """Trap 5: opened from a folder it has its ranks, not the full ones; then it goes on, or is finished."""
    model, regime = started()
    go(model, regime, torch.optim.Adam(model.parameters(), lr=0.02), 0, 24)
    x, ranks = torch.randn(3, 8), regime.ranks
    expected = model.eval()(x)
    rankfold.save(model, tmp_path / "training")
    again = rankfold.load_(network(), tmp_path / "training").eval()
    assert torch.equal(again(x), expected)
    other = OrderedDropout(penalty=3e-2)
    other.start_(again)
    assert other.ranks == ranks
    go(again.train(), other, torch.optim.Adam(again.parameters(), lr=0.02), 24, 26)
    regime.finish_()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    rankfold.save(model, tmp_path / "small")
    small = rankfold.load_(network(), tmp_path / "small").eval()
    assert torch.equal(small(x), model(x))


def test_a_finished_model_opens_with_plain_from_pretrained(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model, ids = tiny_llama(), torch.randint(4, 128, (2, 8))
    regime = OrderedDropout(penalty=0.01)
    regime.start_(model)
    for host in hosts(model).values():
        host.weight.keep_(min(12, host.weight.rank))  # type: ignore[operator, type-var]
    model.model.layers[0].mlp.up_proj.weight.kept.fill_(60)
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "training")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "training")
    assert torch.equal(opened(ids).logits, expected)
    assert all(isinstance(host.weight, Ordered) for host in hosts(opened).values())
    ranks = regime.finish_()
    assert ranks["model.layers.0.mlp.up_proj"] == 60 and "model.layers.0.mlp.up_proj" not in hosts(model)
    assert all(type(host.weight) is LowRank for host in hosts(model).values())
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(again(ids).logits, model(ids).logits)
    recipe = again.config.quantization_config.recipe
    assert recipe["name"] == "maestro" and recipe["regime"]["penalty"] == 0.01


def test_the_trainer_resumes(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    rows = torch.randint(4, 128, (8, 12), generator=torch.Generator().manual_seed(1))
    data: Any = [{"input_ids": row, "labels": row} for row in rows]

    def run(folder: Path, resume: str | None = None) -> tuple[Any, dict[str, Tensor]]:
        model = tiny_llama()
        regime = OrderedDropout(penalty=1e-3, eps=0.3, shrink_every=2)
        regime.start_(model)
        options: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "learning_rate": 0.02, "seed": 0}
        options |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
        arguments = TrainingArguments(
            str(folder), per_device_train_batch_size=2, dataloader_pin_memory=False, **options
        )
        call = RegimeCallback(regime)
        Trainer(model, arguments, train_dataset=data, callbacks=[call]).train(resume_from_checkpoint=resume)
        return call.facts, {name: p.detach().clone() for name, p in model.named_parameters()}

    facts, whole = run(tmp_path / "a")
    again, resumed = run(tmp_path / "b", str(tmp_path / "a" / "checkpoint-2"))
    assert facts == again and min(facts.values()) < 64
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
