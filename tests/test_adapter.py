"""Adapter methods through `factorize_`: outputs unchanged, only adapters train, and on what they stand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import rankfold
from rankfold import recipes
from rankfold.adapted import adapted, parts
from rankfold.adapters import freeze_, trainable
from rankfold.factorize import factorize_
from rankfold.methods import LoRA, PiSSA, WaRA
from rankfold.metric import Metric
from rankfold.structures import Dense, Sum
from rankfold.testing import check_method
from rankfold.wavelet import Wavelet

IDS = torch.arange(4, 28).view(2, 12)
RECIPES = ("lora", "wara", "wara_adaptive", "wara_feature", "pissa")
SHAPE = (12, 10)


@pytest.mark.parametrize(
    "method",
    [
        LoRA(3),
        LoRA(3, alpha=6.0, init="gaussian"),
        WaRA(2),
        WaRA(1, alpha=3.0, wavelet="db2", levels=2),
        WaRA(2, domain="feature"),
        WaRA(2, bands={"LL1": 4, "HH1": 1}, init="gaussian"),
        PiSSA(3, alpha=2.0),
    ],
    ids=str,
)
def test_laws(method: Any) -> None:
    metrics = None if not isinstance(method, PiSSA) else {"": Metric()}
    check_method(method, SHAPE, metrics=metrics)


@pytest.mark.parametrize("method", [WaRA(2, bands="energy"), WaRA(2, bands="energy", of="gradient")], ids=str)
def test_laws_where_the_size_depends_on_the_weight(method: Any) -> None:
    side = {"": Metric(None, torch.rand(10, dtype=torch.float64))}
    check_method(method, SHAPE, metrics=side, sizes=[{"LL1": 1}, {"LL1": 3, "HL1": 2}])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_outputs_are_unchanged_bit_for_bit(
    name: str, dtype: torch.dtype, tiny_llama: Callable[..., Any]
) -> None:
    model = tiny_llama(attention_bias=True, mlp_bias=True).to(dtype)
    for p in model.parameters():
        p.data += 0.01 * torch.randn_like(p)
    before, weights = model(IDS).logits, copy.deepcopy(model.state_dict())
    report = factorize_(model, recipes.get(name)(rank=4, alpha=8))
    after = model(IDS).logits
    if name == "pissa":
        assert 0 < (after - before).norm() / before.norm() < (1e-5 if dtype == torch.float32 else 0.05)
    else:
        assert torch.equal(after, before)
        assert all(
            torch.equal(parts(host)[0].to_dense(), weights[f"{key}.weight"])
            for key, host in adapted(model).items()
        )
    assert after.dtype == dtype
    terms = [term for host in adapted(model).values() for term in parts(host)[1]]
    assert len(terms) == 14 and {term.dtype for term in terms} == {torch.float32}
    assert {id(p) for p in trainable(model).values()} == {id(p) for t in terms for p in t.parameters()}
    total = sum(p.numel() for p in trainable(model).values())
    assert (
        report.totals["params_trained"]
        == total
        == report.totals["params_after"] - report.totals["params_before"]
    )
    assert report.totals["bytes_added"] == 4 * total
    assert all("parameters that train" in row.note for row in report.layers)
    assert report.budget == 1 and report.reached > 1


def test_counts_against_lora(tiny_llama: Callable[..., Any]) -> None:
    """Rank r in four bands has the numbers of LoRA at 2r; sharing one pair has half of LoRA's at r."""
    found = {}
    for name, rank in (("lora", 8), ("wara", 4), ("wara_adaptive", 4), ("wara_feature", 16)):
        report = factorize_(tiny_llama(), recipes.get(name)(rank=rank), targets=["*.q_proj"])
        found[name] = report.totals["params_trained"]
    assert found["lora"] == found["wara"] == found["wara_adaptive"] == found["wara_feature"]


def step(model: nn.Module, loss: Callable[[], Tensor], steps: int = 3) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


