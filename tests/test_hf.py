"""Round trips through transformers: whatever way a folder is opened, the same numbers come out, and what
comes out is an ordinary model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

import rankfold
from rankfold import hosts
from rankfold.hf import RankfoldConfig

IDS = torch.arange(24).view(2, 12)
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS.to(next(model.parameters()).device)).logits


def factorized(model: Any, **options: Any) -> Any:
    rankfold.factorize_(model, rankfold.recipes.svd, **({"budget": 0.6} | options))
    return model.eval()


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Any]) -> Any:
    return factorized(tiny_llama())


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rankfold.save(model, tmp_path_factory.mktemp("hf") / "model")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "auto"},
        {"dtype": torch.float32, "low_cpu_mem_usage": True},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"attn_implementation": "eager"},
    ],
    ids=str,
)
def test_every_way_of_opening_gives_the_same_logits(options: Any, model: Any, folder: Path) -> None:
    again, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    if "attn_implementation" in options:
        torch.testing.assert_close(logits(again), logits(model))
    else:
        assert torch.equal(logits(again), logits(model))
    assert isinstance(again.model.layers[0].mlp.down_proj, hosts.Linear)
    assert again.num_parameters() == model.num_parameters()
    assert not again.is_quantized  # nothing is packed: nothing may be refused


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_opens_in_another_dtype(dtype: torch.dtype, model: Any, folder: Path) -> None:
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert {p.dtype for p in again.parameters()} == {dtype}
    mine = model.state_dict()
    assert all(torch.equal(mine[key].to(dtype), tensor) for key, tensor in again.state_dict().items())
    torch.testing.assert_close(logits(again).float(), logits(model), atol=0.1, rtol=0.1)


def test_offloads_to_disk(model: Any, folder: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    again = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    assert all(p.is_meta for p in again.model.layers[1].parameters())
    assert torch.equal(again(IDS).logits, logits(model))


def test_sharded_files(model: Any, tmp_path: Path) -> None:
    rankfold.save(model, tmp_path / "out", max_shard_size="40KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    rankfold.verify(model, tmp_path / "out", {"input_ids": IDS})


@pytest.mark.parametrize("targets", [None, ["*"]], ids=["tables dense", "tables factorized"])
def test_tied_embeddings_stay_tied(
    targets: list[str] | None, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    model = factorized(tiny_llama(tie_word_embeddings=True), targets=targets)
    rankfold.save(model, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as handle:
        names = [key for key in handle.keys() if "embed_tokens" in key or "lm_head" in key]
    assert len(names) == (1 if targets is None else 2)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.lm_head.weight is again.model.embed_tokens.weight or (
        again.lm_head.weight.left.weight is again.model.embed_tokens.weight.left.weight
    )
    assert torch.equal(logits(again), logits(model))
    rankfold.verify(model, tmp_path / "out")
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "twice")), logits(model))
    dense = rankfold.to_dense_(again)
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    dense.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), logits(dense))


def test_saving_what_was_loaded_changes_no_byte(model: Any, folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "twice")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "twice" / name).read_bytes() == (folder / name).read_bytes(), name
    rankfold.save(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "thrice")
    assert (tmp_path / "thrice" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_save_pretrained_alone_is_enough(
    model: Any, folder: Path, tmp_path: Path, tiny_llama: Callable[..., Any]
) -> None:
    """Neither rankfold.save nor a reload is needed between `factorize_` and transformers' own method."""
    factorized(tiny_llama()).save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), logits(model))
    written = json.loads((tmp_path / "plain" / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "rankfold" and written["version"] == 1
    assert written["recipe"]["name"] == "svd"
    assert len(written["structures"]) == 14
    assert written["structures"]["model.layers.0.mlp.down_proj"].keys() == {"kind", "shape", "rank"}


def test_a_reloaded_model_can_be_factorized_further(model: Any, folder: Path, tmp_path: Path) -> None:
    again = AutoModelForCausalLM.from_pretrained(folder)
    factorized(again, targets=["lm_head"], budget=0.5)
    rankfold.save(again, tmp_path / "out")
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(third.lm_head, hosts.Linear)
    assert torch.equal(logits(third), logits(again))
    assert len(third.config.quantization_config.structures) == 15


def test_casts_like_a_dense_model(model: Any, folder: Path) -> None:
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert {p.dtype for p in again.half().parameters()} == {torch.float16}
    assert {p.dtype for p in again.float().parameters()} == {torch.float32}
    assert {p.dtype for p in again.to(torch.bfloat16).parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in again.parameters())


def test_dequantize_gives_a_dense_model(model: Any, folder: Path, tmp_path: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    assert not rankfold.hosts.hosts(dense) and type(dense.model.layers[0].mlp.down_proj) is nn.Linear
    torch.testing.assert_close(logits(dense), logits(model), atol=1e-5, rtol=1e-4)
    assert torch.equal(logits(dense), logits(rankfold.to_dense_(copy.deepcopy(model))))
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), logits(dense))


# A checkpoint opened as another class.


def test_head_checkpoint_opens_as_the_bare_model(model: Any, folder: Path, tmp_path: Path) -> None:
    bare = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(bare(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    bare.save_pretrained(tmp_path / "bare")
    again = AutoModel.from_pretrained(tmp_path / "bare")
    with torch.no_grad():
        assert torch.equal(again(IDS).last_hidden_state, bare(IDS).last_hidden_state)


def test_bare_checkpoint_opens_with_a_new_head(
    tmp_path: Path, tiny_llama: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The head has no weights in the file: transformers initialises it and says so."""
    bare = factorized(tiny_llama().model)
    rankfold.save(bare, tmp_path / "bare")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "bare", output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    with torch.no_grad():
        assert torch.equal(again.model(IDS).last_hidden_state, bare(IDS).last_hidden_state)
    assert isinstance(again.model.layers[1].self_attn.q_proj, hosts.Linear)


def test_a_checkpoint_may_change_its_head(tmp_path: Path) -> None:
    """Masked language model with all its layers factorized, its head too -> classifier, and its pooler."""
    config = transformers.BertConfig(**SMALL, num_labels=3)
    model = factorized(transformers.BertForMaskedLM(config), targets=["*"])
    rankfold.save(model, tmp_path / "lm")
    again, info = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "lm", output_loading_info=True
    )
    new = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert set(info["missing_keys"]) == new
    with torch.no_grad():
        mine, theirs = (m.bert.encoder(m.bert.embeddings(IDS))[0] for m in (model, again.eval()))
    assert torch.equal(mine, theirs)
    rankfold.save(again, tmp_path / "classifier")
    bare = transformers.BertModel.from_pretrained(tmp_path / "classifier").eval()
    with torch.no_grad():
        assert torch.equal(bare(IDS).pooler_output, again.bert(IDS).pooler_output)


# Use.


@pytest.mark.parametrize("cache", [None, "static"])
def test_generates(cache: str | None, model: Any, folder: Path) -> None:
    again = AutoModelForCausalLM.from_pretrained(folder)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(IDS, **options)
    found = again.generate(IDS, cache_implementation=cache, disable_compile=True, **options)
    assert found.shape == (2, 18)
    assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [None, ["*"]], ids=["linears", "everything"])
def test_compiles_without_a_graph_break(targets: list[str] | None, tiny_llama: Callable[..., Any]) -> None:
    model = factorized(tiny_llama(), targets=targets)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits)
    compiled(IDS).logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.left.weight.grad is not None


# What is refused.


def test_a_dense_model_is_not_factorized_while_loading(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="factorize_"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=RankfoldConfig())


def test_another_quantizer_on_top_is_refused(folder: Path) -> None:
    other = transformers.GPTQConfig(bits=4)
    with pytest.raises(ValueError, match="RankfoldConfig but you are passing a GPTQConfig"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=other)


def test_pickled_weights_are_refused(model: Any, folder: Path, tmp_path: Path) -> None:
    config = (folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin.*never unpickles"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_quantizer_that_unpacked_its_weights_does_not_stay(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    """As after loading a GGUF file: dense weights, and a quantizer that refuses to save them."""
    from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

    model = tiny_llama()
    model.hf_quantizer = GgufHfQuantizer(transformers.GgufConfig())
    model.config.quantization_config = model.hf_quantizer.quantization_config
    model.is_quantized = True
    factorized(model).save_pretrained(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))
