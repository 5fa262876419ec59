"""A transformers folder with anything wrong in it does not open. Every one of these would otherwise be random
or wrong weights, and a warning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import damaged, edited, manifest_of, nested
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

import rankfold
from rankfold.manifest import check_manifest, rebuild_


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_llama()
    rankfold.factorize_(model, rankfold.recipes.svd, budget=0.6)
    return rankfold.save(model, tmp_path_factory.mktemp("llama") / "model")


FACTOR, NORM = "model.layers.1.mlp.up_proj.weight.left.weight", "model.norm.weight"


@pytest.mark.parametrize("name", [FACTOR, NORM, "lm_head.weight"])
@pytest.mark.parametrize("how", ["delete", "rename", "reshape", "transpose", "integers"])
def test_every_tensor_is_checked(how: str, name: str, folder: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensor = tensors.pop(name)
        if how == "rename":
            tensors[name.replace("weight", "wait", 1)] = tensor
        elif how == "reshape":
            tensors[name] = tensor[:-1].contiguous()
        elif how == "transpose":
            tensors[name] = tensor.flatten()[None] if tensor.dim() == 1 else tensor.mT.contiguous()
        elif how == "integers":
            tensors[name] = tensor.to(torch.int8)

    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(damaged(folder, tmp_path / "damaged", change))


@pytest.mark.parametrize("name", ["surplus", "model.layers.0.mlp.up_proj.weight", f"{FACTOR}.more"])
def test_a_tensor_too_many_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    broken = damaged(folder, tmp_path / "damaged", lambda t: t.update({name: torch.zeros(2, 2)}))
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(broken)


@pytest.mark.parametrize(("tensor", "stack"), [("w1", "gate_up_proj"), ("w2", "down_proj")])
def test_a_missing_expert_is_refused(tensor: str, stack: str, tmp_path: Path) -> None:
    """Its tensor is one slice of a stack, under another name in the file."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    rankfold.factorize_(model, rankfold.recipes.svd, budget=0.6)
    rankfold.save(model, tmp_path / "out")
    name = f"model.layers.0.block_sparse_moe.experts.3.{tensor}.weight"
    with pytest.raises(ValueError, match=rf"model\.layers\.0\.mlp\.experts\.{stack}"):
        MixtralForCausalLM.from_pretrained(
            damaged(tmp_path / "out", tmp_path / "damaged", lambda t: t.pop(name))
        )


