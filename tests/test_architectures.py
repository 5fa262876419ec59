"""Families of models, each as a tiny random one: factorized, saved, reloaded, the same to the last bit.

Nothing in rankfold knows their names; what is checked is that it needs none.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import rankfold
from rankfold import hosts, recipes

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
IMAGES = {"image_size": 16, "patch_size": 4}


def words(labels: bool = False) -> dict[str, Tensor]:
    ids = torch.randint(4, 96, (4, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids} | ({"labels": ids} if labels else {})


def pictures() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def llama() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=2)), words()


def gpt2() -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)), words()


def bert() -> Any:
    return hf.BertForSequenceClassification(hf.BertConfig(**SMALL)), words()


def t5() -> Any:
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0)), words(labels=True)


def vit() -> Any:
    config = hf.ViTConfig(**{k: v for k, v in SMALL.items() if k != "vocab_size"}, **IMAGES)
    return hf.ViTForImageClassification(config), pictures()


def mixtral() -> Any:
    config = hf.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
    return hf.MixtralForCausalLM(config), words()


def mamba() -> Any:
    config = hf.MambaConfig(
        hidden_size=32, num_hidden_layers=2, vocab_size=96, state_size=8, time_step_rank=8
    )
    return hf.MambaForCausalLM(config), words()


def whisper() -> Any:
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in SIDE.items()}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = hf.WhisperConfig(
        d_model=32,
        vocab_size=96,
        num_mel_bins=8,
        max_source_positions=8,
        max_target_positions=16,
        **sides,
        **tokens,
    )
    sound = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(1))
    return hf.WhisperForConditionalGeneration(config), {"input_features": sound, **words(labels=True)}


SIDE = {"layers": 1, "attention_heads": 4, "ffn_dim": 64}


def llava() -> Any:
    vision = hf.CLIPVisionConfig(**{k: v for k, v in SMALL.items() if k != "vocab_size"}, **IMAGES)
    text = hf.LlamaConfig(**SMALL, num_key_value_heads=2)
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text)), words()


FAMILIES = [llama, gpt2, bert, t5, vit, mixtral, mamba]
RARER = [whisper, llava]  # names of tensors in the file differ from those in the model


def made(family: Callable[[], Any]) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, batch = family()
    return model.eval(), {
        k: v for k, v in batch.items() if not (k == "input_ids" and "input_features" in batch)
    }


def run(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def round_trip(model: Any, batch: dict[str, Tensor], folder: Path, report: Any = None) -> Any:
    """Save, verify, and reload twice; the logits are equal every time."""
    rankfold.save(model, folder / "one", report=report)
    rankfold.verify(model, folder / "one", batch)
    again = type(model).from_pretrained(folder / "one")
    again.save_pretrained(folder / "two")
    third = type(model).from_pretrained(folder / "two")
    for other in (again, third):
        assert torch.equal(run(other, batch), run(model, batch))
        assert hosts.hosts(other).keys() == hosts.hosts(model).keys()
    return again


@pytest.mark.parametrize("recipe", ["svd", "svd_llm", "best"])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_round_trips(family: Callable[[], Any], recipe: str, tmp_path: Path) -> None:
    model, batch = made(family)
    dense = run(model, batch)
    report = rankfold.factorize_(model, getattr(recipes, recipe), budget=0.7, batches=[batch])
    assert 0.67 < report.reached <= 0.7
    assert hosts.hosts(model)
    assert not torch.equal(run(model, batch), dense)
    round_trip(model, batch, tmp_path, report)
    # Every matrix is accounted for: factorized, or named with the reason why not.
    named = {row.name + ".weight" for row in report.layers} | {row.name for row in report.skipped}
    fresh, _ = made(family)
    assert {name for name, p in fresh.named_parameters() if p.dim() >= 2} <= named
    assert all(row.reason for row in report.skipped)


@pytest.mark.parametrize("family", [llama, gpt2, bert, t5, vit])
def test_family_round_trips_by_kfac(family: Callable[[], Any], tmp_path: Path) -> None:
    model, batch = made(family)
    rankfold.factorize_(model, recipes.kfac, budget=0.7, batches=[batch])
    round_trip(model, batch, tmp_path)


@pytest.mark.parametrize("family", FAMILIES + RARER)
def test_everything_factorized_round_trips(family: Callable[[], Any], tmp_path: Path) -> None:
    """Tables and heads too, tied or not, of encoders and decoders."""
    model, batch = made(family)
    rankfold.factorize_(model, recipes.svd, budget=0.7, targets=["*"])
    again = round_trip(model, batch, tmp_path)
    mine, theirs = (len({id(h.weight) for h in hosts.hosts(m).values()}) for m in (model, again))
    assert mine == theirs, "layers that share a matrix share it after reloading"


@pytest.mark.parametrize("family", RARER)
def test_rarer_families_round_trip(family: Callable[[], Any], tmp_path: Path) -> None:
    model, batch = made(family)
    report = rankfold.factorize_(model, recipes.best, budget=0.7, batches=[batch])
    round_trip(model, batch, tmp_path, report)


@pytest.mark.parametrize("family", FAMILIES + RARER)
def test_dense_again_is_an_ordinary_model(family: Callable[[], Any], tmp_path: Path) -> None:
    model, batch = made(family)
    kinds = {name: type(module) for name, module in model.named_modules()}
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    rankfold.factorize_(model, recipes.svd, budget=0.7, targets=["*"])
    expected = run(model, batch)
    rankfold.to_dense_(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == shapes
    torch.testing.assert_close(run(model, batch), expected, atol=1e-4, rtol=1e-3)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(run(type(model).from_pretrained(tmp_path / "dense"), batch), run(model, batch))


# What is particular to one of them.


def test_stacks_of_experts_stay_dense_and_are_reported() -> None:
    model, batch = made(mixtral)
    report = rankfold.factorize_(model, recipes.svd_llm, budget=0.7, batches=[batch])
    experts = {row.name: row for row in report.skipped if ".experts." in row.name}
    assert set(experts) == {
        f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")
    }
    assert all("experts" in row.reason and len(row.shape) == 3 for row in experts.values())
    assert any(row.name.endswith("mlp.gate.weight") and "TopKRouter" in row.reason for row in report.skipped)
    assert {row.type for row in report.layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_encoder_decoder_calibrates_with_labels() -> None:
    model, batch = made(t5)
    report = rankfold.factorize_(model, recipes.best, budget=0.7, batches=[batch])
    assert {row.name.split(".")[0] for row in report.layers} == {"encoder", "decoder"}
    assert not [row.note for row in report.layers if "never ran" in row.note]
    assert all(row.error > 0 for row in report.layers if not row.dense)


def test_convolution_of_patches_is_one_of_the_layers() -> None:
    model, batch = made(vit)
    report = rankfold.factorize_(model, recipes.svd_llm, budget=0.7, batches=[batch])
    assert [row.shape for row in report.layers if row.host == "Conv2d"] == [(32, 48)]


def test_a_weight_that_is_read_and_never_called_stays_dense() -> None:
    """Mamba multiplies by `dt_proj.weight` itself. Calibration sees that the layer never ran."""
    model, batch = made(mamba)
    report = rankfold.factorize_(model, recipes.svd_llm, budget=0.7, batches=[batch])
    notes = {row.name: row.note for row in report.layers if row.name.endswith("dt_proj")}
    assert list(notes.values()) == ["stays dense: it never ran on the calibration data"] * 2
    assert type(model.backbone.layers[0].mixer.dt_proj) is nn.Linear


def test_a_weight_that_is_read_and_never_called_is_right_all_the_same() -> None:
    """Without data nothing can be seen, so it is factorized; whoever reads its weight gets the matrix."""
    model, batch = made(mamba)
    rankfold.factorize_(model, recipes.svd, budget=0.7)
    assert isinstance(model.backbone.layers[0].mixer.dt_proj, hosts.Linear)
    dense = rankfold.to_dense_(copy.deepcopy(model))
    torch.testing.assert_close(run(model, batch), run(dense, batch), atol=1e-5, rtol=1e-4)
    model(**batch).logits.sum().backward()
    assert model.backbone.layers[0].mixer.dt_proj.weight.left.weight.grad is not None


def test_torch_reads_a_structure_as_its_matrix() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()  # its fast path reads the weights
    model = nn.Sequential(layer)
    rankfold.factorize_(model, recipes.svd, budget=0.7)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        found, grad_free = model(x), rankfold.to_dense_(copy.deepcopy(model))(x)
    torch.testing.assert_close(found, grad_free, atol=1e-5, rtol=1e-4)


# No name is sniffed.


class PlumeConfig(hf.LlamaConfig):
    model_type = "plume"


class PlumeForGoodness(hf.LlamaForCausalLM):
    config_class = PlumeConfig


def test_names_of_models_do_not_matter(tmp_path: Path) -> None:
    """The same weights under another class name and `model_type` give the same factors and report."""
    torch.manual_seed(0)
    named = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=2)).eval()
    other = PlumeForGoodness(PlumeConfig(**SMALL, num_key_value_heads=2)).eval()
    other.load_state_dict(named.state_dict())
    batch = words()
    reports = []
    for model in (named, other):
        reports.append(rankfold.factorize_(model, recipes.best, budget=0.7, batches=[batch]).to_json())
    for report in reports:
        del report["timings"]
    assert reports[0] == reports[1]
    mine, theirs = named.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    round_trip(other, batch, tmp_path)
    assert json.loads((tmp_path / "one" / "config.json").read_text())["model_type"] == "plume"


@pytest.mark.parametrize("heads", [4, 2, 1], ids=["multi-head", "grouped", "multi-query"])
def test_attention_with_fewer_keys_than_queries(heads: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=heads)).eval()
    batch = words()
    report = rankfold.factorize_(model, recipes.best, budget=0.7, batches=[batch])
    assert {row.shape for row in report.layers if row.type == "k_proj"} == {(8 * heads, 32)}
    round_trip(model, batch, tmp_path)
