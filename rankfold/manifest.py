"""The manifest: what config.json says of a factorized model, and the skeleton rebuilt from it.

    {"quant_method": "rankfold", "version": 1, "structures": {layer: spec, …}, "recipe": {…}}

A spec is that of `Structure.spec()`; a layer that shares another's matrix says {"same_as": other}. In a
transformers model the manifest is `config.quantization_config`, so that `save_pretrained` writes it;
elsewhere it is `rankfold.json`. A manifest read from a file is untrusted: names, shapes and sizes are checked
before anything is allocated.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import rankfold.structures  # noqa: F401  the kinds that a manifest may name
from rankfold.hosts import hosts
from rankfold.layers import Layer, replace_, why_not
from rankfold.structure import Structure, build

QUANT_METHOD = "rankfold"
VERSION = 1


def manifest(model: nn.Module, recipe: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The manifest of a model's hosts. `recipe` (JSON) is provenance and is not needed to load."""
    structures: dict[str, dict[str, Any]] = {}
    first: dict[int, str] = {}
    for name, host in hosts(model).items():
        owner = first.setdefault(id(host.weight), name)
        structures[name] = host.weight.spec() if owner == name else {"same_as": owner}
    body: dict[str, Any] = {"quant_method": QUANT_METHOD, "version": VERSION, "structures": structures}
    return body | ({"recipe": dict(recipe)} if recipe else {})


def check_manifest(data: Any, where: str = "config.json") -> dict[str, Any]:
    """The `structures` of a manifest. Raises ValueError for another method, a version of the future, or a
    wrong shape."""
    if not isinstance(data, Mapping) or data.get("quant_method") != QUANT_METHOD:
        raise ValueError(f"{where} does not describe a rankfold model: quant_method is not {QUANT_METHOD!r}")
    version = data.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"{where}: version={version!r} must be a positive integer")
    if version > VERSION:
        raise ValueError(
            f"{where} was written by a newer rankfold: its format is version {version}, this one reads up "
            f"to {VERSION}. "
            "Upgrade rankfold"
        )
    structures = data.get("structures")
    if not isinstance(structures, Mapping) or not all(
        isinstance(spec, Mapping) for spec in structures.values()
    ):
        raise ValueError(
            f"{where}: 'structures' must map layer names to specs; got {type(structures).__name__}"
        )
    for name, spec in structures.items():
        if "same_as" in spec:
            other = spec["same_as"]
            if not isinstance(other, str) or "same_as" in structures.get(other, {"same_as": other}):
                raise ValueError(f"{where}: layer {name!r} is the same as {other!r}, which has no structure")
    return dict(structures)


def rebuild_(model: nn.Module, structures: Mapping[str, Any]) -> None:
    """Replace the layers that `structures` names by hosts of empty structures on meta, of the layers' own
    dtype.

    Names may carry, or lack, a transformers model's base prefix: a checkpoint of a model with a head loads
    into the bare model and back. Raises ValueError naming the layer where the name or the shape does not fit,
    before anything is replaced.
    """
    names, held = dict(model.named_modules()), hosts(model)
    shared: dict[str, Structure] = {}  # by the name that has the spec: JSON does not keep the order of layers
    placed: list[tuple[str, Layer, Structure]] = []
    for name, spec in structures.items():
        target = _find(model, name, names)
        if target is None:
            continue
        module = names[target]
        reason = "it is factorized already" if target in held else why_not(module)
        if reason is not None:
            raise ValueError(f"layer {name!r} cannot hold a structure: {reason}")
        source = spec.get("same_as", name)
        if source not in shared:
            assert isinstance(module.weight, nn.Parameter)
            shared[source] = _build(source, structures[source], module.weight.dtype)
        structure = shared[source]
        views = (Layer(module), Layer(module, spatial=True))
        layer = next((view for view in views if view.shape == structure.shape), None)
        if layer is None:
            raise ValueError(
                f"layer {name!r} has shape {views[0].shape}, but its structure in the manifest has "
                f"{structure.shape}"
            )
        placed.append((target, layer, structure))
    for target, layer, structure in placed:
        replace_(model, target, layer.wrap(structure))
    retie_(model)


def _build(name: str, spec: Mapping[str, Any], dtype: torch.dtype | None) -> Structure:
    try:
        return build(spec, dtype=dtype, device="meta")
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error


def _find(model: nn.Module, name: str, names: Mapping[str, nn.Module]) -> str | None:
    """The layer's name in this model; None if it belongs to a part that only the checkpoint's class has."""
    prefix = getattr(model, "base_model_prefix", "")
    candidates = [name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")] if prefix else [name]
    found = next((candidate for candidate in candidates if candidate in names and candidate), None)
    if found is None:
        top = candidates[-1].partition(".")[0]
        if not is_own(model) and not {top, f"{prefix}.{top}"} & set(names):
            return None
        close = difflib.get_close_matches(name, list(names), n=2)
        hint = f" Nearest: {close}." if close else ""
        raise ValueError(
            f"the manifest names layer {name!r}, which {type(model).__name__} does not have.{hint}"
        )
    return found


def is_own(model: nn.Module) -> bool:
    """Is the model of the class that its config says was saved? (Another may lack a head, or bring a new
    one.)"""
    written = getattr(getattr(model, "config", None), "architectures", None)
    return not written or type(model).__name__ in written


def stamp_(model: nn.Module, recipe: Mapping[str, Any] | None = None) -> None:
    """Let a transformers model describe itself, so that its own `save_pretrained` writes what
    `from_pretrained` reads."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(model, "save_pretrained"):
        held = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
        if held is not None and getattr(held, "quant_method", None) != QUANT_METHOD:
            unstamp_(model)  # it unpacked the weights while loading, and would now refuse to save them
        config.quantization_config = manifest(model, recipe)
        retie_(model)


def unstamp_(model: nn.Module) -> None:
    """Make a transformers model an ordinary one again, after its last host is gone."""
    config = getattr(model, "config", None)
    for holder, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (config, "quantization_config"),
        (model, "_tied_weights_keys"),
    ):
        if holder is not None and name in vars(holder):
            delattr(holder, name)
    if hasattr(model, "is_quantized") and "is_quantized" in vars(model):
        setattr(model, "is_quantized", False)  # noqa: B010
    _refresh_ties(model)


def retie_(model: nn.Module) -> None:
    """Tell transformers which factors are one tensor under two names, in place of the dense weights it
    knew."""
    keys = getattr(model, "_tied_weights_keys", None)
    if not isinstance(keys, Mapping):
        return
    owners: dict[int, str] = {}
    renamed: dict[str, str] = {}
    held = hosts(model)
    for name, host in held.items():
        owner = owners.setdefault(id(host.weight), name)
        if owner != name:
            for key in host.weight.state_dict():
                renamed[f"{name}.weight.{key}"] = f"{owner}.weight.{key}"
    gone = {f"{name}.weight" for name in held}
    kept = {to: source for to, source in keys.items() if to not in gone and source not in gone}
    if renamed or len(kept) != len(keys):
        model._tied_weights_keys = {**kept, **renamed}  # type: ignore[assignment]
        _refresh_ties(model)


def _refresh_ties(model: nn.Module) -> None:
    expand = getattr(model, "get_expanded_tied_weights_keys", None)
    if expand is not None:
        model.all_tied_weights_keys = expand(all_submodels=False)  # type: ignore[assignment]