@pytest.mark.parametrize("name", [*RECIPES, "wara_tiny"])
def test_only_adapters_learn(name: str, tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    factorize_(model, recipes.get(name)(rank=2), targets=["*.q_proj", "*.down_proj"])
    freeze_(model, keep=["lm_head*"])
    state = {key: value.clone() for key, value in model.state_dict().items()}
    trains = set(trainable(model))
    assert "lm_head.weight" in trains and len(adapted(model)) == 4

    def loss() -> Tensor:
        return model(IDS, labels=IDS).loss

    first = loss().item()
    step(model, loss)
    assert loss().item() < first
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]) == (key not in trains), key


def test_the_draw_is_its_own() -> None:
    def made(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(2)))
        state = torch.get_rng_state()
        factorize_(model, recipes.wara(rank=2), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return {key: value for key, value in trainable(model).items() if "right" in key}

    one, same, other = made(0), made(0), made(1)
    assert all(torch.equal(one[key], same[key]) and not torch.equal(one[key], other[key]) for key in one)
    assert not torch.equal(
        one["0.weight.terms.1.bands.LL1.right.weight"], one["1.weight.terms.1.bands.LL1.right.weight"]
    )
    assert len({value.flatten()[0].item() for value in one.values()}) == len(one)


@pytest.mark.parametrize("name", ["lora", "wara", "wara_feature"])
def test_conv1d_of_transformers(name: str) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    before = model(IDS).logits
    factorize_(model, recipes.get(name)(rank=4))
    assert torch.equal(model(IDS).logits, before) and len(adapted(model)) == 8
    assert model.transformer.h[0].attn.c_attn.weight.shape == (144, 48)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.b = nn.Conv2d(16, 24, 3, padding=1, padding_mode="reflect")
        self.c = nn.Conv2d(24, 16, (3, 5), padding="same", dilation=2, bias=False)
        self.d = nn.Linear(16, 10)
        self.e = nn.Embedding(30, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x)).relu()).relu().mean((2, 3)) + self.e(torch.arange(len(x))))


