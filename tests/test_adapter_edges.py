"""Where adapters and conversions could be quietly wrong: ties, globs, dense layers, adapters on tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toy_adapters import logits, stir_

import rankfold
from rankfold import recipes
from rankfold.adapters import freeze_, trainable
from rankfold.convert import convert_
from rankfold.extract import extract_lora_
from rankfold.factorize import factorize_
from rankfold.hosts import hosts
from rankfold.lora import save_as_lora
from rankfold.lora_load import load_lora_
from rankfold.token_wavelet import token_wara_


@pytest.mark.parametrize("targets", [None, ["lm_head", "*.embed_tokens"]], ids=["outside", "selected"])
def test_weights_tied_in_the_base_alone_are_refused(
    targets: list[str] | None, tiny_llama: Callable[..., Any]
) -> None:
    """One of the two changes would be lost: the head has learned, and the base has no place for it."""
    base = tiny_llama(tie_word_embeddings=True)
    tuned = tiny_llama(tie_word_embeddings=False)
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.weight.mul_(1.1)
        tuned.model.embed_tokens.weight[0] += 1
        tuned.lm_head.weight[1] += 1
    before = logits(base)
    with pytest.raises(ValueError, match=r"lm_head.* are one weight in the base and differ in the tuned"):
        extract_lora_(base, tuned, rank=2, targets=targets)
    assert torch.equal(logits(base), before) and not hosts(base)
    with torch.no_grad():
        tuned.lm_head.weight.copy_(tuned.model.embed_tokens.weight)  # untied, and the same
    report = extract_lora_(base, tuned, rank=64, targets=targets, take=[] if targets else ["*embed_tokens*"])
    assert all(row.relative_error < 1e-5 for row in report.layers)
    if not targets:
        torch.testing.assert_close(logits(base), logits(tuned), atol=1e-5, rtol=1e-4)


def test_a_glob_of_frozen_weights_alone_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    factorize_(model, recipes.lora(rank=2), targets=["0"])
    with pytest.raises(ValueError, match=r"'0\.weight\.terms\.0\*' matches only weights under adapters"):
        freeze_(model, keep=["1.*", "0.weight.terms.0*"])
    assert set(trainable(model)) == {f"0.weight.terms.1.{side}.weight" for side in ("left", "right")}
    assert {"1.weight", "1.bias", "0.bias"} < set(trainable(freeze_(model, keep=["*"])))


def test_pissa_and_others_are_not_mixed(tmp_path: Path) -> None:
    """A saved model has one recipe, by which `save_as_lora` knows that its base is another."""

    def toy() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))

    for first, second in ((recipes.pissa, recipes.lora), (recipes.wara, recipes.pissa)):
        model = toy()
        factorize_(model, first(rank=2), targets=["0"])
        with pytest.raises(
            ValueError, match=r"layer '0' has an adapter already, and one of the two kinds is"
        ):
            factorize_(model, second(rank=2), targets=["1"])
        assert list(hosts(model)) == ["0"]
        factorize_(model, first(rank=2), targets=["1"])
    model, tuned = toy(), toy()
    factorize_(model, recipes.pissa(rank=2), targets=["0"])
    tuned[1].weight.data += 1
    with pytest.raises(ValueError, match="one of the two kinds is PiSSA"):
        extract_lora_(model, tuned, rank=2, targets=["1"])
    other = toy()
    factorize_(other, recipes.lora(rank=2), targets=["1"])
    save_as_lora(other, tmp_path)
    with pytest.raises(ValueError, match="one of the two kinds is PiSSA"):
        load_lora_(model, tmp_path)


def test_to_dense_leaves_ordinary_layers_alone() -> None:
    """Their parameters stay the very same: an optimizer may hold them."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    factorize_(model, recipes.svd, budget=0.5, targets=["0"])
    plain, x = model[1], torch.randn(3, 16)
    expected = model(x)
    report = convert_(model, "dense")
    assert model[1] is plain and [row.name for row in report.layers] == ["0"]
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(ValueError, match="every selected layer is dense already"):
        convert_(model, "dense")


def test_token_adapters_in_a_larger_module(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    """A transformers model inside a plain one: the manifest stands beside the weights, not in its config."""
    model, ids = nn.Sequential(tiny_llama()), torch.arange(48).view(2, 24)
    made = copy.deepcopy(model)
    token_wara_(made, ["0.model.layers.0.mlp.up_proj"], 2, leading=0, grid=(3, 8))
    stir_(made)
    again = rankfold.load_(model, rankfold.save(made, tmp_path / "model"))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, made(ids).logits)


def test_a_head_of_peft_comes_along(tiny_llama: Callable[..., Any]) -> None:
    """`modules_to_save` is what trained, and not what was there before."""
    peft = pytest.importorskip("peft")
    from rankfold.peft import WaraConfig, as_rankfold

    config = WaraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = stir_(peft.get_peft_model(tiny_llama(), config))
    expected = logits(model)
    inner = as_rankfold(model)
    torch.testing.assert_close(logits(inner), expected, atol=1e-6, rtol=1e-5)
