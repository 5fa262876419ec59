"""WaRA through PEFT: what PEFT asks of a tuner, on a causal language model."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_adapters import logits, stir_, train
from transformers import AutoModelForCausalLM

from rankfold.lora import save_as_lora

peft = pytest.importorskip("peft")

from rankfold.peft import WaraConfig, as_rankfold, check_version, register  # noqa: E402
from rankfold.peft_layer import WaraLayer  # noqa: E402

VARIANTS = {
    "haar": {},
    "two levels of db2": {"wavelet": "db2", "levels": 2, "r": 2},
    "sym4": {"wavelet": "sym4"},
    "feature": {"domain": "feature"},
    "energy": {"bands": "energy"},
    "one band": {"bands": {"LL1": 6}},
}


def config(**options: Any) -> WaraConfig:
    return WaraConfig(
        **(
            {"r": 3, "wara_alpha": 6, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
            | options
        )
    )


@pytest.fixture
def base(tiny_llama: Callable[..., Any]) -> Any:
    return tiny_llama()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_life_of_an_adapter(variant: str, base: Any, tmp_path: Path) -> None:
    """Unchanged at the start, trains, saves, loads, merges, unmerges, disables, unloads."""
    start = logits(base)
    plain = copy.deepcopy(base)
    model = peft.get_peft_model(base, config(**VARIANTS[variant]))
    assert torch.equal(logits(model), start)
    layers = [m for m in model.modules() if isinstance(m, WaraLayer)]
    assert len(layers) == 4

    train(model)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("wara_" in name), name
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    trained = logits(model)
    assert (trained - start).abs().max() > 1e-3

    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert torch.equal(logits(again), trained)
    low = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(low), trained)
    with again.disable_adapter():
        assert torch.equal(logits(again), start)
    assert torch.equal(logits(again), trained)

    again.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(again), trained, atol=1e-5, rtol=1e-4)
    again.unmerge_adapter()
    torch.testing.assert_close(logits(again), trained, atol=1e-6, rtol=1e-5)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, atol=1e-5, rtol=1e-4)
    assert type(merged) is type(plain) and set(merged.state_dict()) == set(plain.state_dict())
    assert torch.equal(logits(model.unload()), start)


def test_disabling_while_merged_unmerges(base: Any) -> None:
    start = logits(base)
    model = stir_(peft.get_peft_model(base, config()))
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), start, atol=1e-6, rtol=1e-5)


def test_merging_twice_warns_and_changes_nothing(base: Any) -> None:
    model = stir_(peft.get_peft_model(base, config()))
    model.merge_adapter()
    once = logits(model)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert torch.equal(logits(model), once)


def test_several_adapters(base: Any, tmp_path: Path) -> None:
    start = logits(base)
    plain = copy.deepcopy(base)
    model = stir_(peft.get_peft_model(base, config()))
    one = logits(model)
    model.add_adapter("two", config(r=2, wavelet="db2", target_modules=["up_proj", "o_proj"]))
    assert torch.equal(logits(model), one)
    model.set_adapter("two")
    assert torch.equal(logits(model), start)
    assert {n.split(".")[-5] for n, p in model.named_parameters() if p.requires_grad} == {"two"}
    stir_(model)
    two = logits(model)
    model.base_model.set_adapter(["default", "two"])
    both = logits(model)
    assert not torch.allclose(both, one) and not torch.allclose(both, two)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), both, atol=1e-5, rtol=1e-4)

    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    again.load_adapter(tmp_path / "two", adapter_name="other name")
    assert torch.equal(logits(again), one)
    again.set_adapter("other name")
    assert torch.equal(logits(again), two)
    with pytest.raises(ValueError, match="cannot be combined into one"):
        again.add_weighted_adapter(["default", "other name"], [0.5, 0.5], "mixed")
    again.set_adapter("default")
    again.delete_adapter("other name")
    assert torch.equal(logits(again), one)


def test_an_adapter_folder_opens_by_itself(base: Any, tmp_path: Path) -> None:
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = stir_(peft.get_peft_model(base, config()))
    model.save_pretrained(tmp_path / "adapter")
    for opened in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
    ):
        assert torch.equal(logits(opened), logits(model))


def test_training_goes_on_after_a_load(base: Any, tmp_path: Path) -> None:
    plain = copy.deepcopy(base)
    model = peft.get_peft_model(base, config())
    train(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(plain, tmp_path, is_trainable=True)
    train(model)
    train(again)
    torch.testing.assert_close(logits(again), logits(model))


def test_transformers_own_way_to_add_an_adapter(base: Any, tmp_path: Path) -> None:
    start, plain = logits(base), copy.deepcopy(base)
    base.add_adapter(config(), adapter_name="mine")
    assert torch.equal(logits(base), start)
    stir_(base)
    base.save_pretrained(tmp_path)
    plain.load_adapter(str(tmp_path))
    assert torch.equal(logits(plain), logits(base))


def test_all_linear_and_modules_to_save(base: Any, tmp_path: Path) -> None:
    plain = copy.deepcopy(base)
    model = peft.get_peft_model(base, config(target_modules="all-linear", modules_to_save=["norm"]))
    assert sum(isinstance(m, WaraLayer) for m in model.modules()) == 14
    train(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(plain, tmp_path)), logits(model))


def test_targets_are_lora_s_where_none_are_named(base: Any) -> None:
    model = peft.get_peft_model(base, config(target_modules=None))
    names = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, WaraLayer)}
    assert names == {"q_proj", "v_proj"}


def test_equal_layers_start_from_different_draws_and_a_seed_repeats_them(base: Any) -> None:
    def factors(seed: int) -> list[torch.Tensor]:
        model = peft.get_peft_model(copy.deepcopy(base), config(seed=seed))
        return [p for n, p in model.named_parameters() if "q_proj" in n and "LL1.right" in n]

    one, two = factors(0)
    assert not torch.equal(one, two)
    assert torch.equal(one, factors(0)[0]) and not torch.equal(one, factors(1)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_base_keeps_its_adapter_in_float32(dtype: torch.dtype, base: Any, tmp_path: Path) -> None:
    base = base.to(dtype)
    start, plain = logits(base), copy.deepcopy(base)
    model = peft.get_peft_model(base, config())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(logits(model), start) and start.dtype == dtype
    stir_(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    exact = layer.base_layer.weight.float() + layer.get_delta_weight("default")
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(plain, tmp_path)
    assert torch.equal(logits(again), logits(model))
    merged = model.merge_and_unload()
    assert torch.equal(merged.model.layers[0].self_attn.q_proj.weight, exact.to(dtype))  # cast once


def test_autocast_changes_neither_merge_nor_the_adapter_s_precision(base: Any) -> None:
    model = stir_(peft.get_peft_model(base, config()))
    other = copy.deepcopy(model)
    layer, twin = (m.base_model.model.model.layers[0].self_attn.q_proj for m in (model, other))
    x = torch.randn(5, 64)
    outside = layer._change("default", x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer._change("default", x), outside) and outside.dtype == torch.float32
        assert layer(x).dtype == torch.bfloat16
        other.merge_adapter()
    model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, twin.base_layer.weight)


def test_safe_merge_refuses_what_is_not_finite(base: Any) -> None:
    model = stir_(peft.get_peft_model(base, config()))
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        next(layer.wara_delta.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)


@pytest.mark.slow  # imports everything anew
def test_loads_in_a_fresh_process_that_registers(base: Any, tmp_path: Path) -> None:
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config())
    model.save_pretrained(tmp_path / "adapter")
    code = f"""
