"""Straight-through training from dense layers, in the Trainer of transformers, resumed, and refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toy_codes import code, coded, dense, master, train
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import rankfold
from rankfold.hosts import hosts
from rankfold.masters import CodeMaster, WeightMaster
from rankfold.methods import SVD, Dictionary
from rankfold.sparse_code import SparseCode
from rankfold.straight_through import StraightThrough
from rankfold.trainer_callback import RegimeCallback

METHOD = Dictionary(solver="ksvd", width=8, ratio=2.0, sweeps=3)


# From dense layers, and the weight reading


def test_coefficients_start_from_dense_layers() -> None:
    model, regime = dense(), StraightThrough(METHOD)
    regime.start_(model, steps=10, budget=0.8, targets=["0"])
    assert isinstance(master(model), CodeMaster)
    losses = train(model, regime, 10)
    assert losses[-1] < losses[0]
    regime.finish_()
    assert isinstance(master(model), SparseCode)


@pytest.mark.parametrize("refit", [1, 4])
@pytest.mark.parametrize("method", [SVD(), METHOD], ids=["svd", "dictionary"])
def test_weight_reading_trains_any_method(method: Any, refit: int) -> None:
    torch.manual_seed(3)
    model = dense()
    weight = model[0].weight.detach().clone()
    regime = StraightThrough(method, reading="weight", freeze=0.2, refit=refit, decay=1e-3)
    regime.start_(model, steps=40, budget=0.7, targets=["0"])
    held = master(model)
    assert isinstance(held, WeightMaster) and torch.equal(held.full, weight)
    spec = held.fitted.spec()
    losses = train(model, regime, 40, rate=0.02)
    assert losses[-1] < 0.8 * losses[0]
    x = torch.randn(6, 8)
    expected = model(x)
    moved = regime.finish_()
    assert math.isnan(moved["0"])
    assert master(model).spec() == spec and all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(x), expected)


def test_weight_reading_goes_on_from_factors() -> None:
    model = dense()
    recipe = rankfold.Recipe("x", SVD(), rankfold.Frobenius(), rankfold.allocate.uniform)
    rankfold.factorize_(model, recipe, budget=0.7, targets=["0"])
    product = master(model).to_dense().detach()
    regime = StraightThrough(SVD(), reading="weight", freeze=0)
    regime.start_(model)
    torch.testing.assert_close(master(model).full.detach(), product)
    regime.finish_()
    weight = torch.randn(32, 8)
    regime.start_(model, weights={"0": weight})
    assert torch.equal(master(model).full, weight)
    train(model, regime, 2)
    regime.finish_()
    assert isinstance(master(model), rankfold.LowRank)


def test_what_stays_dense_trains_as_before(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    recipe = rankfold.Recipe("x", METHOD, rankfold.Frobenius(), rankfold.allocate.uniform)
    rankfold.factorize_(model, recipe, budget=0.5)
    kept = {n: p for n, p in model.named_parameters() if ".weight." not in n}
    model.model.layers[0].requires_grad_(False)
    StraightThrough(freeze=0).start_(model)
    after = dict(model.named_parameters())
    assert kept and all(after[name] is parameter for name, parameter in kept.items())
    assert not any(p.requires_grad for p in model.model.layers[0].parameters())
    assert after["model.layers.1.mlp.up_proj.weight.codes"].requires_grad


def test_a_dictionary_of_two_layers_is_scaled_once() -> None:
    first = code()
    second = SparseCode.of(first.dictionary, torch.randn(12, 2, 2), first.index())
    model = nn.ModuleDict({"a": nn.Linear(8, 12), "b": nn.Linear(8, 12), "c": nn.Linear(8, 12)})
    for name, structure in (("a", first), ("b", second), ("c", first)):
        model[name] = rankfold.Layer(model[name]).wrap(structure)
    before = {name: host.weight.to_dense().detach() for name, host in hosts(model).items()}
    regime = StraightThrough(freeze=0)
    regime.start_(model)
    held = {name: host.weight for name, host in hosts(model).items()}
    assert held["a"] is held["c"] and held["a"].dictionary is held["b"].dictionary
    for name, weight in before.items():
        torch.testing.assert_close(held[name].to_dense().detach(), weight)
    regime.finish_()
    assert model["a"].weight is model["c"].weight
    assert model["a"].weight.dictionary is model["b"].weight.dictionary


# With the Trainer of transformers

DATA = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(4, 128, (8, 16), generator=torch.Generator().manual_seed(1))
]


def trainer(model: Any, out: Path, regime: StraightThrough, finish: bool = True, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
        "dataloader_pin_memory": False,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**(defaults | options)),
        train_dataset=DATA,  # type: ignore[arg-type]
        callbacks=[RegimeCallback(regime, finish)],
    )


@pytest.fixture
def folder(tiny_llama: Callable[..., Any], tmp_path: Path) -> Path:
    model = tiny_llama()
    recipe = rankfold.Recipe("codes", METHOD, rankfold.Frobenius(), rankfold.allocate.uniform)
    rankfold.factorize_(model, recipe, budget=0.5)
    return rankfold.save(model, tmp_path / "model")


def test_trainer_trains_and_exports(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    specs = {name: host.weight.spec() for name, host in hosts(model).items()}
    regime = StraightThrough(freeze=0.4, decay=1e-4)
    regime.start_(model)
    run = trainer(model, tmp_path / "run", regime)
    assert math.isfinite(run.train().training_loss)
    moved = next(c.facts for c in run.callback_handler.callbacks if isinstance(c, RegimeCallback))
    assert moved.keys() == specs.keys() and max(moved.values()) > 0
    assert {name: host.weight.spec() for name, host in hosts(model).items()} == specs
    run.save_model(str(tmp_path / "trained"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained").eval()
    ids = DATA[0]["input_ids"][None]
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    rankfold.save(model, tmp_path / "saved")
    rankfold.verify(model, tmp_path / "saved", {"input_ids": ids})


@pytest.mark.parametrize("reading", ["coefficient", "weight"])
def test_training_resumes_where_it_stopped(reading: str, folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"reading": reading, "freeze": 0.25, "method": METHOD}

    def started() -> tuple[Any, StraightThrough]:
        model, regime = AutoModelForCausalLM.from_pretrained(folder), StraightThrough(**options)
        regime.start_(model)
        return model, regime

    whole, regime = started()
    trainer(whole, tmp_path / "whole", regime, max_steps=4).train()
    first, regime = started()
    run = trainer(
        first, tmp_path / "run", regime, finish=False, max_steps=4, save_strategy="steps", save_steps=2
    )
    run.train()
    second, regime = started()
    trainer(second, tmp_path / "run", regime, max_steps=4).train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2")
    )
    mine, theirs = whole.state_dict(), second.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_an_unfinished_model_is_no_final_checkpoint(folder: Path, tmp_path: Path) -> None:
    """rankfold.save refuses it; what a Trainer saved opens as a model in training, and can be finished."""
    model, regime = AutoModelForCausalLM.from_pretrained(folder), StraightThrough(freeze=0)
    regime.start_(model)
    run = trainer(model, tmp_path / "run", regime, finish=False)
    run.train()
    with pytest.raises(ValueError, match=r"still in training.*finish_\(\)"):
        rankfold.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run.save_model(str(tmp_path / "unfinished"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "unfinished").eval()
    assert all(isinstance(host.weight, CodeMaster) for host in hosts(again).values())
    ids = DATA[0]["input_ids"][None]
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)
    with pytest.raises(ValueError, match="still in training"):
        rankfold.save(again, tmp_path / "out")
    other = StraightThrough(freeze=0)
    other.start_(again)
    assert other.finish_() == regime.finish_()
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    rankfold.save(again, tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_plain_module_in_training_is_not_saved(tmp_path: Path) -> None:
    model = coded()
    StraightThrough().start_(model)
    with pytest.raises(ValueError, match=r"code_master of shape \(12, 8\)"):
        rankfold.save(model, tmp_path / "out")


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reading": "mask"}, "reading='mask'.*coefficient"),
        ({"freeze": 1.5}, "freeze=1.5.*from 0 to 1"),
        ({"freeze": -0.1}, "freeze=-0.1"),
        ({"freeze": float("nan")}, "freeze=nan"),
        ({"freeze": True}, "freeze=True"),
        ({"ramp": 2}, "ramp=2"),
        ({"ramp": 0.9}, "ramp=0.9, freeze=0.15.*at most 1"),
        ({"decay": -1}, "decay=-1"),
        ({"decay": float("inf")}, "decay=inf"),
        ({"refit": 0}, "refit=0"),
        ({"reading": "weight"}, "needs a method"),
        ({"reading": "weight", "method": SVD(), "ramp": 0.1}, "a ramp is for the coefficient reading"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StraightThrough(**options)


def test_nothing_to_train() -> None:
    with pytest.raises(ValueError, match=r"no factorized layer.*budget"):
        StraightThrough().start_(dense())
    with pytest.raises(ValueError, match="needs StraightThrough"):
        StraightThrough().start_(dense(), budget=0.5)


def test_layers_that_cannot_train_so() -> None:
    model = dense()
    recipe = rankfold.Recipe("x", SVD(), rankfold.Frobenius(), rankfold.allocate.uniform)
    rankfold.factorize_(model, recipe, budget=0.7, targets=["0"])
    with pytest.raises(ValueError, match=r"layer '0' is of kind 'low_rank'.*reading='weight'"):
        StraightThrough().start_(model)
    with pytest.raises(ValueError, match=r"layer '0'.*not among the sizes"):
        StraightThrough(Dictionary(width=8), reading="weight").start_(model)
    assert isinstance(master(model), rankfold.LowRank)
    for bad in (torch.zeros(8, 12), torch.full((12, 8), math.nan)):
        with pytest.raises(ValueError, match=r"layer '0': the dense weight must be finite.*\(12, 8\)"):
            StraightThrough().start_(coded(), weights={"0": bad})
    packed = coded()
    packed[0].weight = packed[0].weight.with_storage("int8")
    with pytest.raises(ValueError, match=r"layer '0' stores its values as 'int8'.*storage='float'"):
        StraightThrough().start_(packed)
    with pytest.raises(ValueError, match=r"layer '0' is torch.bfloat16.*float32"):
        StraightThrough().start_(coded().to(torch.bfloat16))
    half = coded()
    StraightThrough(freeze=0).start_(half)
    with pytest.raises(ValueError, match="other reading"):
        StraightThrough(METHOD, reading="weight").start_(half)


def test_verbs_out_of_turn() -> None:
    regime = StraightThrough(freeze=0)
    for verb in (regime.before_step, regime.after_step, regime.penalty, regime.finish_, regime.moved):
        with pytest.raises(ValueError, match="not in training"):
            verb()
    model = coded()
    regime.start_(model)
    train(model, regime, 1)
    regime.finish_()
    with pytest.raises(ValueError, match=r"finished.*start_\(model\)"):
        regime.after_step()
    unknown = StraightThrough(freeze=0.2)
    unknown.start_(model)
    with pytest.raises(ValueError, match=r"freeze=0.2.*start_\(model, steps"):
        unknown.before_step()
    with pytest.raises(ValueError, match="steps=0"):
        unknown.schedule(0)
