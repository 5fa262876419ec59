"""The manifest: what config.json says of a factorized model, and the skeleton rebuilt from it.

    {"quant_method": "rankfold", "version": 1, "structures": {layer: spec, …}, "recipe": {…}}
    {…, "version": 2, "tokens": {layer: spec of its TokenWara, …}}         where there is one

A spec is that of `Structure.spec()`; a layer that shares another's matrix says {"same_as": other}, and one
that shares a parameter with another's structure adds {"tied": {key: other}} to its spec. In a transformers
model the manifest is `config.quantization_config`, so that `save_pretrained` writes it;
elsewhere it is `rankfold.json`. A manifest read from a file is untrusted: names, shapes and sizes are checked
before anything is allocated.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

import rankfold.cored
import rankfold.masters
import rankfold.ordered
import rankfold.sparse_code
import rankfold.structures
import rankfold.wavelet  # noqa: F401  the kinds that a manifest may name
from rankfold.hosts import hosts
from rankfold.layers import Layer, replace_, why_not
from rankfold.structure import Structure, build
from rankfold.ties import refresh_, retie_
from rankfold.token_layer import TokenWara, token_layers

QUANT_METHOD = "rankfold"
VERSION = 2  # 1 had no "tokens", and is still what is written where there are none


def manifest(model: nn.Module, recipe: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The manifest of a model's hosts. `recipe` (JSON) is provenance and is not needed to load."""
    structures: dict[str, dict[str, Any]] = {}
    first: dict[int, str] = {}
    for name, host in hosts(model).items():
        owner = first.setdefault(id(host.weight), name)
        structures[name] = host.weight.spec() if owner == name else {"same_as": owner}
    for name, key, owner in _ties(model):
        structures[name].setdefault("tied", {})[key] = owner
    tokens = {name: layer.spec() for name, layer in token_layers(model).items()}
    body: dict[str, Any] = {"quant_method": QUANT_METHOD, "version": 1, "structures": structures}
    body |= {"version": 2, "tokens": tokens} if tokens else {}
    return body | ({"recipe": dict(recipe)} if recipe else {})


def described(model: nn.Module) -> bool:
    """Whether a checkpoint of the model needs its manifest to be opened."""
    return bool(hosts(model) or token_layers(model))


def _ties(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """(layer, key, owner) for each parameter `key` of a layer's structure that is another's: the owner is the
    first layer that has it."""
    owners: dict[int, tuple[str, str]] = {}
    seen: set[int] = set()
    for name, host in hosts(model).items():
        if id(host.weight) in seen:
            continue
        seen.add(id(host.weight))
        for key, parameter in host.weight.named_parameters():
            owner, its = owners.setdefault(id(parameter), (name, key))
            if owner != name and its != key:
                raise ValueError(
                    f"layer {name!r} holds as {key!r} the tensor that is {its!r} of layer {owner!r}; only "
                    "parameters of one name can be saved as one"
                )
            if owner != name:
                yield name, key, owner


def check_version(version: Any, where: Any, newest: int) -> None:
    """Raise ValueError for what is no version of a format, and for one above `newest`, which we read."""
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"{where}: version={version!r} must be a positive integer")
    if version > newest:
        raise ValueError(
            f"{where} was written by a newer rankfold: its format is version {version}, this one reads up to "
            f"{newest}. Upgrade rankfold"
        )


def check_manifest(data: Any, where: str = "config.json") -> dict[str, Any]:
    """The `structures` of a manifest. Raises ValueError for another method, a version of the future, or a
    wrong shape."""
    if not isinstance(data, Mapping) or data.get("quant_method") != QUANT_METHOD:
        raise ValueError(f"{where} does not describe a rankfold model: quant_method is not {QUANT_METHOD!r}")
    check_version(data.get("version"), where, VERSION)
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
        if "tied" in spec:
            _check_tied(name, spec, structures, where)
    tokens_of(data, where)
    return dict(structures)


