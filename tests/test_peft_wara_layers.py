"""WaRA through PEFT on every kind of layer, files with something wrong in them, and what servers take."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from toy_adapters import IDS, conv1d_model, convolutions, images, logits, stir_, train

from rankfold import recipes
from rankfold.adapter_file import load_adapter_, save_adapter
from rankfold.adapters import merge_
from rankfold.factorize import factorize_
from rankfold.lora import save_as_lora

peft = pytest.importorskip("peft")

from rankfold.peft import WaraConfig, as_rankfold  # noqa: E402
from rankfold.peft_layer import WaraLayer  # noqa: E402


def test_conv1d_holds_its_weight_transposed(tmp_path: Path) -> None:
    base = conv1d_model()
    start, plain = logits(base), copy.deepcopy(base)
    config = WaraConfig(r=3, wavelet="sym4", target_modules=["c_attn", "c_fc"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    assert torch.equal(logits(model), start)
    train(model)
    trained = logits(model)
    layers = [m for m in model.modules() if isinstance(m, WaraLayer)]
    assert all(layer.fan_in_fan_out for layer in layers)
    assert layers[0].get_delta_weight("default").shape == layers[0].base_layer.weight.shape == (30, 90)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(plain, tmp_path)
    assert torch.equal(logits(again), trained)
    again.merge_adapter()
    torch.testing.assert_close(logits(again), trained, atol=1e-5, rtol=1e-4)
    again.unmerge_adapter()
    torch.testing.assert_close(logits(again), trained, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("domain", ["weight", "feature"])
def test_convolutions_of_odd_sizes(domain: str, tmp_path: Path) -> None:
    base = convolutions()
    x, plain = images(), copy.deepcopy(base)
    start = base(x)
    model = peft.get_peft_model(base, WaraConfig(r=2, domain=domain, target_modules=["0", "3", "5"])).eval()
    assert torch.equal(model(x), start)
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    stir_(model.eval())
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    changed = again(x)
    assert not torch.allclose(changed, start)
    torch.testing.assert_close(changed, again.merge_and_unload()(x), atol=1e-5, rtol=1e-4)


def test_embeddings() -> None:
    base = nn.Sequential(nn.Embedding(41, 13), nn.Linear(13, 6))
    start = base(IDS)
    model = peft.get_peft_model(base, WaraConfig(r=2, target_modules=["0"]))
    assert torch.equal(model(IDS), start)
    stir_(model)
    changed = model(IDS)
    assert not torch.allclose(changed, start)
    torch.testing.assert_close(model.merge_and_unload()(IDS), changed, atol=1e-6, rtol=1e-5)


def test_a_plain_module_of_torch(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5))
    x = torch.randn(3, 7)
    plain, start = copy.deepcopy(net), net(x)
    model = peft.get_peft_model(net, WaraConfig(r=2, target_modules=["0"]))
    assert torch.equal(model(x), start)
    stir_(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(peft.PeftModel.from_pretrained(plain, tmp_path)(x), model(x))


@pytest.mark.slow  # two runs of the Trainer
def test_the_trainer_goes_on_where_it_stopped(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    base = tiny_llama()
    config = WaraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(8, 1)]
    options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.05}
    args = TrainingArguments(str(tmp_path), **options, report_to=[], use_cpu=True, disable_tqdm=True)
    found = []
    for start in (None, str(tmp_path / "checkpoint-2")):
        model = peft.get_peft_model(copy.deepcopy(base), config)
        Trainer(model, args, train_dataset=rows).train(resume_from_checkpoint=start)
        found.append(logits(model))
    assert not torch.allclose(found[0], logits(base))
    torch.testing.assert_close(*found)


def test_layers_that_cannot_be_adapted_are_named(tiny_llama: Callable[..., Any]) -> None:
    grouped = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"layer '0': WaRA cannot adapt Conv2d: grouped .*\(2 groups\)"):
        peft.get_peft_model(grouped, WaraConfig(r=1, target_modules=["0"]))
    small = tiny_llama()
    factorize_(small, recipes.svd, budget=0.7)
    with pytest.raises(ValueError, match=r"q_proj': it is factorized: put adapters on its factors"):
        peft.get_peft_model(small, WaraConfig(r=1, target_modules=["q_proj"]))
    tied = tiny_llama(tie_word_embeddings=True)
    with (
        pytest.warns(UserWarning, match="tie_word_embeddings"),
        pytest.raises(ValueError, match=r"'model\.embed_tokens': it shares its weight with 'lm_head'"),
    ):
        peft.get_peft_model(tied, WaraConfig(r=1, target_modules=["embed_tokens"]))


def test_on_the_factors_of_a_compressed_model(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    small = tiny_llama()
    factorize_(small, recipes.svd, budget=0.7)
    start, plain = logits(small), copy.deepcopy(small)
    model = peft.get_peft_model(small, WaraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert torch.equal(logits(model), start)
    train(model)
    trained = logits(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(plain, tmp_path)
    assert torch.equal(logits(again), trained)
    torch.testing.assert_close(logits(again.merge_and_unload()), trained, atol=1e-5, rtol=1e-4)


def test_from_peft_to_servers_and_to_our_files(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    base = tiny_llama()
    config = WaraConfig(r=3, wara_alpha=5, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(base), config)
    train(model)
    trained = logits(model)
    peft.save_as_lora(tmp_path / "theirs", model, rank=12)  # PEFT's own way: an SVD of ΔW
    ours = as_rankfold(model)
    torch.testing.assert_close(logits(ours), trained, atol=1e-6, rtol=1e-5)
    save_as_lora(ours, tmp_path / "ours")
    for folder in ("theirs", "ours"):
        opened = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder)
        torch.testing.assert_close(logits(opened), trained, atol=1e-5, rtol=1e-5)
        assert opened.peft_config["default"].r == 12
    again = load_adapter_(copy.deepcopy(base), save_adapter(ours, tmp_path / "adapter"))
    torch.testing.assert_close(logits(again), trained, atol=1e-6, rtol=1e-5)
    merge_(again)
    torch.testing.assert_close(logits(again), trained, atol=1e-5, rtol=1e-4)


def test_a_module_saved_beside_stays_so(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    base = tiny_llama()
    config = WaraConfig(r=2, target_modules=["q_proj"], modules_to_save=["model.norm"])
    model = peft.get_peft_model(copy.deepcopy(base), config)
    train(model)
    ours = as_rankfold(model)
    folder = save_adapter(ours, tmp_path / "adapter")
    assert json.loads((folder / "rankfold_adapter.json").read_text())["kept"] == ["model.norm.weight"]
    assert torch.equal(logits(load_adapter_(copy.deepcopy(base), folder)), logits(ours))
    save_as_lora(ours, tmp_path / "lora")
    opened = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    torch.testing.assert_close(logits(opened), logits(ours), atol=1e-5, rtol=1e-5)


def test_ranks_by_energy_are_written_down(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    """They come from the base's weights, and must be the same where those are not quite: after a merge."""
    base = tiny_llama()
    model = peft.get_peft_model(
        copy.deepcopy(base), WaraConfig(r=2, bands="energy", target_modules=["q_proj"])
    )
    ranks = model.peft_config["default"].band_ranks
    assert set(ranks) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["band_ranks"] == ranks
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight.normal_()
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    assert again.peft_config["default"].band_ranks == ranks


