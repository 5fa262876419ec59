"""TokenWara in files: whole models, adapters alone, beside other structures, and with something wrong."""

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
from torch import Tensor, nn
from toy_adapters import stir_
from toy_tokens import plain, wrapped
from transformers import AutoModel, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

import rankfold
from rankfold import recipes
from rankfold.adapted import adapted
from rankfold.adapter_file import load_adapter_, save_adapter
from rankfold.adapters import freeze_, merge_, trainable
from rankfold.checkpoint import to_dense_
from rankfold.factorize import factorize_
from rankfold.hosts import Linear
from rankfold.lora import save_as_lora
from rankfold.token_layer import token_layers
from rankfold.token_wavelet import token_wara_

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
FULL = {"alpha": 3.0, "wavelet": "db2", "scales": True, "bands": ("LL1", "HH1"), "activation": "relu"}
IMAGES = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 17, 8, generator=torch.Generator().manual_seed(0))


def vision(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = SIZES | {
        "intermediate_size": 32,
        "image_size": 20,
        "patch_size": 4,
        "num_labels": 3,
    }
    model: Any = ViTForImageClassification(ViTConfig(**sizes))
    return model.to(dtype).eval()


def inner(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layer" in n]


def out(model: Any, x: Tensor = IMAGES) -> Tensor:
    with torch.no_grad():
        y = model.eval()(x.to(next(model.parameters()).dtype))
    return y if isinstance(y, Tensor) else y.logits


def same(one: nn.Module, two: nn.Module) -> bool:
    mine, theirs = one.state_dict(), two.state_dict()
    return mine.keys() == theirs.keys() and all(
        mine[key].dtype == theirs[key].dtype and torch.equal(mine[key], theirs[key]) for key in mine
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_transformers_model_comes_back_by_itself(dtype: torch.dtype, tmp_path: Path) -> None:
    model = vision(dtype)
    wrapped(model, inner(model), **FULL)
    model.save_pretrained(tmp_path / "plain")  # its own: token_wara_ has told it
    rankfold.save(model, tmp_path / "model")
    rankfold.verify(model, tmp_path / "model", {"pixel_values": IMAGES.to(dtype)})
    config = json.loads((tmp_path / "plain" / "config.json").read_text())["quantization_config"]
    assert (
        config["version"] == 2
        and config["structures"] == {}
        and len(config["tokens"]) == len(inner(vision()))
    )
    for folder in ("plain", "model"):
        again = AutoModelForImageClassification.from_pretrained(tmp_path / folder, dtype="auto")
        assert same(model, again) and torch.equal(out(again), out(model))
        for layer in token_layers(again).values():
            assert layer.left.dtype == torch.float32 and layer.host.weight.dtype == dtype
            assert layer.spec() == token_layers(model)[next(iter(token_layers(model)))].spec()
    assert all(p.requires_grad for p in again.parameters()), "as every loaded model: freeze_ says what trains"
    freeze_(again)
    assert set(trainable(again)) == set(trainable(model))
    again.save_pretrained(tmp_path / "again")  # what was loaded saves itself
    twice = AutoModelForImageClassification.from_pretrained(tmp_path / "again", dtype="auto")
    assert torch.equal(out(twice), out(model))
    bare = AutoModel.from_pretrained(tmp_path / "model", dtype="auto")  # another class: no prefix
    assert len(token_layers(bare)) == len(token_layers(model))
    assert same(bare.layers, model.get_submodule(model.base_model_prefix).layers)


def test_a_config_that_lies(tmp_path: Path) -> None:
    model = vision()
    wrapped(model, inner(model)[:1]).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    good = json.loads(path.read_text())
    (name,) = good["quantization_config"]["tokens"]
    spec = good["quantization_config"]["tokens"][name]
    for change, says in (
        ({"version": 3}, "newer rankfold: its format is version 3"),
        ({"tokens": {}}, "the checkpoint lacks 2 tensors of the model"),
        ({"tokens": {name: spec | {"rank": 3}}}, "tensors of another shape"),
        ({"tokens": {name: spec | {"scales": True}}}, "lacks 1 tensors of the model: .*scales"),
        ({"tokens": {f"{name}x": spec}}, "which ViTForImageClassification does not have. Nearest"),
        ({"tokens": [name]}, "'tokens' must map layer names to specs"),
    ):
        body = good | {"quantization_config": good["quantization_config"] | change}
        path.write_text(json.dumps(body))
        with pytest.raises(ValueError, match=says):
            AutoModelForImageClassification.from_pretrained(tmp_path / "model")


def test_a_plain_module(tmp_path: Path) -> None:
    model = wrapped(plain(), ["0", "2"], leading=2, grid=(3, 5), scales=True)
    rankfold.save(model, tmp_path / "model")
    rankfold.verify(model, tmp_path / "model")
    again = rankfold.load_(plain(), tmp_path / "model")
    assert same(again, model) and torch.equal(out(again, TOKENS), out(model, TOKENS))
    assert token_layers(again)["0"].grid == (3, 5)
    assert set(trainable(freeze_(again))) == set(trainable(model))


@pytest.mark.parametrize("first", ["compressed", "adapted", "wrapped"])
def test_beside_other_structures(first: str, tmp_path: Path) -> None:
    """A TokenWara around a compressed layer, around an adapted one, and an adapter inside of a TokenWara."""
    base = plain()
    if first == "compressed":
        factorize_(base, recipes.svd, budget=0.7)
    model = copy.deepcopy(base)
    if first == "adapted":
        factorize_(model, recipes.lora(rank=2), targets=["0"])
    token_wara_(model, ["0", "2"], 2)
    if first == "wrapped":
        factorize_(model, recipes.wara(rank=2), targets=["0.host"])
    freeze_(model)
    own = {name for name in trainable(model) if name.endswith(("left", "right")) and "host" not in name}
    assert own == {"0.left", "0.right", "2.left", "2.right"}, "what was there first trains on"
    stir_(model)
    assert type(model[0].host) is Linear, "a structure stands inside"
    rankfold.save(model, tmp_path / "model")
    again = rankfold.load_(plain(), tmp_path / "model")
    assert same(again, model) and torch.equal(out(again, TOKENS), out(model, TOKENS))
    folder = save_adapter(model, tmp_path / "adapter")
    alone = load_adapter_(copy.deepcopy(base), folder)
    assert torch.equal(out(alone, TOKENS), out(model, TOKENS)) and set(trainable(alone)) == set(
        trainable(model)
    )
    with pytest.raises(ValueError, match="layer '0' is a TokenWara, which changes activations"):
        to_dense_(copy.deepcopy(model))
    with pytest.raises(ValueError, match="is a TokenWara, which changes activations"):
        save_as_lora(model, tmp_path / "lora")
    if first == "compressed":
        with pytest.raises(ValueError, match="is no matrix: it cannot be merged"):
            merge_(model)
    else:  # the matrices merge, the TokenWaras stay
        before = out(model, TOKENS)
        done = merge_(model)
        torch.testing.assert_close(out(model, TOKENS), before, rtol=1e-5, atol=1e-5)
        assert list(token_layers(model)) == ["0", "2"] and type(model[0].host) is nn.Linear
        rankfold.save(model, tmp_path / "merged")
        assert same(rankfold.load_(plain(), tmp_path / "merged"), model)
        done.undo()
        assert torch.equal(out(model, TOKENS), before) and len(adapted(model)) == 1


def test_an_adapter_alone(tmp_path: Path) -> None:
    base = vision()
    model = copy.deepcopy(base)
    token_wara_(model, inner(model), 2, **FULL)
    freeze_(model, keep=["classifier*"])
    stir_(model)
    folder = save_adapter(model, tmp_path / "adapter")
    body = json.loads((folder / "rankfold_adapter.json").read_text())
    assert body["version"] == 2 and body["layers"] == {} and body["base"]["dtype"] == "float32"
    held = load_file(folder / "adapter.safetensors")
    assert sum(t.nbytes for t in held.values()) == sum(p.nbytes for p in trainable(model).values())
    again = load_adapter_(copy.deepcopy(base), folder)
    assert torch.equal(out(again), out(model)) and set(trainable(again)) == set(trainable(model))
    over = wrapped(copy.deepcopy(base), inner(base), levels=2, seed=5)  # others there: replaced
    assert torch.equal(out(load_adapter_(over, folder)), out(model))
    rankfold.save(again, tmp_path / "whole")
    rankfold.verify(again, tmp_path / "whole")
    some = wrapped(copy.deepcopy(base), inner(base)[:1])
    one = load_adapter_(copy.deepcopy(base), save_adapter(some, tmp_path / "one"))
    assert torch.equal(out(one), out(some)) and len(token_layers(one)) == 1
    with pytest.raises(ValueError, match="is an adapter for another base"):
        load_adapter_(copy.deepcopy(model), tmp_path / "one")  # more TokenWaras than the file knows


def test_a_trained_base_is_refused(tmp_path: Path) -> None:
    model = wrapped(plain(), ["0"])
    model[0].host.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"layer '0': the base under its adapter trains \(weight\)"):
        save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="matches only weights under adapters"):
        freeze_(model, keep=["0.host.weight"])
    freeze_(model, keep=["0.host.bias"])
    again = load_adapter_(plain(), save_adapter(stir_(model), tmp_path / "adapter"))
    assert torch.equal(out(again, TOKENS), out(model, TOKENS))


def edited(folder: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any], to: Path) -> Path:
    shutil.copytree(folder, to)
    body = json.loads((to / "rankfold_adapter.json").read_text())
    state = load_file(to / "adapter.safetensors")
    change(body, state)
    (to / "rankfold_adapter.json").write_text(json.dumps(body))
    save_file(state, to / "adapter.safetensors")
    return to


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda b, s: b.update(version=3),
            "written by a newer rankfold: its format is version 3, .* up to 2",
        ),
        (
            lambda b, s: b["tokens"].update({"9": b["tokens"]["0"]}),
            "is for layer '9', which Sequential lacks",
        ),
        (
            lambda b, s: b["tokens"].update({"1": b["tokens"].pop("0")}),
            "layer '1': .*GELU has no in_features",
        ),
        (lambda b, s: b.update(tokens=[]), "'tokens' must map layer names"),
        (lambda b, s: b.update(tokens={}), "'layers' must map layer names to their adapters; it names none"),
        (
            lambda b, s: b["tokens"]["0"].update(rank=3),
            r"layer '0': tensor 'right' is torch.float32 \(2, 8\)",
        ),
        (lambda b, s: b["tokens"]["0"].update(scales=True), "layer '0': tensor 'scales' is missing"),
        (lambda b, s: s.pop("tokens.0.left"), "tensor 'left' is missing in the file"),
        (lambda b, s: s["tokens.0.left"].fill_(float("nan")), "'left' holds NaN or infinite entries"),
        (
            lambda b, s: s.update({"tokens.0.more": torch.zeros(2)}),
            r"left-over tensors \['tokens\.0\.more'\]",
        ),
        (lambda b, s: b["base"].update(hash="sha256:0"), "is an adapter for another base"),
    ],
)
def test_files_with_something_wrong(
    change: Callable[[dict[str, Any], dict[str, Tensor]], Any], says: str, tmp_path: Path
) -> None:
    folder = save_adapter(wrapped(plain(), ["0"]), tmp_path / "adapter")
    model = plain()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=says):
        load_adapter_(model, edited(folder, change, tmp_path / "edited"))
    assert dict(model.named_modules()) == before and all(p.requires_grad for p in model.parameters())
