"""Save, load, verify, make dense: files that a stranger can load, written whole or not at all.

A transformers model becomes an ordinary folder of its own `save_pretrained`: safetensors, and config.json
with the manifest (see `rankfold.manifest`) as `quantization_config`. Any other `nn.Module` becomes
`rankfold.json` (the manifest) beside one `model.safetensors`. A folder is written whole or not at all
(`rankfold.atomic`): an interrupt or a full disk leaves the old one as it was. Nothing is pickled.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankfold.atomic import check_folder, writing
from rankfold.attention import packed_attention, unpack_attention_
from rankfold.checkpoint_report import PAGE as PAGE
from rankfold.checkpoint_report import write_report as write_report
from rankfold.hosts import hosts
from rankfold.layers import replace_, skeleton
from rankfold.manifest import (
    check_manifest,
    described,
    manifest,
    rebuild_,
    recipe_of,
    stamp_,
    tokens_of,
    unstamp_,
    validate,
)
from rankfold.report import Report
from rankfold.token_layer import check_dense

MANIFEST, WEIGHTS = "rankfold.json", "model.safetensors"


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    report: Report | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    max_shard_size: str | int = "5GB",
) -> Path:
    """Write a factorized (or dense) model to `folder`, whole or not at all, and return its path.

    `report` adds rankfold_report.json and report.html, and `tokenizer` what the tokenizer saves. Sharding
    applies to transformers models. Raises ValueError where the folder exists and is not empty, unless
    `overwrite`, and where the disk has less room than the weights need; OSError where writing fails, with the
    old folder still in place.
    """
    folder = check_folder(folder, overwrite)
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"{type(model).__name__} has adapters on it: fold them in with merge_and_unload() and save the "
            "result, or save the adapters alone with their own save_pretrained"
        )
    need = sum(t.numel() * t.element_size() for t in _unshared(model.state_dict()).values())
    free = shutil.disk_usage(_existing(folder)).free
    if free < need:
        raise ValueError(
            f"{folder}: the weights need {need:,} bytes, the disk has {free:,}. Free some room or write "
            f"elsewhere"
        )
    with writing(folder) as beside:
        if hasattr(model, "save_pretrained"):
            recipe = report.recipe if report else recipe_of(model)
            if described(model):
                stamp_(model, recipe)
            model.save_pretrained(beside, max_shard_size=max_shard_size)  # type: ignore[operator]
        else:
            (beside / MANIFEST).write_text(
                json.dumps(manifest(model, report.recipe if report else None), indent=2)
            )
            tensors = {k: t.detach().contiguous().cpu() for k, t in _unshared(model.state_dict()).items()}
            save_file(tensors, beside / WEIGHTS, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        if report is not None:
            write_report(report, beside)
    return folder


def load_(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Load a folder that `save` wrote from a plain module into `model`, a dense model of the same
    architecture, in place. An `nn.MultiheadAttention` that was unpacked in the folder is unpacked here too.

    (A transformers folder loads through its own `from_pretrained`.) Raises ValueError for a damaged manifest
    and for tensors that are missing, left over, or of another shape or dtype class; the model is then
    unchanged.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        hint = (
            "it is a transformers folder: use from_pretrained"
            if (folder / "config.json").is_file()
            else "nothing to load"
        )
        raise ValueError(f"{folder} has no {MANIFEST}; {hint}")
    try:
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / MANIFEST} is not JSON: {error}") from error
    structures, tokens = check_manifest(data, MANIFEST), tokens_of(data, MANIFEST)
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError("the model is on the meta device: build it on a real one, and load into that")
    try:
        state = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS} cannot be read: {error}") from error
    # An attention of torch, if it was unpacked into four layers when the folder was written.
    unpacked = {key.partition(".q_proj.")[0] for key in state if ".q_proj." in key}
    packed = [name for name in packed_attention(model) if name not in unpacked]
    meta = skeleton(model)
    unpack_attention_(meta, skip=packed)
    rebuild_(meta, structures, tokens)
    expected = meta.state_dict(keep_vars=True)
    # A shared tensor is stored under one of its names.
    stored = {id(expected[key]): key for key in state if key in expected}
    missing = sorted(key for key, tensor in expected.items() if id(tensor) not in stored)
    extra = sorted(set(state) - set(expected))
    if missing or extra:
        raise ValueError(f"{folder / WEIGHTS}: missing tensors {missing[:4]}, left-over tensors {extra[:4]}")
    for key, tensor in state.items():
        if (
            tensor.shape != expected[key].shape
            or tensor.is_floating_point() != expected[key].is_floating_point()
        ):
            raise ValueError(
                f"{folder / WEIGHTS}: tensor {key!r} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"the model expects {expected[key].dtype} {tuple(expected[key].shape)}"
            )
    state = {key: state[stored[id(tensor)]] for key, tensor in expected.items()}
    try:  # on the skeleton first: what a structure refuses must not have touched the model
        meta.load_state_dict(state, assign=True)
        validate(meta)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{folder / WEIGHTS}: {error}") from error
    unpack_attention_(model, skip=packed)
    names = dict(model.named_modules())  # a layer inside a TokenWara, "fc.host", is "fc" before that is there
    held: Any = {name: names.get(name) or names[name.removesuffix(".host")] for name in structures}
    places = {name: module.weight.device for name, module in held.items()}
    rebuild_(model, structures, tokens)
    _allocate_(model, places)
    model.load_state_dict(state)
    return model


def _allocate_(model: nn.Module, places: Mapping[str, Any]) -> None:
    """Memory for the structures that are on meta, and one piece of it for a tensor that several hold."""
    made: dict[int, Tensor] = {}
    for name, place in places.items():
        for module in model.get_submodule(name).weight.modules():  # type: ignore[union-attr]
            for held in (module._parameters, module._buffers):
                for key, tensor in held.items():
                    if tensor is not None and tensor.is_meta:
                        if id(tensor) not in made:
                            made[id(tensor)] = _empty(tensor, place)
                        held[key] = made[id(tensor)]  # type: ignore[assignment]


def to_dense_(model: nn.Module) -> nn.Module:
    """Replace every structure by the ordinary dense layer of the same function: a checkpoint that needs no
    rankfold. Raises ValueError for a model with a TokenWara, which is no layer of anything else."""
    check_dense(model)
    done: dict[int, nn.Parameter] = {}
    for name, host in hosts(model).items():
        dense = host.to_dense()
        shared = done.setdefault(id(host.weight), dense.weight)  # type: ignore[arg-type]
        if shared.shape == dense.weight.shape:  # type: ignore[union-attr]
            dense.weight = shared
        replace_(model, name, dense)
    unstamp_(model)
    return model


def verify(
    model: nn.Module, folder: str | os.PathLike[str], inputs: Mapping[str, Any] | Tensor | None = None
) -> None:
    """Compare what `save` wrote with the model, every tensor bit for bit.

    A transformers model is reloaded through `from_pretrained` and, given `inputs`, its outputs are compared
    too, up to rounding. Raises ValueError naming the first tensor that differs.
    """
    folder = Path(folder)
    stored = _stored(folder)
    for key, tensor in _unshared(model.state_dict()).items():
        if key in stored:
            with safe_open(stored[key], framework="pt") as handle:
                same = _same(handle.get_tensor(key), tensor.detach().cpu())
            if not same:
                raise ValueError(f"{folder}: tensor {key!r} on disk differs from the model's")
    if not hasattr(model, "save_pretrained"):
        other = sorted(set(_unshared(model.state_dict())) ^ set(stored))
        if other:
            raise ValueError(f"{folder}: tensors {other[:4]} are not in both the folder and the model")
        return
    importlib.import_module("rankfold.hf")  # also where autoload is off
    again = type(model).from_pretrained(folder, dtype="auto", device_map={"": _device(model)})  # type: ignore[attr-defined]
    mine, theirs = model.state_dict(), again.state_dict()
    if set(mine) != set(theirs):
        raise ValueError(
            f"{folder}: the reloaded model has other tensors: {sorted(set(mine) ^ set(theirs))[:4]}"
        )
    for key, tensor in mine.items():
        if not _same(tensor, theirs[key]):
            raise ValueError(f"{folder}: tensor {key!r} differs after reloading")
    if inputs is not None:
        was = model.training
        with torch.no_grad():
            pair = [
                m.eval()(**inputs) if isinstance(inputs, Mapping) else m.eval()(inputs)
                for m in (model, again)
            ]
        model.train(was)
        one, two = (getattr(output, "logits", output) for output in pair)
        one, two = (output if isinstance(output, Tensor) else output[0] for output in (one, two))
        # Of equal tensors at other addresses the product of a single row may round otherwise.
        rounding = 16 * torch.finfo(one.dtype).eps * one.abs().max()
        if not torch.equal(one, two) and not (one - two).abs().max() <= rounding:
            raise ValueError(
                f"{folder}: outputs differ after reloading, by up to {float((one - two).abs().max()):.3g}"
            )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the second names of shared tensors: safetensors refuses them, and the model
    re-ties them."""
    seen: set[tuple[Any, ...]] = set()
    kept = {}
    for key, tensor in state.items():
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() == 0 or tensor.is_meta or identity not in seen:
            kept[key] = tensor
            seen.add(identity)
    return kept


def _empty(tensor: Tensor, device: Any) -> Tensor:
    empty = torch.empty_like(tensor, device=device)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _stored(folder: Path) -> dict[str, Path]:
    stored = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            stored |= dict.fromkeys(handle.keys(), file)
    return stored


def _same(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one, two)


def _device(model: nn.Module) -> Any:
    return next(model.parameters()).device
