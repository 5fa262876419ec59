"""Adapters as a PEFT LoRA folder, and back: what any LoRA server opens.

    ΔW = scale · left right            ->   lora_B = left, lora_A = right, lora_alpha = scale · rank
    wavelet, rank r in each of 4 bands ->   rank 4r, exact (`rankfold.low_rank_form`)

Where layers differ in rank or scale, the scale goes into lora_B and alpha = r everywhere: a server that knows
no `rank_pattern` then computes the same. PEFT itself is not needed, neither to write nor to read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rankfold.adapted import adapted, kept, parts, taken
from rankfold.atomic import check_folder, writing
from rankfold.batches import is_causal
from rankfold.hosts import Conv2d, Embedding, Host, Linear
from rankfold.low_rank_form import factors_of, thin
from rankfold.structures import LowRank
from rankfold.token_layer import token_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def save_as_lora(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the adapters of `model` as a LoRA of PEFT and return the folder's path.

    base  hub id or folder of the base model, for the config; None: what the model was loaded from,
          unless that is a folder of ours, which has adapters or factors in it and is no base

    It opens on the base as it was before the adapters: `PeftModel.from_pretrained(base, folder)`. Where that
    is not an ordinary layer but a compressed one, on what `to_dense_` makes of it. Whole modules that train
    too (a head) become `modules_to_save`. Raises ValueError, naming the layer, for an adapter that is no
    product of two thin matrices, or was taken out of the weight (PiSSA), for a convolution read in the
    spatial way, and for a trained tensor that LoRA has no place for.
    """
    folder = check_folder(folder, overwrite)
    found = adapted(model)
    if (tokens := next(iter(token_layers(model)), None)) is not None:
        raise ValueError(
            f"layer {tokens!r} is a TokenWara, which changes activations: no LoRA does the same; use "
            "save_adapter"
        )
    if (name := taken(model)) is not None:
        raise ValueError(
            f"layer {name!r}: its adapter was taken out of the weight (PiSSA), so it is no LoRA for the base "
            "as it was; merge_ it, and extract_lora_(base, model, rank=…) at twice its rank, which is exact"
        )
    modules = _modules(model, found)
    pieces = {name: _piece(name, host) for name, host in found.items()}
    tensors: dict[str, Tensor] = {}
    same = len({(rank, scale) for _, _, rank, scale in pieces.values()}) == 1
    rank, scale = next((rank, scale) for _, _, rank, scale in pieces.values())
    same = same and float(scale * rank).is_integer()
    for name, (left, right, _, factor) in pieces.items():
        up = left if same or factor == 1 else (left.double() * factor).to(left.dtype)
        tensors |= _laid(name, found[name], up, right)
    for module in modules:
        for key, tensor in model.get_submodule(module).state_dict().items():
            tensors[f"{PREFIX}{module}.{key}"] = tensor
    largest = max(rank for _, _, rank, _ in pieces.values())
    ranks = {_unique(name, found): rank for name, (_, _, rank, _) in pieces.items() if rank != largest}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if is_causal(model) else None,
        "base_model_name_or_path": base or _name(model),
        "r": largest,
        "lora_alpha": round(scale * rank) if same else largest,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": _targets(model, found),
        "modules_to_save": modules or None,
        "fan_in_fan_out": any(isinstance(h, Linear) and h.transposed for h in found.values()),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    with writing(folder) as beside:
        save_file(
            {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()},
            beside / WEIGHTS,
            metadata={"format": "pt"},
        )
        (beside / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def _name(model: nn.Module) -> str | None:
    loaded = getattr(model, "hf_quantizer", None) is not None  # with structures in it
    return None if loaded else getattr(model, "name_or_path", None) or None


def _piece(name: str, host: Host) -> tuple[Tensor, Tensor, int, float]:
    """(left, right, rank, scale) of a layer's adapter: its own factors where it has just two, untouched."""
    if isinstance(host, Conv2d) and host.spatial:
        raise ValueError(
            f"layer {name!r}: its kernel is read as a matrix in the spatial way, which LoRA does not know; "
            "adapt it with conv='channel', or merge_ the adapter"
        )
    if isinstance(host, Conv2d):
        for option, usual in (("padding_mode", "zeros"), ("dilation", (1, 1))):
            if host.geometry[option] != usual:
                raise ValueError(
                    f"layer {name!r}: PEFT's LoRA convolves with {option}={usual!r}, the layer with "
                    f"{host.geometry[option]!r}; merge_ the adapter"
                )
    terms = parts(host)[1]
    (first, *more) = terms
    if isinstance(first, LowRank) and not more:
        return first.left.weight.detach(), first.right.weight.detach(), first.rank, first.scale
    pairs = [factors_of(term) for term in terms]
    if any(pair is None for pair in pairs):
        kinds = ", ".join(term.kind for term, pair in zip(terms, pairs, strict=True) if pair is None)
        raise ValueError(
            f"layer {name!r}: its adapter ({kinds}) is no product of two thin matrices, as a LoRA must be; "
            "merge_ it, and extract_lora_ the change at a rank of your choice"
        )
    held = [pair for pair in pairs if pair is not None]
    left, right = thin(torch.cat([left for left, _ in held], 1), torch.cat([right for _, right in held]))
    dtype = torch.promote_types(first.dtype, torch.float32)
    return left.to(dtype), right.to(dtype), left.shape[1], 1.0


def _laid(name: str, host: Host, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """The two tensors under PEFT's names and in its layouts."""
    if isinstance(host, Embedding):
        return {
            f"{PREFIX}{name}.lora_embedding_A": left.mT,
            f"{PREFIX}{name}.lora_embedding_B": right.mT,
        }
    if isinstance(host, Conv2d):
        left, right = left[:, :, None, None], right.unflatten(1, (host.in_channels, *host.kernel_size))  # type: ignore[attr-defined]
    return {f"{PREFIX}{name}.lora_A.weight": right, f"{PREFIX}{name}.lora_B.weight": left}


def _modules(model: nn.Module, found: Mapping[str, Host]) -> list[str]:
    """The modules outside the adapted layers that train as a whole. Raises ValueError for any other trained
    tensor."""
    names, modules = kept(model), []
    for name, module in model.named_modules():
        own = [f"{name}.{key}" for key, _ in module.named_parameters()]
        above = any(name.startswith(f"{other}.") for other in modules)
        if name and own and not above and all(key in names for key in own):
            modules.append(name)
    left = [n for n in names if not any(n.startswith(f"{module}.") for module in modules)]
    inside = [n for n in left if any(n.startswith(f"{layer}.") for layer in found)]
    if left:
        what = "the bias of an adapted layer" if inside else "no whole module"
        raise ValueError(
            f"tensor {left[0]!r} trains beside the adapters and is {what}, which a LoRA folder has no place "
            "for; freeze it, or use save_adapter"
        )
    return modules


def _targets(model: nn.Module, found: Mapping[str, Host]) -> list[str]:
    """`target_modules`: last names ("q_proj") where they mean just the adapted layers, else full names."""
    last = {name.rpartition(".")[2] for name in found}
    means = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    inside = tuple(f"{name}." for name in found)
    if {name for name in means if not name.startswith(inside)} == set(found):
        return sorted(last)
    for name in found:
        other = next((o for o, _ in model.named_modules() if o.endswith(f".{name}") and o not in found), None)
        if other is not None:
            raise ValueError(
                f"PEFT cannot tell layer {name!r} from {other!r}, whose name ends in the same way"
            )
    return sorted(found)


def _unique(name: str, found: Mapping[str, Host]) -> str:
    """A key of `rank_pattern`, which PEFT reads as the end of a name."""
    return f"^{name}" if any(other.endswith(f".{name}") for other in found) else name