@pytest.fixture
def good(tmp_path: Path) -> tuple[nn.Module, Path]:
    base = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 6))
    model = peft.get_peft_model(copy.deepcopy(base), WaraConfig(r=2, target_modules=["0"]))
    stir_(model).save_pretrained(tmp_path / "good")
    return base, tmp_path / "good"


def test_damaged_files_are_refused(good: tuple[nn.Module, Path]) -> None:
    """PEFT itself would warn of a missing tensor, and go on with a zero one."""
    base, folder = good
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.0.wara_delta.bands.LH1.left.weight"
    for change, words in (
        ({key: None}, "and the file lacks it"),
        ({key: torch.ones(6, 3)}, r"is (6, 2), and the file has (6, 3)"),
        ({key.replace(".0.", ".1."): torch.ones(6, 2)}, "tensors of layers that it does not name"),
    ):
        changed: dict[str, Any] = tensors | change
        save_file({k: t for k, t in changed.items() if t is not None}, file)
        with pytest.raises(ValueError) as error:
            peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
        assert words in str(error.value)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="rank 2 does not fit band LL1"):
        peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 6)), folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"wara_format": 2}, "written by a newer rankfold"),
        ({"target_modules": ["7"]}, "Target modules {'7'} not found"),
        ({"wavelet": "db99"}, "Unknown wavelet 'db99'"),
        ({"bands": {"XX1": 2}}, "have the bands LL1"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_edited_configs_are_refused(change: dict[str, Any], words: str, good: tuple[nn.Module, Path]) -> None:
    base, folder = good
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError) as error:
        peft.PeftModel.from_pretrained(base, folder)
    assert words in str(error.value)
