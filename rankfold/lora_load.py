"""A LoRA folder of PEFT as adapters of a model: the inverse of `save_as_lora`.

It goes on ordinary layers and on compressed ones alike: a LoRA that was trained on the dense model lies
beside the factors of the small one, and `merge_` makes one pair of them, of both ranks or of the old one.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rankfold.adapter_file import place_of, put_
from rankfold.adapters import check_unmixed
from rankfold.layers import Layer
from rankfold.lora import CONFIG, PREFIX, WEIGHTS
from rankfold.manifest import stamp_
from rankfold.structure import Structure
from rankfold.structures import LowRank

SUFFIXES = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
# These take their start out of the base: what is saved goes with a base that they changed.
MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga")


def load_lora_(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Put the LoRA of `folder` on `model`, in place, and return it: frozen but for the adapters and the
    modules that were saved with them.

    Adapters that these layers carry already are replaced. Raises ValueError for a folder that holds no LoRA,
    another kind of adapter or an option that is no plain ΔW = scale · B A (DoRA, biases), tensors that are
    missing or do not fit; the model is then unchanged.
    """
    folder = Path(folder)
    config, state = _read(folder)
    pairs, others = _pairs(state, folder)
    if not pairs:
        raise ValueError(f"{folder / WEIGHTS} has no tensors of a LoRA")
    terms: dict[str, list[Structure]] = {}
    for name, pair in pairs.items():
        try:
            terms[name] = [_term(name, pair, config)]
        except ValueError as error:
            raise ValueError(f"{folder}: layer {name!r}: {error}") from error
    places = {name: place_of(model, name, made[0].shape) for name, made in terms.items()}
    _check_untied(places)
    check_unmixed(model, takes=False)
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in others.items():
        if name not in held or held[name].shape != tensor.shape:
            shape = tuple(held[name].shape) if name in held else "not there"
            raise ValueError(
                f"{folder}: tensor {name!r} is {tuple(tensor.shape)} in the file and {shape} in the model"
            )
    put_(model, {name: name for name in terms}, places, terms)
    model.requires_grad_(False)
    for made in terms.values():
        made[0].requires_grad_(True)
    with torch.no_grad():
        for name, tensor in others.items():
            held[name].copy_(tensor)
            if isinstance(held[name], nn.Parameter):
                held[name].requires_grad_(True)
    stamp_(model, {"name": "lora", "from": folder.name})
    return model


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has not both {CONFIG} and {WEIGHTS}: it is no LoRA folder of PEFT")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        state = load_file(folder / WEIGHTS)
    except (ValueError, RecursionError, SafetensorError, OSError) as error:
        raise ValueError(f"{folder} cannot be read: {error}") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise ValueError(f"{folder} holds a {kind} adapter, not a LoRA; open it with PEFT")
    init = str(config.get("init_lora_weights"))
    if init.startswith(MOVED):
        raise ValueError(
            f"{folder}: init_lora_weights={init!r} changed the base as well, and this adapter goes with "
            "that; save it with path_initial_model_for_weight_conversion"
        )
    for option in ("use_dora", "lora_bias", "target_parameters", "alora_invocation_tokens"):
        if config.get(option):
            raise ValueError(
                f"{folder}: {option}={config[option]!r} is more than ΔW = scale · B A; merge it with PEFT, "
                "and extract_lora_ the change"
            )
    return config, state


def _pairs(
    state: Mapping[str, Tensor], folder: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """({layer: its tensors by suffix}, the other tensors by name)."""
    pairs: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in state.items():
        suffix = next((suffix for suffix in SUFFIXES if key.endswith(f".{suffix}")), None)
        name = key.removeprefix(PREFIX)
        if suffix is not None:
            pairs.setdefault(name.removesuffix(f".{suffix}"), {})[suffix] = tensor
        elif "lora_" in name.rpartition(".")[2] or ".lora_" in name:
            raise ValueError(f"{folder / WEIGHTS}: tensor {key!r} is more than ΔW = scale · B A")
        else:
            others[name] = tensor
    return pairs, others


def _term(name: str, pair: Mapping[str, Tensor], config: Mapping[str, Any]) -> LowRank:
    if set(pair) not in ({*SUFFIXES[:2]}, {*SUFFIXES[2:]}):
        raise ValueError(f"it has {sorted(pair)} alone; a LoRA has two tensors")
    down, up = (pair[key] for key in sorted(pair))
    if SUFFIXES[2] in pair:  # an embedding: ΔW = (B A)ᵀ
        left, right = down.mT, up.mT
    else:
        left, right = up.flatten(1), down.flatten(1)
    if (
        left.dim() != 2
        or right.dim() != 2
        or left.shape[1] != right.shape[0]
        or (up.dim() == 4 and up[0, 0].numel() > 1)
    ):
        raise ValueError(f"factors of shapes {tuple(up.shape)} and {tuple(down.shape)} do not go together")
    rank = left.shape[1]
    alpha = _of(name, config.get("alpha_pattern"), config.get("lora_alpha"))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    for tensor in (left, right):
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ValueError(f"a factor of dtype {tensor.dtype} is not finite throughout")
    wide = torch.promote_types(left.dtype, torch.float32)
    return LowRank.of(left.to(wide), right.to(wide), scale)


def _of(name: str, pattern: Any, usual: Any) -> float:
    """PEFT's reading of `alpha_pattern`: the first key that is the end of a layer's name."""
    found = next((v for k, v in (pattern or {}).items() if re.match(rf"(.*\.)?({k})$", name)), usual)
    if not isinstance(found, int | float) or isinstance(found, bool) or not math.isfinite(found) or not found:
        raise ValueError(f"lora_alpha={found!r} must be a number other than 0")
    return float(found)


def _check_untied(places: Mapping[str, Any]) -> None:
    owners: dict[int, str] = {}
    for name, place in places.items():
        weight = place.tensor if isinstance(place, Layer) else place.weight
        other = owners.setdefault(id(weight), name)
        if other != name:
            raise ValueError(
                f"layers {other!r} and {name!r} share one weight, and the LoRA has an adapter for each; "
                "untie them first"
            )
