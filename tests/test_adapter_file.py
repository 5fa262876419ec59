"""Adapter files: what comes back, the base they belong to, and files with something wrong in them."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from toy_adapters import conv1d_model, convolutions, images, logits, stir_, train

import rankfold
from rankfold import recipes
from rankfold.adapter_file import load_adapter_, save_adapter
from rankfold.adapter_manifest import base_hash
from rankfold.adapters import freeze_, merge_, trainable
from rankfold.factorize import factorize_
from rankfold.hosts import hosts
from rankfold.structures import Sum

METHODS = {
    "lora": recipes.lora(rank=3, alpha=6),
    "wara": recipes.wara(rank=2, wavelet="db2", levels=2),
    "adaptive": recipes.wara_adaptive(rank=2),
    "feature": recipes.wara_feature(rank=3),
}


@pytest.mark.parametrize(
    ("method", "dtype"),
    [*((method, torch.float32) for method in METHODS), ("wara", torch.bfloat16), ("lora", torch.bfloat16)],
    ids=str,
)
def test_saved_and_loaded(
    method: str, dtype: torch.dtype, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    base = tiny_llama().to(dtype)
    model = copy.deepcopy(base)
    factorize_(model, METHODS[method], targets=["*.q_proj", "*.mlp.*"])
    freeze_(model, keep=["model.norm.weight"])
    train(model)
    folder = save_adapter(model, tmp_path / "adapter")
    assert sorted(path.name for path in folder.iterdir()) == ["adapter.safetensors", "rankfold_adapter.json"]
    small = sum(t.nbytes for t in load_file(folder / "adapter.safetensors").values())
    assert small == sum(p.nbytes for p in trainable(model).values())

    again = load_adapter_(copy.deepcopy(base), folder)
    assert torch.equal(logits(again), logits(model))
    assert set(trainable(again)) == set(trainable(model))
    train(again)
    train(model)
    torch.testing.assert_close(logits(again), logits(model))
    rankfold.save(again, tmp_path / "whole")  # the adapted model as an ordinary folder
    rankfold.verify(again, tmp_path / "whole")


def test_an_adapter_is_replaced_by_another(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    base = tiny_llama()
    for name, method in METHODS.items():
        model = copy.deepcopy(base)
        factorize_(model, method, targets=["*.q_proj"])
        save_adapter(stir_(model), tmp_path / name)
    one = load_adapter_(load_adapter_(copy.deepcopy(base), tmp_path / "lora"), tmp_path / "wara")
    assert torch.equal(logits(one), logits(load_adapter_(copy.deepcopy(base), tmp_path / "wara")))
    merge_(one)
    assert not hosts(one)


def test_layers_of_other_kinds_and_running_statistics(tmp_path: Path) -> None:
    for conv in ("channel", "spatial"):
        base = convolutions()
        model = copy.deepcopy(base)
        factorize_(model, recipes.wara(rank=1), targets=["*"], conv=conv)
        stir_(model)
        model.train()(images(1) * 3 + 1)  # the batch norm counts, frozen as it is
        model.eval()
        assert not torch.equal(model[1].running_mean, base[1].running_mean)
        folder = save_adapter(model, tmp_path / conv)
        again = load_adapter_(copy.deepcopy(base), folder)
        assert torch.equal(again(images()), model(images()))
        assert again[0].spatial == (conv == "spatial")


def test_conv1d_and_tied_weights(tmp_path: Path) -> None:
    base = conv1d_model()
    model = copy.deepcopy(base)
    factorize_(model, recipes.lora(rank=2), targets=["*.c_attn", "transformer.wte", "lm_head"])
    assert model.lm_head.weight is model.transformer.wte.weight
    stir_(model)
    folder = save_adapter(model, tmp_path / "adapter")
    again = load_adapter_(copy.deepcopy(base), folder)
    assert torch.equal(logits(again), logits(model))
    assert again.lm_head.weight is again.transformer.wte.weight

    with pytest.raises(ValueError, match=r"'transformer\.wte' shares its weight with 'lm_head'"):
        load_adapter_(base, edited(folder, tmp_path / "alone", lambda body: body["layers"].pop("lm_head")))


def test_beside_compressed_layers(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    base = tiny_llama()
    factorize_(base, recipes.svd, budget=0.7)
    model = copy.deepcopy(base)
    factorize_(model, recipes.wara(rank=2), targets=["*.q_proj"])
    stir_(model)
    again = load_adapter_(copy.deepcopy(base), save_adapter(model, tmp_path / "adapter"))
    assert torch.equal(logits(again), logits(model))


def test_one_base_has_one_hash(tiny_llama: Callable[..., Any]) -> None:
    base = tiny_llama()
    model = copy.deepcopy(base)
    factorize_(model, recipes.lora(rank=2), targets=["*.q_proj"])
    layers = {name: {"terms": [{"shape": [64, 64]}]} for name in hosts(model)}
    assert base_hash(base, layers) == base_hash(model, layers) == base_hash(stir_(model), layers)
    with torch.no_grad():
        base.model.norm.weight[0] += 1e-3
    assert base_hash(base, layers) != base_hash(model, layers)
    assert base_hash(base, layers, ["model.norm.weight"]) == base_hash(model, layers, ["model.norm.weight"])


def test_another_base_is_refused_and_may_be_taken(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    base = tiny_llama()
    model = copy.deepcopy(base)
    factorize_(model, recipes.lora(rank=2), targets=["*.q_proj"])
    folder = save_adapter(stir_(model), tmp_path / "adapter")
    theirs = json.loads((folder / "rankfold_adapter.json").read_text())["base"]["hash"]
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.model.embed_tokens.weight[3, 3] += 1
    before = logits(other)
    with pytest.raises(ValueError) as error:
        load_adapter_(other, folder)
    assert theirs in str(error.value) and "other_base=True" in str(error.value)
    mine = str(error.value).partition("this model is ")[2].split()[0]
    assert len(mine) == len(theirs) == 32 and mine != theirs
    assert torch.equal(logits(other), before) and not hosts(other), "unchanged"
    with pytest.raises(ValueError, match=r"float32\), this model is \w{32} \(bfloat16\)"):
        load_adapter_(copy.deepcopy(base).bfloat16(), folder)
    load_adapter_(other, folder, other_base=True)
    assert len(hosts(other)) == 2


def test_a_head_that_was_trained_may_be_any_in_the_base(tmp_path: Path) -> None:
    """A classifier is new and random whenever a base is opened; the file has the one that was trained."""
    base = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 6))
    model = copy.deepcopy(base)
    factorize_(model, recipes.lora(rank=2), targets=["0"])
    freeze_(model, keep=["1.*"])
    folder = save_adapter(stir_(model), tmp_path / "adapter")
    nn.init.normal_(base[1].weight)
    x = torch.randn(3, 8)
    assert torch.equal(load_adapter_(base, folder)(x), model(x))
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 6))
    with pytest.raises(ValueError, match="on the meta device: load the weights"):
        load_adapter_(empty, folder)


def test_what_cannot_be_saved(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="LlamaForCausalLM has no adapters"):
        save_adapter(model, tmp_path / "x")
    factorize_(model, recipes.lora(rank=2), targets=["*.q_proj"])
    model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj.: the base .*\.freeze_"):
        save_adapter(model, tmp_path / "x")
    freeze_(model)
    save_adapter(model, tmp_path / "x")
    with pytest.raises(ValueError, match="overwrite"):
        save_adapter(model, tmp_path / "x")
    save_adapter(model, tmp_path / "x", overwrite=True)


@pytest.fixture
def good(tmp_path: Path) -> tuple[nn.Module, Path]:
    base = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 6))
    model = copy.deepcopy(base)
    factorize_(model, recipes.wara(rank=2), targets=["0"])
    model[1].bias.requires_grad_(True)
    return base, save_adapter(stir_(model), tmp_path / "good")


def edited(folder: Path, out: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of an adapter folder with its manifest changed in place by a function."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(folder, out)
    body = json.loads((out / "rankfold_adapter.json").read_text())
    change(body)
    (out / "rankfold_adapter.json").write_text(json.dumps(body))
    return out


def damaged(folder: Path, out: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of an adapter folder with its tensors changed in place by a function."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(folder, out)
    tensors = load_file(out / "adapter.safetensors")
    change(tensors)
    save_file(tensors, out / "adapter.safetensors")
    return out


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer": (
        lambda b: b.update(version=3),
        "written by a newer rankfold: its format is version 3, this one reads",
    ),
    "no version": (lambda b: b.pop("version"), "version=None"),
    "another format": (lambda b: b.update(format="zip"), "its format is not 'rankfold_adapter'"),
    "no base": (lambda b: b.update(base={"hash": 3}), "'base' must hold"),
    "no layers": (lambda b: b.update(layers={}), "'layers' must map"),
    "layers that are none": (lambda b: b["layers"].update({"0": 3}), "'layers' must map"),
    "no terms": (lambda b: b["layers"].update({"0": {"terms": []}}), "layer '0' has neither"),
    "the same as none": (lambda b: b["layers"].update({"1": {"same_as": ["0"]}}), "layer '1' has neither"),
    "unknown layer": (lambda b: b["layers"].update({"o": b["layers"].pop("0")}), "is for layer 'o'"),
    "kind": (lambda b: b["layers"]["0"]["terms"][0].update(kind="wavelte"), "Unknown structure 'wavelte'"),
    "no filter": (lambda b: b["layers"]["0"]["terms"][0].update(taps=[1, 1]), "not orthonormal"),
    "huge": (lambda b: b["layers"]["0"]["terms"][0].update(shape=[2**40, 8]), "between 1 and"),
    "other shape": (lambda b: b["layers"]["0"]["terms"][0].update(shape=[12, 10]), "layer '0'"),
    "kept": (
        lambda b: b["kept"].append("2.bias"),
        "tensor '2.bias' is missing in the file, missing in the model",
    ),
    "taken": (lambda b: b.pop("taken"), "'taken' must be true or false"),
    "kept is a word": (lambda b: b.update(kept="all"), "'kept' must be a list"),
    "not kept": (lambda b: b["kept"].clear(), "left-over tensors ['kept.1.bias']"),
}


@pytest.mark.parametrize("case", MANIFESTS, ids=str)
def test_damaged_manifests(case: str, good: tuple[nn.Module, Path], tmp_path: Path) -> None:
    base, folder = good
    change, words = MANIFESTS[case]
    with pytest.raises(ValueError) as error:
        load_adapter_(base, edited(folder, tmp_path / "bad", change))
    assert words in str(error.value), error.value
    assert type(base[0]) is nn.Linear and all(p.requires_grad for p in base.parameters())


FILES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (
        lambda t: t.pop("0.0.bands.LH1.left.weight"),
        "tensor '0.0.bands.LH1.left.weight' is missing",
    ),
    "shape": (
        lambda t: t.update({"0.0.bands.LL1.left.weight": torch.ones(6, 3)}),
        "(6, 3) in the file, its spec",
    ),
    "integers": (
        lambda t: t.update({"0.0.bands.LL1.left.weight": torch.ones(6, 2).int()}),
        "torch.int32 (6, 2)",
    ),
    "nan": (lambda t: t["0.0.bands.LL1.left.weight"].fill_(float("nan")), "holds NaN or infinite"),
    "left over": (
        lambda t: t.update({"0.1.left.weight": torch.ones(2)}),
        "left-over tensors ['0.1.left.weight']",
    ),
    "kept": (
        lambda t: t.update({"kept.1.bias": torch.ones(2)}),
        "tensor '1.bias' is torch.float32 (2,) in the file",
    ),
}


@pytest.mark.parametrize("case", FILES, ids=str)
def test_damaged_tensors(case: str, good: tuple[nn.Module, Path], tmp_path: Path) -> None:
    base, folder = good
    change, words = FILES[case]
    with pytest.raises(ValueError) as error:
        load_adapter_(base, damaged(folder, tmp_path / "bad", change))
    assert words in str(error.value), error.value
    assert type(base[0]) is nn.Linear and all(p.requires_grad for p in base.parameters())


def test_files_that_are_none(good: tuple[nn.Module, Path], tmp_path: Path) -> None:
    base, folder = good
    with pytest.raises(ValueError, match="no folder that save_adapter wrote"):
        load_adapter_(base, tmp_path / "nowhere")
    weights = folder / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"adapter\.safetensors cannot be read"):
        load_adapter_(base, folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"adapter\.safetensors cannot be read"):
        load_adapter_(base, folder)
    (folder / "rankfold_adapter.json").write_text("{" * 3)
    with pytest.raises(ValueError, match="is not JSON"):
        load_adapter_(base, folder)
    assert isinstance(base[0], nn.Linear) and not isinstance(base[0].weight, Sum)
