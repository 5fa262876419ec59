"""Adapters and quantizers of others on a factorized model: its factors are ordinary `nn.Linear` modules, so
whatever looks for those finds them; whatever asks for the layer above them is refused, and not wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import rankfold
from rankfold import hosts

peft = pytest.importorskip("peft")

IDS = torch.arange(24).view(2, 12)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture
def folder(tiny_llama: Callable[..., Any], tmp_path: Path) -> Path:
    model = tiny_llama()
    rankfold.factorize_(model, rankfold.recipes.svd, budget=0.6)
    return rankfold.save(model, tmp_path / "model")


def train(model: nn.Module) -> None:
    """Two steps. The first one gives LoRA's `B`, which is zero, a gradient, and the second one its `A`."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(IDS, labels=IDS).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("targets", ["all-linear", ["left", "right"]], ids=str)
@pytest.mark.parametrize("reloaded", [True, False], ids=["reloaded", "just factorized"])
def test_lora_trains_saves_loads_and_merges(
    reloaded: bool, targets: Any, folder: Path, tmp_path: Path, tiny_llama: Callable[..., Any]
) -> None:
    if reloaded:
        base = AutoModelForCausalLM.from_pretrained(folder)
    else:
        base = tiny_llama()
        rankfold.factorize_(base, rankfold.recipes.svd, budget=0.6)
    start = logits(base)
    config = peft.LoraConfig(target_modules=targets, r=2, lora_alpha=4, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    assert torch.equal(logits(model), start)
    adapted = [name for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert len(adapted) == 28  # two for each of the fourteen layers, and not the head

    train(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert "lora_" in name and parameter.grad is not None and parameter.grad.abs().max() > 0, name
    trained = logits(model)
    assert (trained - start).abs().max() > 1e-3

    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert torch.equal(logits(again), trained)
    with again.disable_adapter():
        assert torch.equal(logits(again), start)

    merged = again.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), trained, atol=1e-5, rtol=1e-4)
    assert len(hosts.hosts(merged)) == 14, "folded into the factors: it is as small as before"
    rankfold.save(merged, tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged))
    sizes = [(p / "model.safetensors").stat().st_size for p in (folder, tmp_path / "merged")]
    assert sizes[0] == sizes[1]


def test_an_adapter_folder_opens_by_itself(folder: Path, tmp_path: Path) -> None:
    """Its config names the base folder, so transformers and PEFT find both."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = peft.get_peft_model(
        base, peft.LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM")
    )
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    for opened in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
    ):
        assert torch.equal(logits(opened), logits(model))


def test_lora_on_the_layer_itself_is_refused(folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"Target module Linear\((.|\n)* is not supported"):
        peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))


def test_lora_on_convolutions_of_gpt2(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 96, "n_positions": 64}
    base = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    rankfold.factorize_(base, rankfold.recipes.svd, budget=0.7)
    model = peft.get_peft_model(
        base, peft.LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM")
    )
    start = logits(model)
    train(model)
    trained = logits(model)
    assert not torch.equal(trained, start)
    torch.testing.assert_close(logits(model.merge_and_unload()), trained, atol=1e-5, rtol=1e-4)


def test_adapted_layers_share_the_frozen_factors(folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder)
    before = copy.deepcopy(base.state_dict())
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear", r=2))
    train(model)
    after = {
        key.replace(".base_layer", ""): value for key, value in model.base_model.model.state_dict().items()
    }
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_int8_factors(folder: Path) -> None:
    """torchao quantizes the factors in place: 8 bits on top of a low rank."""
    quantization = pytest.importorskip(
        "torchao.quantization",
        reason="torchao is not among the development requirements: its wheel is built for CUDA",
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = logits(model)
    quantization.quantize_(
        model, quantization.Int8WeightOnlyConfig(), lambda m, name: name.endswith((".left", ".right"))
    )
    left = model.model.layers[0].mlp.up_proj.weight.left.weight
    assert type(left.data).__name__ == "Int8Tensor" or "Quantized" in type(left.data).__name__
    found = logits(model)
    assert 0 < (found - expected).norm() / expected.norm() < 0.03


def test_lora_on_the_dictionaries_of_sparse_codes(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_llama()
    rankfold.factorize_(model, rankfold.recipes.rocket, budget=0.7, batches=IDS + 4)
    before = logits(model)
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["weight.dictionary"])
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    assert torch.equal(logits(adapted), before)
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * len(hosts.hosts(model))
    train(adapted)
    after = logits(adapted)
    assert not torch.allclose(after, before)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), after)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), after, rtol=1e-3, atol=1e-4)
    rankfold.save(merged, tmp_path / "merged")
    rankfold.verify(merged, tmp_path / "merged", IDS)