import peft, rankfold.peft
rankfold.peft.register()
rankfold.peft.register()
model = peft.AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / "adapter")!r})
print(type(model.base_model).__name__)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.stdout.strip() == "WaraModel", run.stderr


def test_as_rankfold_and_back_to_a_plain_module(base: Any) -> None:
    model = stir_(peft.get_peft_model(base, config()))
    model.add_adapter("other", config())
    trained = logits(model)
    with pytest.raises(ValueError, match="has adapters of PEFT: use its save_pretrained"):
        save_as_lora(model, "x")
    with pytest.raises(ValueError, match=r"no WaRA adapter 'third'; the model has 'default', 'other'"):
        as_rankfold(model, "third")
    inner = as_rankfold(model)
    torch.testing.assert_close(logits(inner), trained, atol=1e-6, rtol=1e-5)
    assert sum(p.requires_grad for p in inner.parameters()) == 4 * 8
    assert not any(isinstance(m, WaraLayer) for m in inner.modules())


def test_registering_twice_is_nothing_and_other_versions_are_refused(monkeypatch: Any) -> None:
    register()
    register()
    assert peft.PeftType("WARA") is peft.PeftType.WARA and list(peft.PeftType).count("WARA") == 1
    for version in ("0.20.0", "0.22.0", "1.0.0", "0.22.0.dev0"):
        with pytest.raises(ImportError, match=rf"from 0\.21 to below 0\.22; installed is {version}"):
            check_version(version)
        monkeypatch.setattr(peft, "__version__", version)
        with pytest.raises(ImportError, match=r"Install 'peft>=0\.21,<0\.22'"):
            register()


def test_wrong_options_are_named(base: Any) -> None:
    for options, words in (
        ({"wavelet": "db1x"}, "Unknown wavelet 'db1x'. Did you mean 'db1'"),
        ({"wavelet": "bior2.2"}, "biorthogonal"),
        ({"r": 0}, "rank=0"),
        ({"domain": "tokens"}, "grid of tokens"),
        ({"bands": "most"}, "bands='most'"),
        ({"wara_format": 2}, "newer rankfold: its format is version 2, this one reads up to 1"),
        ({"target_modules": ".*", "layers_to_transform": [0]}, "layers_to_transform"),
    ):
        with pytest.raises(ValueError) as error:
            config(**options)
        assert words in str(error.value)
    for options, words in (
        ({"r": 40}, "layer 'model.layers.0.self_attn.q_proj': rank 40 does not fit band"),
        ({"levels": 9}, "levels=9 is too deep"),
        ({"target_modules": ["q_porj"]}, "Target modules {'q_porj'} not found in the base model"),
        ({"target_modules": ["norm"]}, "layer 'model.norm': WaRA cannot adapt LlamaRMSNorm"),
    ):
        with pytest.raises(ValueError) as error:
            peft.get_peft_model(copy.deepcopy(base), config(**options))
        assert words in str(error.value)
