"""LoRA, DoRA and PiSSA of PEFT on a model that rankfold compressed: on its factors, which are `nn.Linear`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_adapters import logits, train

import rankfold
from rankfold import recipes
from rankfold.factorize import factorize_
from rankfold.hosts import hosts
from rankfold.lora_load import load_lora_

peft = pytest.importorskip("peft")

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}


@pytest.fixture
def small(tiny_llama: Callable[..., Any]) -> Any:
    model = tiny_llama()
    factorize_(model, recipes.svd, budget=0.7)
    return model


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_trains_saves_loads_and_merges(variant: str, small: Any, tmp_path: Path) -> None:
    start, plain = logits(small), copy.deepcopy(small)
    sizes = {name: host.weight.spec() for name, host in hosts(small).items()}
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", **VARIANTS[variant])
    model = peft.get_peft_model(small, config)
    if variant in ("pissa", "dora"):  # the one splits the factors anew, the other divides by their norms
        torch.testing.assert_close(logits(model), start, atol=1e-5, rtol=1e-4)
    else:
        assert torch.equal(logits(model), start)
    train(model)
    trained = logits(model)
    assert (trained - start).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), trained, atol=1e-5, rtol=1e-4)

    merged = again.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), trained, atol=1e-5, rtol=1e-4)
    assert {name: host.weight.spec() for name, host in hosts(merged).items()} == sizes, "of the old size"
    rankfold.save(merged, tmp_path / "merged")
    rankfold.verify(merged, tmp_path / "merged")


def test_a_pissa_adapter_becomes_a_lora_of_the_base_as_it_was(small: Any, tmp_path: Path) -> None:
    plain = copy.deepcopy(small)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules="all-linear", init_lora_weights="pissa")
    model = peft.get_peft_model(small, config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    train(model)
    trained = logits(model)
    model.save_pretrained(tmp_path / "end")
    with pytest.raises(ValueError, match="init_lora_weights='pissa' changed the base as well"):
        load_lora_(copy.deepcopy(plain), tmp_path / "end")
    start = str(tmp_path / "start")
    with pytest.warns(UserWarning, match="PiSSA changes the base weights"):
        model.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=start)
    opened = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "lora")
    assert opened.peft_config["default"].r == 4
    torch.testing.assert_close(logits(opened), trained, atol=1e-5, rtol=1e-4)


def test_what_is_refused_and_how_it_is_said(small: Any, tmp_path: Path) -> None:
    for options in ({}, {"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(ValueError, match=r"Linear(.|\n)* is not supported"):
            peft.get_peft_model(copy.deepcopy(small), peft.LoraConfig(target_modules=["q_proj"], **options))
    model = peft.get_peft_model(copy.deepcopy(small), peft.LoraConfig(target_modules=["left"], use_dora=True))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_dora=True is more than"):
        load_lora_(small, tmp_path)
    with pytest.raises(ValueError, match="has adapters on it"):
        rankfold.save(model, tmp_path / "x")
