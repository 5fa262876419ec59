"""Optimizer steps in the backward pass, in the Trainer of transformers: the same, resumed, refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_steps import DATA, factorized, gradients_alive, same, trainer
from transformers import TrainerCallback

import rankfold
from rankfold.straight_through import StraightThrough
from rankfold.trainer_callback import RegimeCallback, StepInBackwardCallback


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_trainer_trains_the_same(accumulate: int, tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    """With its own schedule; eight batches in groups of three leave a last group of two."""
    options = {"gradient_accumulation_steps": accumulate}
    plain, model = factorized(tiny_llama), factorized(tiny_llama)
    trainer(plain, tmp_path / "plain", **options).train()
    with gradients_alive(model) as most:
        trainer(model, tmp_path / "run", StepInBackwardCallback(), **options).train()
    same(model, plain)
    if accumulate == 1:
        assert most[0] < sum(p.nbytes for p in model.parameters()) / 3
    model(DATA[0]["input_ids"][None], labels=DATA[0]["labels"][None]).loss.backward()
    assert all(p.grad is not None for p in model.parameters())  # training is over


def test_the_trainer_resumes_bit_for_bit(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    whole, first, second = (factorized(tiny_llama) for _ in range(3))
    trainer(whole, tmp_path / "whole", StepInBackwardCallback()).train()
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer(first, tmp_path / "run", StepInBackwardCallback(), **saving).train()
    run = trainer(second, tmp_path / "run", StepInBackwardCallback())
    run.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    same(second, whole)
    same(first, whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 1.0}, r"max_grad_norm=1\.0 clips.*max_grad_norm=0\.0"),
        ({"fp16": True}, "bf16=True"),
    ],
    ids=["clipping", "float16"],
)
def test_the_trainer_refuses(
    options: dict[str, Any], message: str, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    run = trainer(factorized(tiny_llama), tmp_path, StepInBackwardCallback())
    for name, value in options.items():  # afterwards: the arguments themselves refuse float16 without a GPU
        setattr(run.args, name, value)
    with pytest.raises(ValueError, match=message):
        run.train()


def test_training_again_after_an_exception(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    """The same Trainer, whose optimizer is stepped in the backward pass still."""

    class Breaks(TrainerCallback):
        times = 0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times += 1
            if self.times == 1:
                raise KeyboardInterrupt

    run = trainer(factorized(tiny_llama), tmp_path, StepInBackwardCallback(), Breaks())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.train()


def test_a_penalty_in_the_trainer_is_refused(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    """It would be added to gradients that are gone."""
    model, method = tiny_llama(), rankfold.methods.SVD()
    regime = StraightThrough(method, reading="weight", decay=1e-3, freeze=0.0)
    regime.start_(model, budget=0.6)
    run = trainer(model, tmp_path, StepInBackwardCallback(), RegimeCallback(regime))
    with pytest.raises(ValueError, match=r"StraightThrough has a penalty.*Add regime\.penalty"):
        run.train()
    quiet, model = StraightThrough(method, reading="weight", freeze=0.0), tiny_llama()
    quiet.start_(model, budget=0.6)
    trainer(model, tmp_path, StepInBackwardCallback(), RegimeCallback(quiet)).train()
