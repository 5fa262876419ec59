"""Laws of every form of training, in the Trainer of transformers: the loop's training; resumed bit for bit;
and a folder that plain `from_pretrained` opens and runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_steps
from torch import Tensor
from toy_regimes import FORMS, train
from toy_steps import DATA, same
from transformers import AutoModelForCausalLM, Trainer

from rankfold.hosts import hosts
from rankfold.trainer_callback import RegimeCallback

IDS = torch.stack([row["input_ids"] for row in DATA[:4]])
SLOW = pytest.mark.slow
MAIN = pytest.mark.parametrize("form", ["sltrain", "maestro", "trp", pytest.param("codes", marks=SLOW)])


def trainer(model: Any, regime: Any, out: Path, seen: list[Any] | None = None, **options: Any) -> Trainer:
    """Without finishing the regime; `seen` gathers the batches in their order."""

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        if seen is not None:
            seen.append(batch)
        return batch

    defaults = {"learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant"}
    make = {"data_collator": collate, "train_dataset": DATA}
    callback = RegimeCallback(regime, finish=False)
    return toy_steps.trainer(model, out, callback, make=make, **(defaults | options))


def started(form: str, tiny_llama: Callable[..., Any]) -> tuple[Any, Any]:
    model, regime = tiny_llama(num_hidden_layers=1), FORMS[form]()
    regime.start_(model, steps=4)
    return model, regime


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@MAIN
def test_the_trainer_is_the_loop_and_its_model_is_a_folder(
    form: str, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    """With accumulation; then `finish_`, save, reload: ranks, supports and logits are those of training."""
    seen: list[Any] = []
    model, regime = started(form, tiny_llama)
    trainer(model, regime, tmp_path, seen, gradient_accumulation_steps=2).train()
    assert regime.step == 4
    other, loop = started(form, tiny_llama)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    steps = [seen[i : i + 2] for i in (0, 2, 4, 6)]
    train(other.train(), loop, optimizer, steps, lambda model, batch: model(**batch).loss)
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5)

    if form == "trp":
        with regime.truncated():
            before = logits(model)
    else:
        before = logits(model)
    regime.finish_()
    after = logits(model)
    assert float((after - before).abs().max()) <= 1e-5
    assert hosts(model)
    model.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    same(again, model)
    assert {n: h.weight.spec() for n, h in hosts(again).items()} == {
        n: h.weight.spec() for n, h in hosts(model).items()
    }
    assert torch.equal(logits(again), after)
    if form == "sltrain":
        places = {n: t for n, t in again.state_dict().items() if n.endswith("places")}
        fresh, _ = started(form, tiny_llama)
        assert len(places) == 7 and all(torch.equal(fresh.state_dict()[n], t) for n, t in places.items())


@MAIN
def test_a_checkpoint_of_the_trainer_is_the_whole_state(
    form: str, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    """Resumed bit for bit; and opened as it is, with its ranks, it goes on from there too."""
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "linear"}
    whole, regime = started(form, tiny_llama)
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer(whole, regime, tmp_path, **options, **saving).train()
    folder = tmp_path / "checkpoint-2"
    second, again = started(form, tiny_llama)
    trainer(second, again, tmp_path, **options).train(resume_from_checkpoint=str(folder))
    same(second, whole)
    third, regime = AutoModelForCausalLM.from_pretrained(folder), FORMS[form]()
    regime.start_(third, steps=4)
    trainer(third, regime, tmp_path, **options).train(resume_from_checkpoint=str(folder))
    same(third, whole)