def tokens_of(data: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
    """The `tokens` of a manifest. Raises ValueError for a wrong shape."""
    tokens = data.get("tokens", {})
    if not isinstance(tokens, Mapping) or not all(isinstance(spec, Mapping) for spec in tokens.values()):
        raise ValueError(f"{where}: 'tokens' must map layer names to specs; got {tokens!r}")
    return dict(tokens)


def _check_tied(name: str, spec: Mapping[str, Any], structures: Mapping[str, Any], where: str) -> None:
    tied = spec["tied"]
    if not isinstance(tied, Mapping) or "same_as" in spec:
        raise ValueError(
            f"{where}: layer {name!r}: 'tied' maps parameters of its own structure to the layers that own "
            f"them; got {tied!r}"
        )
    for key, owner in tied.items():
        its = structures.get(owner, {"same_as": owner}) if isinstance(owner, str) else {"same_as": owner}
        if "same_as" in its or owner == name:
            raise ValueError(
                f"{where}: layer {name!r} has its {key!r} from {owner!r}, which has no structure of its own"
            )
        if isinstance(its.get("tied"), Mapping) and key in its["tied"]:
            raise ValueError(
                f"{where}: layer {name!r} has its {key!r} from {owner!r}, which has it from "
                f"{its['tied'][key]!r}; name the layer that owns it"
            )


def rebuild_(
    model: nn.Module, structures: Mapping[str, Any], tokens: Mapping[str, Any] | None = None
) -> None:
    """Replace the layers that `structures` names by hosts of empty structures on meta, of the layers' own
    dtype, and put an unfilled TokenWara around those that `tokens` names (around "fc", whose structure is
    then that of "fc.host").

    Names may carry, or lack, a transformers model's base prefix: a checkpoint of a model with a head loads
    into the bare model and back. Raises ValueError naming the layer where the name or the shape does not fit,
    before anything is replaced.
    """
    names, held = dict(model.named_modules()), hosts(model)
    around: dict[str, TokenWara] = {}
    for name, spec in (tokens or {}).items():
        target = _find(model, name, names)
        if target is not None:
            around[target] = _around(name, names[target], spec)
            names[f"{target}.host"] = names[target]
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
    for name, structure in shared.items():
        for key, owner in structures[name].get("tied", {}).items():
            if owner in shared:  # not so where it belongs to a part that only the checkpoint's class has
                _tie_(name, structure, key, owner, shared[owner])
    for target, module in around.items():
        replace_(model, target, module)
    for target, layer, structure in placed:
        replace_(model, target, layer.wrap(structure))
    retie_(model)


def _tie_(name: str, structure: Structure, key: str, owner: str, other: Structure) -> None:
    mine, theirs = (dict(each.named_parameters()).get(key) for each in (structure, other))
    if mine is None or theirs is None:
        who, lacks = (name, structure) if mine is None else (owner, other)
        raise ValueError(
            f"layer {name!r} has its {key!r} from {owner!r}, but {who!r} has no such parameter; it has "
            f"{[held for held, _ in lacks.named_parameters()]}"
        )
    if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
        raise ValueError(
            f"layer {name!r} has its {key!r} from {owner!r}, but needs {mine.dtype} {tuple(mine.shape)} "
            f"where that is {theirs.dtype} {tuple(theirs.shape)}"
        )
    path, _, leaf = key.rpartition(".")
    setattr(structure.get_submodule(path), leaf, theirs)


def _around(name: str, host: nn.Module, spec: Mapping[str, Any]) -> TokenWara:
    try:
        return TokenWara.rebuilt(host, spec)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error


def _build(name: str, spec: Mapping[str, Any], dtype: torch.dtype | None) -> Structure:
    own = {key: value for key, value in spec.items() if key != "tied"}
    try:
        return build(own, dtype=dtype, device="meta")
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


def validate(model: nn.Module) -> None:
    """Raise ValueError naming the layer whose structure holds tensors that it cannot have, such as an index
    out of range (`Structure.validate`). What is on meta, e.g. offloaded to disk, is passed over."""
    for name, host in hosts(model).items():
        for module in host.weight.modules():
            if isinstance(module, Structure) and not any(t.is_meta for t in module.state_dict().values()):
                try:
                    module.validate()
                except ValueError as error:
                    raise ValueError(f"layer {name!r}: {error}") from error


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


def recipe_of(model: nn.Module) -> Mapping[str, Any] | None:
    """The recipe that a transformers model carries, as JSON."""
    held = getattr(getattr(model, "config", None), "quantization_config", None)
    return held.get("recipe") if isinstance(held, Mapping) else getattr(held, "recipe", None)


def unstamp_(model: nn.Module) -> None:
    """Make a transformers model an ordinary one again, after its last host is gone."""
    config = getattr(model, "config", None)
    for holder, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (config, "quantization_config"),
    ):
        if holder is not None and name in vars(holder):
            delattr(holder, name)
    if hasattr(model, "is_quantized") and "is_quantized" in vars(model):
        setattr(model, "is_quantized", False)  # noqa: B010
    for module in model.modules():
        if "_tied_weights_keys" in vars(module):
            delattr(module, "_tied_weights_keys")
            refresh_(module)