@pytest.mark.parametrize("conv", ["channel", "spatial"])
@pytest.mark.parametrize("name", ["lora", "wara"])
def test_convolutions_and_embeddings(name: str, conv: str) -> None:
    model, x = Images(), torch.randn(4, 3, 20, 20)
    before = model(x)
    factorize_(model, recipes.get(name)(rank=2), targets=["*"], conv=conv)
    assert torch.equal(model(x), before) and len(adapted(model)) == 5
    step(model, lambda: model(x).square().mean())
    dense = rankfold.to_dense_(copy.deepcopy(model))
    assert not torch.allclose(model(x), before)
    torch.testing.assert_close(dense(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["svd", "rocket", "basis_sharing"])
def test_beside_layers_that_are_compressed(base: str, tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_llama()
    factorize_(model, recipes.get(base), budget=0.7, batches=IDS)
    before = model(IDS).logits
    frozen = {key: value.clone() for key, value in model.state_dict().items()}
    report = factorize_(model, recipes.wara(rank=2))
    assert torch.equal(model(IDS).logits, before)
    assert len(adapted(model)) == 14 == len(report.layers)
    kinds = {parts(host)[0].kind for host in adapted(model).values()}
    assert kinds == {"sparse_code"} if base == "rocket" else "low_rank" in kinds
    if base == "svd":
        assert all(row.bytes_before < 4 * row.shape[0] * row.shape[1] for row in report.layers)
    assert not [row.name for row in report.skipped if "_proj" in row.name]
    step(model, lambda: model(IDS, labels=IDS).loss)
    state = model.state_dict()
    assert all(
        torch.equal(state.get(key, state.get(key.replace(".weight.", ".weight.terms.0."))), value)
        for key, value in frozen.items()
    )
    rankfold.save(model, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert set(trainable(freeze_(again))) == set(trainable(model))


def test_pissa_beside_a_compressed_layer_is_refused() -> None:
    """Its principal part comes out of the weight, and the factors that stand there cannot give it."""
    model, x = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 20)), torch.randn(4, 30)
    factorize_(model, recipes.svd, budget=0.5, targets=["0"])
    before = model(x)
    with pytest.raises(ValueError, match=r"layer '0' is compressed \(kind 'low_rank'\).*use recipes\.lora"):
        factorize_(model, recipes.pissa(rank=2))
    assert torch.equal(model(x), before) and all(p.requires_grad for p in model.parameters())
    factorize_(model, recipes.pissa(rank=2), skip=["0"])
    torch.testing.assert_close(model(x), before)


def test_a_compressed_convolution() -> None:
    model, x = Images(), torch.randn(4, 3, 20, 20)
    factorize_(model, recipes.svd, budget=0.6, targets=["b", "c"])
    before = model(x)
    factorize_(model, recipes.lora(rank=2), targets=["b", "c", "d"])
    assert torch.equal(model(x), before)
    factorize_(gradient := Images(), recipes.svd, budget=0.6, targets=["b", "c"], conv="spatial")
    before = gradient(x)
    factorize_(gradient, recipes.wara(rank=2), targets=["b", "c"])
    assert torch.equal(gradient(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_model_loads_with_its_dtypes(
    dtype: torch.dtype, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_llama().to(dtype)
    factorize_(model, recipes.wara(rank=2, wavelet="db2"), targets=["*.q_proj"])
    step(model, lambda: model(IDS, labels=IDS).loss)
    rankfold.save(model, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    for host in adapted(again).values():
        (base, terms) = parts(host)
        assert base.dtype == dtype and isinstance(terms[0], Wavelet) and terms[0].dtype == torch.float32
    mine, theirs = (
        model.state_dict(),
        again.state_dict(),
    )  # not the logits: `.to` has rounded the rotations too
    assert mine.keys() == theirs.keys()
    assert all(mine[key].dtype == theirs[key].dtype and torch.equal(mine[key], theirs[key]) for key in mine)
    assert set(trainable(freeze_(again))) == set(trainable(model))


def test_a_plain_module_saves_and_loads(tmp_path: Path) -> None:
    model, x = Images().bfloat16(), torch.randn(2, 3, 20, 20).bfloat16()
    untouched = copy.deepcopy(model)
    factorize_(model, recipes.wara(rank=2), targets=["b", "d"])
    step(model, lambda: model(x).float().square().mean())
    rankfold.save(model, tmp_path / "model")
    again = rankfold.load_(untouched, tmp_path / "model")
    assert torch.equal(again(x), model(x))
    assert parts(adapted(again)["d"])[1][0].dtype == torch.float32


def test_tied_weights_share_one_adapter_or_are_refused(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    before = model(IDS).logits
    with pytest.raises(ValueError, match=r"'lm_head' shares its weight with 'model\.embed_tokens'"):
        factorize_(model, recipes.wara(rank=2), targets=["lm_head"])
    factorize_(model, recipes.wara(rank=2), targets=["lm_head", "*.embed_tokens"])
    assert torch.equal(model(IDS).logits, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    held = model.lm_head.weight
    assert isinstance(held, Sum) and isinstance(held.base, Dense)
    assert sum(p.numel() for p in trainable(model).values()) == held.added[0].params
    again = tiny_llama(tie_word_embeddings=True)
    factorize_(again, recipes.svd, budget=0.5, targets=["lm_head", "*.embed_tokens"])
    with pytest.raises(ValueError, match="shares its weight"):
        factorize_(again, recipes.lora(rank=2), targets=["lm_head"])
    factorize_(again, recipes.lora(rank=2), targets=["lm_head", "*.embed_tokens"])
    assert again.lm_head.weight is again.model.embed_tokens.weight
