"""Tiny-WaRA as we read it, and its structure: a fixed basis, and a few coefficients that train."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from toy_adapters import conv1d_model, convolutions, images, logits, stir_, train
from transformers import AutoModelForCausalLM

import rankfold
from rankfold import recipes
from rankfold.adapted import adapted, parts
from rankfold.adapter_file import load_adapter_, save_adapter
from rankfold.adapters import freeze_, merge_, trainable
from rankfold.cored import Cored
from rankfold.factorize import factorize_
from rankfold.hosts import hosts
from rankfold.lora import save_as_lora
from rankfold.lora_load import load_lora_
from rankfold.methods import TinyWaRA
from rankfold.metric import Metric
from rankfold.structure import build
from rankfold.structures import LowRank
from rankfold.testing import check_host, check_method, check_structure
from rankfold.wavelet import Wavelet
from rankfold.wavelet_transform import analyze2, filters


def term(model: nn.Module, name: str) -> Wavelet:
    (found,) = parts(adapted(model)[name])[1]
    assert isinstance(found, Wavelet)
    return found


def filled(core: str, scale: float = 2.0) -> Cored:
    torch.manual_seed(0)
    weights = torch.randn(3, 3) if core == "full" else torch.randn(3)
    return Cored.of(torch.randn(9, 3), weights, torch.randn(3, 6), scale)


@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_laws_of_the_structure(core: str) -> None:
    one = filled(core)
    check_structure(one, compile=True)
    check_host(nn.Linear(6, 9), torch.randn(4, 6), structure=one)
    middle = one.weights if core == "full" else torch.diag(one.weights)
    torch.testing.assert_close(one.to_dense(), 2 * one.left @ middle @ one.right)
    assert one.params == (9 if core == "full" else 3) and one.nbytes == 4 * (one.params + 3 * (9 + 6))


def test_its_bases_never_train() -> None:
    one = filled("full").requires_grad_(True)
    assert [name for name, _ in one.named_parameters()] == ["weights"]
    one(torch.randn(2, 6)).square().sum().backward()
    assert one.weights.grad is not None and one.left.grad is None and not one.left.requires_grad
    assert set(one.state_dict()) == {"weights", "left", "right"}


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"rank": 7}, "rank=7 must be an integer between 1 and 6"),
        ({"core": "square"}, "core='square'; choose one of full, diagonal"),
        ({"core": ["full"]}, "choose one of full, diagonal"),
        ({"scale": 0}, "its scale is a finite number other than 0"),
        ({"scale": float("inf")}, "its scale is a finite number"),
        ({"depth": 1}, "does not fit it"),
    ],
)
def test_specs_that_make_no_sense(sizes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build({"kind": "cored", "shape": [9, 6], "rank": 3, **sizes}, device="meta")


@pytest.mark.parametrize(
    ("method", "shape"),
    [
        (TinyWaRA(2), (12, 10)),
        (TinyWaRA(3, alpha=6.0, core="diagonal"), (12, 10)),
        (TinyWaRA(1, wavelet="db2", levels=2), (7, 9)),
    ],
    ids=str,
)
def test_laws_of_the_method(method: TinyWaRA, shape: tuple[int, int]) -> None:
    check_method(method, shape, metrics={"": Metric()})
    check_structure(stirred(method, torch.randn(shape)))


def stirred(method: TinyWaRA, weight: Tensor) -> Wavelet:
    made = method.fit(weight, Metric(), method.rank)
    stir_(made)
    found = made.added[0]
    assert isinstance(found, Wavelet)
    return found


@pytest.mark.parametrize("wavelet", ["db1", "db2"])
def test_the_basis_is_the_truncated_svd_of_each_band(wavelet: str) -> None:
    """With M = diag(σ) every band is the best approximation of that of W at its rank."""
    weight = torch.randn(16, 12, dtype=torch.float64)
    found = TinyWaRA(2, wavelet=wavelet).fit(weight, Metric(), 2).added[0]
    assert isinstance(found, Wavelet) and set(found.bands) == {"LL1", "LH1", "HL1", "HH1"}
    for name, band in analyze2(weight, filters(wavelet), 1).items():
        u, s, vh = torch.linalg.svd(band)
        held = found.bands[name]
        assert isinstance(held, Cored) and not held.weights.any()
        eye = torch.eye(2, dtype=torch.float64)
        torch.testing.assert_close(held.left.mT @ held.left, eye)
        torch.testing.assert_close(held.right @ held.right.mT, eye)
        with torch.no_grad():
            held.weights.copy_(torch.diag(s[:2]))
        torch.testing.assert_close(held.to_dense(), (u[:, :2] * s[:2]) @ vh[:2])


@pytest.mark.parametrize(("core", "numbers"), [("full", 4 * 9), ("diagonal", 4 * 3)])
def test_it_has_not_collapsed(core: str, numbers: int) -> None:
    """Rank 4r, from fewer numbers than LoRA needs for rank 1: r² or r a band, whatever the sides."""
    torch.manual_seed(0)
    found = stirred(TinyWaRA(3, core=core), torch.randn(64, 64, dtype=torch.float64))
    assert found.params == numbers < 64 + 64
    assert torch.linalg.matrix_rank(found.to_dense()) == 4 * 3
    double = stirred(TinyWaRA(3, core=core, levels=2), torch.randn(64, 64, dtype=torch.float64))
    assert torch.linalg.matrix_rank(double.to_dense()) == 7 * 3 and double.params == numbers // 4 * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_starts_where_the_model_was_trains_and_reloads(
    dtype: torch.dtype, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    base = tiny_llama().to(dtype)
    model = copy.deepcopy(base)
    report = factorize_(model, recipes.wara_tiny(rank=3, alpha=6), targets=["*.q_proj", "*.down_proj"])
    assert torch.equal(logits(model), logits(base))
    assert report.totals["params_trained"] == 4 * 4 * 9
    assert {name.rpartition(".")[2] for name in trainable(model)} == {"weights"}
    bases = {name: t.clone() for name, t in model.named_buffers() if name.endswith(("left", "right"))}
    assert len(bases) == 4 * 4 * 2
    train(model)
    assert not torch.equal(logits(model), logits(base))
    assert all(torch.equal(model.get_buffer(name), tensor) for name, tensor in bases.items())
    folder = save_adapter(model, tmp_path / "adapter")
    assert {key.rpartition(".")[2] for key in load_file(folder / "adapter.safetensors")} == {
        "weights",
        "left",
        "right",
    }
    one = load_adapter_(copy.deepcopy(base), folder)
    assert torch.equal(logits(one), logits(model)) and set(trainable(one)) == set(trainable(model))
    rankfold.save(model, tmp_path / "model")
    rankfold.verify(model, tmp_path / "model")
    two = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert set(trainable(freeze_(two))) == set(trainable(model))
    assert sum(p.numel() for p in trainable(two).values()) == 4 * 4 * 9
    assert {t.dtype for name, t in two.named_buffers() if name in bases} == {torch.float32}
    done = merge_(model)
    assert not hosts(model)
    if dtype == torch.float32:
        torch.testing.assert_close(logits(model), logits(one), rtol=1e-4, atol=1e-4)
    done.undo()
    assert torch.equal(logits(model), logits(one))


def test_on_other_hosts() -> None:
    base = conv1d_model()
    model = copy.deepcopy(base)
    factorize_(model, recipes.wara_tiny(rank=2), targets=["*.c_attn", "transformer.wte", "lm_head"])
    assert torch.equal(logits(model), logits(base))
    train(model)
    outputs = logits(model)
    merge_(model)
    torch.testing.assert_close(logits(model), outputs, rtol=1e-4, atol=1e-4)
    for conv in ("channel", "spatial"):
        plain = convolutions()
        images_model = copy.deepcopy(plain)
        factorize_(images_model, recipes.wara_tiny(rank=1), targets=["*"], conv=conv)
        assert torch.equal(images_model(images()), plain(images()))
        stir_(images_model)
        moved = images_model(images())
        assert not torch.allclose(moved, plain(images()))
        merge_(images_model)
        torch.testing.assert_close(images_model(images()), moved, rtol=1e-4, atol=1e-4)


def test_beside_low_rank_layers_it_merges_into_factors(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    factorize_(model, recipes.svd, budget=0.5, targets=["*.q_proj"])
    ranks = {name: vars(host.weight)["rank"] for name, host in hosts(model).items()}
    before = logits(model)
    factorize_(model, recipes.wara_tiny(rank=2), targets=["*.q_proj"])
    assert torch.equal(logits(model), before)
    stir_(model)
    outputs = logits(model)
    merge_(model)
    found = {name: host.weight for name, host in hosts(model).items()}
    assert all(isinstance(held, LowRank) for held in found.values())
    assert {name: held.rank for name, held in found.items()} == {k: r + 8 for k, r in ranks.items()}
    torch.testing.assert_close(logits(model), outputs, rtol=1e-4, atol=1e-4)


def test_as_a_lora(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    """Exact, of the bands' ranks together; PEFT opens it."""
    peft = pytest.importorskip("peft")
    base = tiny_llama()
    model = copy.deepcopy(base)
    factorize_(model, recipes.wara_tiny(rank=2, alpha=3, core="diagonal"), targets=["*.q_proj"])
    stir_(model)
    folder = save_as_lora(model, tmp_path / "lora")
    served = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    assert served.peft_config["default"].r == 4 * 2
    torch.testing.assert_close(logits(served), logits(model), rtol=1e-5, atol=1e-5)
    ours = load_lora_(copy.deepcopy(base), folder)
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 0}, r"TinyWaRA\(rank=0\)"),
        ({"core": "dense"}, r"TinyWaRA\(core='dense'\): choose one of full, diagonal"),
        ({"levels": 1.0}, r"TinyWaRA\(levels=1\.0\)"),
        ({"wavelet": "bior2.2"}, "is biorthogonal"),
        ({"coefficients": 4}, "recipe 'wara_tiny' has no option 'coefficients'"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        recipes.wara_tiny(**options)
    with pytest.raises(ValueError, match=r"rank 4 does not fit band LL1 of a weight \(12, 6\): 6 x 3"):
        factorize_(nn.Sequential(nn.Linear(6, 12)), recipes.wara_tiny(rank=4))
