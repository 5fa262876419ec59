"""Adapter files: what was trained beside a frozen base, and the hash of that base.

    rankfold_adapter.json    {"format": "rankfold_adapter", "version": 1, "base": {"hash", "dtype", "name"},
                              "layers": {layer: {"terms": [spec, …]} | {"same_as": layer}},
                              "tokens": {layer: spec of its TokenWara} (version 2),
                              "taken": true for PiSSA, "kept": [parameter, …],
                              "statistics": [buffer, …], "recipe": {…}}
    adapter.safetensors      "<layer>.<term>.<key>", "tokens.<layer>.<key>", "kept.<name>",
                             "statistics.<name>"

Written beside its place and renamed. An adapter opens on the base it was trained on, and on no other
(`rankfold.adapter_manifest`).
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankfold.adapted import bases, is_adapted, kept, matrices, parts, taken
from rankfold.adapter_manifest import (
    FORMAT,
    MANIFEST,
    WEIGHTS,
    base_hash,
    read_manifest,
    statistics,
    view,
)
from rankfold.adapter_tokens import around_, own_tensors
from rankfold.atomic import check_folder, writing
from rankfold.factorize import tied
from rankfold.hosts import Conv2d, Embedding, Host, Linear
from rankfold.layers import Layer, replace_, why_not
from rankfold.manifest import recipe_of, stamp_
from rankfold.structure import Structure, build
from rankfold.structures import Dense, Sum
from rankfold.token_layer import own_parameters, token_layers


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write the adapters of `model`, and whatever else trains (a head), to `folder`, whole or not at all;
    return its path.

    The running statistics of batch norms go along: they move while a frozen model trains. Raises ValueError
    for a model without adapters, one whose base is not frozen, and a folder that is not empty, unless
    `overwrite`.
    """
    folder = check_folder(folder, overwrite)
    layers: dict[str, Any] = {}
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, host in matrices(model).items():
        owner = first.setdefault(id(host.weight), name)
        if owner != name:
            layers[name] = {"same_as": owner}
            continue
        terms = parts(host)[1]
        layers[name] = {"terms": [term.spec() for term in terms]}
        for place, term in enumerate(terms):
            tensors |= {f"{name}.{place}.{key}": tensor for key, tensor in term.state_dict().items()}
    tokens = {name: layer.spec() for name, layer in token_layers(model).items()}
    tensors |= own_tensors(model)
    trained, moving = kept(model), statistics(model)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors |= {f"kept.{name}": state[name] for name in trained}
    tensors |= {f"statistics.{name}": state[name] for name in moving}
    under = [p for base in bases(model).values() for p in base.values()]
    width = next(p.dtype for p in under if p.is_floating_point())
    body = {
        "format": FORMAT,
        "version": 2 if tokens else 1,
        "base": {
            "hash": base_hash(model, layers, {*trained, *moving}, tokens),
            "dtype": str(width).removeprefix("torch."),
            "name": getattr(model, "name_or_path", "") or "",
        },
        "layers": layers,
        "taken": taken(model) is not None,
        "kept": trained,
        "statistics": moving,
        "recipe": recipe_of(model),
    } | ({"tokens": tokens} if tokens else {})
    with writing(folder) as beside:
        stored = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        save_file(stored, beside / WEIGHTS, metadata={"format": "pt"})
        (beside / MANIFEST).write_text(json.dumps(body, indent=2), encoding="utf-8")
    return folder


def load_adapter_(model: nn.Module, folder: str | os.PathLike[str], *, other_base: bool = False) -> nn.Module:
    """Put the adapters of `folder` on `model`, in place, and return it: frozen but for what the file holds.

    Adapters that these layers carry already are replaced. `other_base` takes a base of another hash, e.g. the
    same weights in another dtype, or compressed ones: the shapes must still fit. Raises ValueError for a file
    that is damaged, newer than this rankfold, or of another base; the model is then unchanged.
    """
    folder = Path(folder)
    body = read_manifest(folder)
    state = _read_tensors(folder)
    with around_(model, body["tokens"], state, folder):
        return _load_(model, folder, body, state, other_base)