def at(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["structures"][name].update(fields)


UP = "model.layers.1.mlp.up_proj"  # (128, 64)

MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "rank edited": (at(UP, rank=5), UP.replace(".", r"\.") + r"\.weight\.(left|right)\.weight"),
    "rank negative": (at(UP, rank=-3), f"{UP}.*rank=-3"),
    "rank zero": (at(UP, rank=0), f"{UP}.*rank=0"),
    "rank above full": (at(UP, rank=65), f"{UP}.*rank=65.*64"),
    "rank huge": (at(UP, rank=2**60), f"{UP}.*rank={2**60}"),
    "rank a float": (at(UP, rank=8.0), f"{UP}.*rank=8.0"),
    "rank true": (at(UP, rank=True), f"{UP}.*rank=True"),
    "rank null": (at(UP, rank=None), f"{UP}.*rank=None"),
    "rank a list": (at(UP, rank=[8]), f"{UP}.*rank="),
    "shape huge": (at(UP, shape=[2**60, 64]), f"{UP}.*shape.*{2**60}"),
    "shape negative": (at(UP, shape=[-128, 64]), f"{UP}.*shape.*-128"),
    "shape true": (at(UP, shape=[True, 64]), f"{UP}.*shape"),
    "shape floats": (at(UP, shape=[128.0, 64.0]), f"{UP}.*shape"),
    "shape a number": (at(UP, shape=128), f"{UP}.*shape"),
    "shape of three": (at(UP, shape=[128, 64, 1]), f"{UP}.*shape"),
    "shape of another layer": (at(UP, shape=[64, 128]), rf"{UP}.*\(128, 64\).*\(64, 128\)"),
    "field unknown": (at(UP, gain=2), f"{UP}.*gain"),
    "dtype smuggled in": (at(UP, device="cuda"), f"{UP}.*device"),
    "kind unknown": (at(UP, kind="wavelit"), f"{UP}.*Unknown structure 'wavelit'.*low_rank"),
    "kind a list": (at(UP, kind=["low_rank"]), f"{UP}.*Unknown structure"),
    "kind missing": (lambda d: d["structures"][UP].pop("kind"), f"{UP}.*'kind'"),
    "terms a number": (at(UP, kind="sum", rank=None, terms=3), f"{UP}.*sum"),
    "nested deeply": (lambda d: d["structures"].update({UP: nested(60)}), "tensors of the model|too deeply"),
    "layer unknown": (
        lambda d: d["structures"].update({"model.layers.1.mlp.upp_proj": d["structures"].pop(UP)}),
        r"upp_proj.*Nearest.*model.layers.1.mlp.up_proj",
    ),
    "layer of no matrix": (
        lambda d: d["structures"].update({"model.norm": {"kind": "dense", "shape": [1, 64]}}),
        "model.norm.*cannot hold a structure",
    ),
    "structures a list": (lambda d: d.update(structures=[1]), "'structures' must map.*list"),
    "structures of lists": (lambda d: d.update(structures={UP: [1]}), "'structures' must map"),
    "structures null": (lambda d: d.update(structures=None), "structures"),
    "structures missing": (lambda d: d.pop("structures"), "structures"),
    "same as nothing": (lambda d: d["structures"].update({UP: {"same_as": "nobody"}}), f"{UP}.*nobody"),
    "same as itself": (lambda d: d["structures"].update({UP: {"same_as": UP}}), f"{UP}.*no structure"),
    "same as a list": (lambda d: d["structures"].update({UP: {"same_as": [UP]}}), f"{UP}.*no structure"),
    "same as another shape": (
        lambda d: d["structures"].update({UP: {"same_as": "model.layers.1.mlp.down_proj"}}),
        rf"{UP}.*\(128, 64\)",
    ),
    "version of the future": (lambda d: d.update(version=3), "newer rankfold.*version 3.*up to 2"),
    "version in words": (lambda d: d.update(version="1"), "version='1' must be a positive integer"),
    "version true": (lambda d: d.update(version=True), "version=True"),
    "version zero": (lambda d: d.update(version=0), "version=0"),
    "version null": (lambda d: d.update(version=None), "version=None"),
    "entry unknown": (lambda d: d.update(speed="high"), "speed"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), MANIFESTS.values(), ids=MANIFESTS.keys())
def test_config_edited_by_hand(
    change: Callable[[dict[str, Any]], Any], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(edited(folder, tmp_path / "edited", change))


@pytest.mark.parametrize("depth", [1000, 10_000])
def test_a_spec_nested_without_end_is_an_error_and_not_a_crash(depth: int) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        rankfold.build(nested(depth), device="meta")
    structures = check_manifest(manifest_of({"encode": nested(depth)}))
    with pytest.raises(ValueError, match=r"encode.*nested too deeply"):
        rebuild_(nn.ModuleDict({"encode": nn.Linear(64, 128)}), structures)


def test_a_manifest_is_not_any_json() -> None:
    for data in (None, [], 3, {}, {"quant_method": "gptq"}):
        with pytest.raises(ValueError, match=r"config.json does not describe a rankfold model"):
            check_manifest(data)


# Another class than the one that was saved.


@pytest.mark.parametrize("name", [NORM, FACTOR])
def test_another_class_does_not_excuse_a_missing_tensor(name: str, folder: Path, tmp_path: Path) -> None:
    broken = damaged(folder, tmp_path / "damaged", lambda t: t.pop(name))
    with pytest.raises(ValueError, match=name.removeprefix("model.").replace(".", r"\.")):
        AutoModel.from_pretrained(broken)


def test_another_class_does_not_excuse_a_surplus_tensor(folder: Path, tmp_path: Path) -> None:
    broken = damaged(folder, tmp_path / "damaged", lambda t: t.update(surplus=torch.zeros(2)))
    with pytest.raises(ValueError, match="surplus"):
        AutoModel.from_pretrained(broken)


def test_an_unknown_class_cannot_vouch_for_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    broken = damaged(folder, tmp_path / "damaged", lambda t: t.pop(NORM))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    with pytest.raises(ValueError, match="NoSuchModel"):
        AutoModelForCausalLM.from_pretrained(broken)
