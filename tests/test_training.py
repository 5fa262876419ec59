"""Training a factorized model with the tools of others: every factor learns, and runs resume exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import rankfold
from rankfold import hosts

DATA = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(4, 128, (8, 16), generator=torch.Generator().manual_seed(1))
]


@pytest.fixture
def folder(tiny_llama: Callable[..., Any], tmp_path: Path) -> Path:
    model = tiny_llama()
    rankfold.factorize_(model, rankfold.recipes.svd, budget=0.6)
    return rankfold.save(model, tmp_path / "model")


def trainer(model: Any, out: Path, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
        "dataloader_pin_memory": False,
    }
    return Trainer(model=model, args=TrainingArguments(**(defaults | options)), train_dataset=DATA)


def factors(model: Any) -> dict[str, Tensor]:
    return {
        name: p for name, p in model.named_parameters() if ".weight.left" in name or ".weight.right" in name
    }


@pytest.mark.parametrize(
    ("options", "checkpointing"),
    [({}, None), ({}, {"use_reentrant": False}), ({}, {"use_reentrant": True}), ({"bf16": True}, None)],
    ids=["plain", "checkpointed", "reentrant", "bf16"],
)
def test_trainer_changes_every_factor(
    options: dict[str, Any], checkpointing: dict[str, Any] | None, folder: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    if checkpointing is not None:
        name = "activation_checkpointing_enable"  # "gradient_…" before transformers 5.2x
        enable = getattr(model, name, None) or model.gradient_checkpointing_enable
        enable(checkpointing)
        model.config.use_cache = False
    before = {name: tensor.detach().clone() for name, tensor in factors(model).items()}
    assert len(before) == 28
    run = trainer(model, tmp_path / "run", **options)
    assert math.isfinite(run.train().training_loss)
    for name, tensor in factors(model).items():
        assert tensor.requires_grad and tensor.dtype is torch.float32, name
        assert not torch.equal(tensor, before[name]), f"{name} did not change"
    run.save_model(str(tmp_path / "trained"))
    mine = model.state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "trained").state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_trainer_resumes_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folder)
    trainer(whole, tmp_path / "whole", max_steps=4).train()
    first = AutoModelForCausalLM.from_pretrained(folder)
    trainer(first, tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=2).train()
    second = AutoModelForCausalLM.from_pretrained(folder)
    trainer(second, tmp_path / "run", max_steps=4).train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2")
    )
    mine, theirs = whole.state_dict(), second.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)
    checkpoint = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert hosts.hosts(checkpoint).keys() == hosts.hosts(first).keys()


@pytest.mark.parametrize("fresh", [True, False], ids=["just factorized", "reloaded"])
def test_one_step_reaches_every_parameter(fresh: bool, folder: Path, tiny_llama: Callable[..., Any]) -> None:
    """Whatever says that it can be trained has a gradient, and a step changes the output."""
    model = tiny_llama() if fresh else AutoModelForCausalLM.from_pretrained(folder)
    if fresh:
        rankfold.factorize_(model, rankfold.recipes.svd, budget=0.6, targets=["*"])
    ids = torch.stack([row["input_ids"] for row in DATA])
    output = model.train()(ids, labels=ids)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad, name
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    optimizer.step()
    assert model(ids, labels=ids).loss < output.loss


def test_frozen_stays_frozen(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    model.model.layers[0].requires_grad_(False)
    rankfold.factorize_(model, rankfold.recipes.svd, budget=0.6)
    flags = {name: p.requires_grad for name, p in factors(model).items()}
    assert {name for name, flag in flags.items() if not flag} == {n for n in flags if "layers.0." in n}


@pytest.mark.slow
def test_trainer_compiles(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: tensor.detach().clone() for name, tensor in factors(model).items()}
    run = trainer(model, tmp_path / "run", torch_compile=True, torch_compile_backend="aot_eager")
    assert math.isfinite(run.train().training_loss)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in factors(model).items())