def _load_(
    model: nn.Module, folder: Path, body: dict[str, Any], state: dict[str, Tensor], other_base: bool
) -> nn.Module:
    """The same on a model whose TokenWaras are in place."""
    for name in body["layers"]:
        _module(model, name)
    terms = _terms(body["layers"], state, folder)
    owners = {name: entry.get("same_as", name) for name, entry in body["layers"].items()}
    places = {name: place_of(model, name, terms[owner][0].shape) for name, owner in owners.items()}
    tied(model, {name: place for name, place in places.items() if isinstance(place, Layer)})
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for kind in ("kept", "statistics"):
        for name in body[kind]:
            value, target = state.get(f"{kind}.{name}"), held.get(name)
            if value is None or target is None or value.shape != target.shape:
                raise ValueError(
                    f"{folder}: tensor {name!r} is {_shape(value)} in the file, {_shape(target)} in the model"
                )
    expected = {
        f"{name}.{place}.{key}"
        for name, made in terms.items()
        for place, term in enumerate(made)
        for key in term.state_dict()
    }
    expected |= {key for key in own_tensors(model) if key in state}
    expected |= {f"{kind}.{name}" for kind in ("kept", "statistics") for name in body[kind]}
    if extra := sorted(set(state) - expected):
        raise ValueError(f"{folder / WEIGHTS}: left-over tensors {extra[:4]}")
    found = base_hash(model, body["layers"], {*body["kept"], *body["statistics"]}, body["tokens"])
    if found != body["base"]["hash"] and body["taken"]:
        raise ValueError(
            f"{folder} is an adapter that was taken out of its base (PiSSA), and fits what is left of that, "
            f"{body['base']['hash']}; this model is {found}. Put recipes.pissa of the same rank on the base, "
            "then load this"
        )
    if found != body["base"]["hash"] and not other_base:
        dtype = str(next(p for p in model.parameters() if p.is_floating_point()).dtype).removeprefix("torch.")
        theirs = f"{body['base']['name'] or 'unnamed'}, {body['base']['dtype']}"
        raise ValueError(
            f"{folder} is an adapter for another base: it was trained on {body['base']['hash']} ({theirs}), "
            f"this model is {found} ({dtype}). Load that base; other_base=True puts it here all the same"
        )
    put_(model, owners, places, terms)
    with torch.no_grad():
        for kind in ("kept", "statistics"):
            for name in body[kind]:
                held[name].copy_(state[f"{kind}.{name}"])
    model.requires_grad_(False)
    for made in terms.values():
        for term in made:
            term.requires_grad_(True)
            if body["taken"]:
                vars(term)["taken"] = True
    for name in body["tokens"]:
        for parameter in own_parameters(token_layers(model)[name]):
            parameter.requires_grad_(True)
    for name in body["kept"]:
        held[name].requires_grad_(True)
    stamp_(model, body.get("recipe") or recipe_of(model))
    return model


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS} cannot be read: {error}") from error


def _terms(
    layers: Mapping[str, Any], state: Mapping[str, Tensor], folder: Path
) -> dict[str, list[Structure]]:
    """The adapters of each layer that has its own, filled."""
    made: dict[str, list[Structure]] = {}
    for name, entry in layers.items():
        for place, spec in enumerate(entry.get("terms", [])):
            try:
                term = build(spec, device="meta")
                empty = term.state_dict()
                given = {key: _get(state, f"{name}.{place}.{key}", tensor) for key, tensor in empty.items()}
                term.load_state_dict(given, assign=True)
                for part in term.modules():
                    if isinstance(part, Structure):
                        part.validate()
            except (ValueError, RuntimeError) as error:
                raise ValueError(f"{folder}: layer {name!r}: {error}") from error
            held = made.setdefault(name, [])
            held.append(term)
            if term.shape != held[0].shape:
                raise ValueError(
                    f"{folder}: layer {name!r}: adapters of shapes {held[0].shape} and {term.shape}"
                )
    return made


def _get(state: Mapping[str, Tensor], key: str, like: Tensor) -> Tensor:
    found = state.get(key)
    if found is None or found.shape != like.shape or found.is_floating_point() != like.is_floating_point():
        raise ValueError(f"tensor {key!r} is {_shape(found)} in the file, its spec says {_shape(like)}")
    if found.is_floating_point() and not torch.isfinite(found).all():
        raise ValueError(f"tensor {key!r} holds NaN or infinite entries")
    return found


def _module(model: nn.Module, name: str) -> nn.Module:
    names = dict(model.named_modules())
    if name not in names or not name:
        close = difflib.get_close_matches(name, list(names), n=2)
        hint = f" Nearest: {close}." if close else ""
        raise ValueError(f"the adapter is for layer {name!r}, which {type(model).__name__} lacks.{hint}")
    return names[name]


def place_of(model: nn.Module, name: str, shape: tuple[int, int]) -> Layer | Host:
    """Where an adapter of `shape` for layer `name` goes: a dense layer, or a host. Raises ValueError where it
    does not fit."""
    module = _module(model, name)
    if isinstance(module, Linear | Conv2d | Embedding):
        held, found = module, module.weight.shape
    else:
        reason = why_not(module)
        if reason is not None:
            raise ValueError(f"layer {name!r} cannot hold an adapter: {reason}")
        held = view(module, shape)
        found = held.shape
    if found != shape:
        raise ValueError(f"layer {name!r} has shape {found}, its adapter {shape}")
    return held


def put_(
    model: nn.Module,
    owners: Mapping[str, str],
    places: Mapping[str, Layer | Host],
    terms: Mapping[str, list[Structure]],
) -> None:
    """Put adapters `terms[owners[name]]` in each place; layers of one owner share them, and the base."""
    sums: dict[str, Sum] = {}
    for name, owner in sorted(owners.items(), key=lambda pair: pair[0] != pair[1]):
        held = places[name]
        if owner not in sums:
            if isinstance(held, Layer):
                base: Structure = Dense.of(held.matrix())
            else:
                base = parts(held)[0] if is_adapted(held.weight) else held.weight
            device = base.device
            sums[owner] = Sum.of(base, *(term.to(device) for term in terms[owner]), frozen=True)
        if isinstance(held, Layer):
            replace_(model, name, held.wrap(sums[owner]))
        else:
            held.weight = sums[owner]


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
