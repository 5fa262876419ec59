"""Adapters as LoRA folders of PEFT, opened by PEFT itself on the plain base; and LoRA folders as adapters."""

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

import rankfold
from rankfold import recipes
from rankfold.adapters import freeze_, merge_
from rankfold.factorize import factorize_
from rankfold.hosts import hosts
from rankfold.lora import save_as_lora
from rankfold.lora_load import load_lora_
from rankfold.low_rank_form import factors_of, thin, truncated
from rankfold.structures import Dense, LowRank, Sum

peft = pytest.importorskip("peft")

METHODS = {
    "lora": recipes.lora(rank=3, alpha=6),
    "wara": recipes.wara(rank=2, alpha=3),
    "db2, two levels": recipes.wara(rank=2, alpha=5, wavelet="db2", levels=2),
    "adaptive": recipes.wara_adaptive(rank=2),
    "feature": recipes.wara_feature(rank=3),
}


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_peft_reproduces_the_outputs_on_the_plain_base(
    method: str, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    base = tiny_llama()
    model = copy.deepcopy(base)
    factorize_(model, METHODS[method], targets=["*.q_proj", "*.mlp.*"])
    stir_(model)
    expected = logits(model)
    assert (expected - logits(base)).abs().max() > 1e-2
    save_as_lora(model, tmp_path / "lora")
    opened = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    torch.testing.assert_close(logits(opened), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(opened.merge_and_unload()), expected, atol=1e-5, rtol=1e-5)
    ours = load_lora_(copy.deepcopy(base), tmp_path / "lora")
    torch.testing.assert_close(logits(ours), expected, atol=1e-5, rtol=1e-5)


def test_the_config_says_as_little_as_it_can(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_llama()
    factorize_(model, recipes.lora(rank=3, alpha=6), targets=["*.q_proj", "*.k_proj"])
    stir_(model)
    save_as_lora(model, tmp_path / "one", base="some/base")
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (3, 6, {})
    assert config["target_modules"] == ["k_proj", "q_proj"] and config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == "some/base"
    held = model.model.layers[0].self_attn.q_proj.weight.added[0]
    stored = load_file(tmp_path / "one" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    assert torch.equal(stored[key], held.left.weight), "the very numbers"

    model = tiny_llama()
    factorize_(model, recipes.wara(rank=3, alpha=6), targets=["*.0.*.q_proj", "*.mlp.up_proj"])
    save_as_lora(model, tmp_path / "two")
    config = json.loads((tmp_path / "two" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 12, "rank 4r, and scale 1 for whoever ignores patterns"
    assert config["target_modules"][-1] == "model.layers.1.mlp.up_proj"


def test_ranks_that_differ(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    base = tiny_llama()
    model = copy.deepcopy(base)
    factorize_(model, recipes.lora(rank=3, alpha=5), targets=["*.q_proj"])
    host = model.model.layers[1].self_attn.q_proj
    host.weight = Sum.of(host.weight.base, LowRank(host.weight.shape, rank=7, scale=0.3), frozen=True)
    stir_(model)
    save_as_lora(model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {"model.layers.0.self_attn.q_proj": 3}
    opened = peft.PeftModel.from_pretrained(base, tmp_path / "lora")
    torch.testing.assert_close(logits(opened), logits(model), atol=1e-5, rtol=1e-5)


def test_conv1d_and_a_head_of_its_own(tmp_path: Path) -> None:
    base = conv1d_model()
    model = copy.deepcopy(base)
    factorize_(model, recipes.wara(rank=2), targets=["*.c_attn", "*.c_fc"])
    freeze_(model, keep=["transformer.ln_f.*"])
    train(model)
    save_as_lora(model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] and config["modules_to_save"] == ["transformer.ln_f"]
    opened = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    torch.testing.assert_close(logits(opened), logits(model), atol=1e-5, rtol=1e-5)
    ours = load_lora_(copy.deepcopy(base), tmp_path / "lora")
    torch.testing.assert_close(logits(ours), logits(model), atol=1e-5, rtol=1e-5)
    assert ours.transformer.ln_f.weight.requires_grad


def test_convolutions_and_embeddings(tmp_path: Path) -> None:
    base = convolutions()
    model = copy.deepcopy(base)
    factorize_(model, recipes.wara(rank=2), targets=["*"])
    with pytest.raises(ValueError, match="convolves with padding_mode='zeros', the layer with 'reflect'"):
        save_as_lora(model, tmp_path / "lora")
    model = copy.deepcopy(base)
    factorize_(model, recipes.wara(rank=2), targets=["0", "5"])
    stir_(model)
    save_as_lora(model, tmp_path / "lora")
    opened = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    torch.testing.assert_close(opened(images()), model(images()), atol=1e-5, rtol=1e-5)
    ours = load_lora_(copy.deepcopy(base), tmp_path / "lora")
    torch.testing.assert_close(ours(images()), model(images()), atol=1e-5, rtol=1e-5)

    table = nn.Sequential(nn.Embedding(40, 12), nn.Linear(12, 6))
    model = copy.deepcopy(table)
    factorize_(model, recipes.lora(rank=2), targets=["*"])
    stir_(model)
    save_as_lora(model, tmp_path / "table")
    opened = peft.PeftModel.from_pretrained(copy.deepcopy(table), tmp_path / "table")
    torch.testing.assert_close(opened(IDS), model(IDS), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(load_lora_(table, tmp_path / "table")(IDS), model(IDS), atol=1e-6, rtol=1e-5)


def test_a_lora_of_peft_becomes_ours_and_goes_on_a_compressed_model(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    """Trained by PEFT on the dense one; merged into the factors of the small one, exactly or at its size."""
    base = tiny_llama()
    config = peft.LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "up_proj"], alpha_pattern={"up_proj": 6}
    )
    model = peft.get_peft_model(copy.deepcopy(base), config)
    train(model)
    model.save_pretrained(tmp_path)
    ours = load_lora_(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits(ours), logits(model), atol=1e-5, rtol=1e-5)
    assert logits(merge_(ours).model).shape == (2, 12, 128) and not hosts(ours)
    torch.testing.assert_close(logits(ours), logits(model), atol=1e-5, rtol=1e-4)

    small = copy.deepcopy(base)
    factorize_(small, recipes.svd, budget=0.7)
    before = {name: host.weight for name, host in hosts(small).items()}
    load_lora_(small, tmp_path)
    expected = logits(small)
    for size in ("exact", "same"):
        done = merge_(copy.deepcopy(small), size=size)
        adapted = [name for name in done.errors]
        assert len(adapted) == 4
        for name in adapted:
            rank = hosts(done.model)[name].weight.rank
            assert rank == before[name].rank + (4 if size == "exact" else 0)
        if size == "exact":
            assert max(done.errors.values()) < 1e-6
            torch.testing.assert_close(logits(done.model), expected, atol=1e-5, rtol=1e-4)
        else:
            assert 1e-4 < max(done.errors.values()) < 0.5
            assert all(host.weight.nbytes == before[n].nbytes for n, host in hosts(done.model).items())


def test_adapters_beside_factors_open_on_the_dense_form_of_the_base(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    base = tiny_llama()
    factorize_(base, recipes.svd, budget=0.7)
    model = copy.deepcopy(base)
    factorize_(model, recipes.wara(rank=2), targets=["*.q_proj"])
    stir_(model)
    save_as_lora(model, tmp_path / "lora")
    opened = peft.PeftModel.from_pretrained(rankfold.to_dense_(base), tmp_path / "lora")
    torch.testing.assert_close(logits(opened), logits(model), atol=1e-5, rtol=1e-5)


def test_what_a_lora_cannot_be_is_refused(tmp_path: Path) -> None:
    model = convolutions()
    with pytest.raises(ValueError, match="has no adapters"):
        save_as_lora(model, tmp_path / "x")
    factorize_(model, recipes.lora(rank=2), targets=["0"], conv="spatial")
    with pytest.raises(ValueError, match="layer '0': its kernel is read as a matrix in the spatial way"):
        save_as_lora(model, tmp_path / "x")
    model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 5))
    factorize_(model, recipes.lora(rank=2), targets=["0"])
    model[0].bias.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"'0\.bias' trains beside the adapters and is the bias of an adapted"
    ):
        save_as_lora(model, tmp_path / "x")
    freeze_(model)
    model[0].weight = Sum.of(Dense.of(torch.randn(7, 6)), Dense.of(torch.randn(7, 6)), frozen=True)
    with pytest.raises(ValueError, match="the base under its adapter trains"):
        save_as_lora(model, tmp_path / "x")
    model[0].weight.base.requires_grad_(False)
    with pytest.raises(ValueError, match=r"its adapter \(dense\) is no product of two thin matrices"):
        save_as_lora(model, tmp_path / "x")
    nested = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.ModuleDict({"a": nn.Linear(4, 4)})})
    factorize_(nested, recipes.lora(rank=1), targets=["a"])
    with pytest.raises(ValueError, match=r"PEFT cannot tell layer 'a' from 'b\.a'"):
        save_as_lora(nested, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_folders_that_are_no_lora_are_refused(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 5))
    model = copy.deepcopy(base)
    factorize_(model, recipes.lora(rank=2), targets=["0"])
    good = save_as_lora(model, tmp_path / "good")
    config, tensors = (
        json.loads((good / "adapter_config.json").read_text()),
        load_file(good / "adapter_model.safetensors"),
    )
    up, down = (f"base_model.model.0.lora_{part}.weight" for part in "BA")

    def refused(words: str, tensors: dict[str, Any] = tensors, **options: Any) -> None:
        folder = tmp_path / "bad"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(config | options))
        save_file(tensors, folder / "adapter_model.safetensors")
        fresh = copy.deepcopy(base)
        with pytest.raises(ValueError) as error:
            load_lora_(fresh, folder)
        assert words in str(error.value)
        assert type(fresh[0]) is nn.Linear and fresh[1].weight.requires_grad, "unchanged"

    refused("holds a VERA adapter", peft_type="VERA")
    refused("use_dora=True is more than", use_dora=True)
    refused("init_lora_weights='pissa_niter_4' changed the base", init_lora_weights="pissa_niter_4")
    refused("lora_alpha=nan", lora_alpha=float("nan"))
    refused("lora_alpha=None", lora_alpha=None)
    refused("it has ['lora_B.weight'] alone", {up: tensors[up]})
    refused("do not go together", {up: tensors[up], down: tensors[down][:1]})
    refused(
        "layer '0' has shape (7, 6), its adapter (7, 5)",
        {up: tensors[up], down: tensors[down][:, :5].clone()},
    )
    refused("not finite", {up: tensors[up] * float("nan"), down: tensors[down]})
    refused("more than ΔW", tensors | {"base_model.model.0.lora_magnitude_vector": torch.ones(7)})
    refused("lacks", {key.replace(".0.", ".9."): t for key, t in tensors.items()})
    refused(
        "'1.bias' is (3,) in the file and (5,) in the model",
        tensors | {"base_model.model.1.bias": torch.ones(3)},
    )
    refused("no tensors of a LoRA", {"base_model.model.1.bias": torch.ones(5)})
    (tmp_path / "bad" / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="cannot be read"):
        load_lora_(base, tmp_path / "bad")
    with pytest.raises(ValueError, match="it is no LoRA folder"):
        load_lora_(base, tmp_path)


def test_thin_forms_are_exact_and_truncation_is_the_best() -> None:
    one, two = (
        LowRank((9, 7), rank=3, scale=0.5, dtype=torch.float64),
        LowRank((9, 7), rank=6, dtype=torch.float64),
    )
    pair = factors_of(Sum.of(one, two))
    assert pair is not None and pair[0].shape == (9, 9)
    full = one.to_dense() + two.to_dense()
    torch.testing.assert_close(pair[0] @ pair[1], full)
    left, right = thin(*pair)
    assert left.shape[1] == 7
    torch.testing.assert_close(left @ right, full)
    left, right = truncated(*pair, 4)
    u, s, vh = torch.linalg.svd(full)
    torch.testing.assert_close(left @ right, u[:, :4] * s[:4] @ vh[:4])
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))
    assert factors_of(Dense((3, 3))) is None and factors_of(Sum.of(one, Dense((9, 7)))) is None
