"""What an adapter file says, and the hash of the base that it belongs to.

The hash is over the names, shapes, dtypes and bytes of all that the file does not hold. A weight counts as
its matrix (out, in), whatever holds it: a base has one hash, with adapters on it and without.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from rankfold.adapted import is_adapted, parts
from rankfold.layers import Layer
from rankfold.manifest import check_version
from rankfold.provenance import tensors_hash
from rankfold.structure import Structure
from rankfold.structures import Dense

FORMAT, VERSION = "rankfold_adapter", 2  # 1 had no "tokens", and is what is written where there are none
MANIFEST, WEIGHTS = "rankfold_adapter.json", "adapter.safetensors"


def base_hash(
    model: nn.Module, layers: Mapping[str, Any], without: Collection[str] = (), tokens: Collection[str] = ()
) -> str:
    """The hash of everything in `model` but the adapters of `layers` (as in the manifest), the TokenWaras
    around the layers `tokens`, and the tensors named in `without`. Raises ValueError for weights on meta."""
    state = {key: t for key, t in model.state_dict().items() if key not in without}
    absent = next((key for key, tensor in state.items() if tensor.is_meta), None)
    if absent is not None:
        raise ValueError(f"tensor {absent!r} is on the meta device: load the weights of the base first")
    for name in layers:
        for key in [key for key in state if f"{key}.".startswith(f"{name}.weight.")]:
            del state[key]
        module = model.get_submodule(name)
        structure = module.weight
        if is_adapted(structure):  # type: ignore[arg-type]
            structure = parts(module)[0]  # type: ignore[arg-type]
        if isinstance(structure, Dense):
            state[f"{name}.weight"] = structure.full.weight
        elif isinstance(structure, Structure):
            state |= structure.state_dict(prefix=f"{name}.weight.")
        else:
            state[f"{name}.weight"] = view(module, shape_of(name, layers)).matrix()
    for name in tokens:  # "fc.host.weight" is "fc.weight" of the base
        inside = {key: state.pop(key) for key in [*state] if key.startswith(f"{name}.")}
        kept = {key: t for key, t in inside.items() if key.startswith(f"{name}.host.")}
        state |= {f"{name}.{key.removeprefix(f'{name}.host.')}": t for key, t in kept.items()}
    return tensors_hash(state)


def shape_of(name: str, layers: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of a layer's adapters in the manifest; () where it says none."""
    entry = layers[name]
    terms = layers[entry["same_as"]]["terms"] if "same_as" in entry else entry["terms"]
    shape = terms[0].get("shape") if terms and isinstance(terms[0], Mapping) else None
    return tuple(shape) if isinstance(shape, list) else ()


def view(module: nn.Module, shape: tuple[int, ...]) -> Layer:
    """A dense layer as a matrix of `shape`: the one of its two readings that has it, or the usual one."""
    spatial = Layer(module, spatial=True)
    return spatial if Layer(module).shape != shape and spatial.shape == shape else Layer(module)


def statistics(model: nn.Module) -> list[str]:
    """The buffers that move while a model trains, frozen or not: those of batch norms."""
    norms = (m for m in model.named_modules() if isinstance(m[1], nn.modules.batchnorm._NormBase))
    return [f"{name}.{key}" if name else key for name, m in norms for key, _ in m.named_buffers()]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The checked content of rankfold_adapter.json. Raises ValueError for what is not one, or is newer."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} has no {MANIFEST}: it is no folder that save_adapter wrote")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ValueError(f"{path} does not describe an adapter: its format is not {FORMAT!r}")
    check_version(body.get("version"), path, VERSION)
    base, layers, tokens = body.get("base"), body.get("layers", {}), body.setdefault("tokens", {})
    if not isinstance(base, dict) or not all(isinstance(base.get(k), str) for k in ("hash", "dtype", "name")):
        raise ValueError(f"{path}: 'base' must hold 'hash', 'dtype' and 'name', three strings; got {base!r}")
    if not isinstance(layers, dict) or not all(isinstance(v, dict) for v in layers.values()):
        raise ValueError(f"{path}: 'layers' must map layer names to their adapters")
    if not isinstance(tokens, dict) or not all(isinstance(v, dict) for v in tokens.values()):
        raise ValueError(f"{path}: 'tokens' must map layer names to the specs of their TokenWaras")
    if not layers and not tokens:
        raise ValueError(f"{path}: 'layers' must map layer names to their adapters; it names none")
    for name, entry in layers.items():
        other, terms = entry.get("same_as", name), entry.get("terms")
        own = isinstance(terms, list) and bool(terms) and other == name
        shared = (
            isinstance(other, str) and other != name and "terms" in layers.get(other, {}) and terms is None
        )
        if not own and not shared:
            raise ValueError(f"{path}: layer {name!r} has neither 'terms' nor a layer to be the same as")
    if not isinstance(body.get("taken"), bool):
        raise ValueError(f"{path}: 'taken' must be true or false; got {body.get('taken')!r}")
    for key in ("kept", "statistics"):
        if not isinstance(body.get(key), list) or not all(isinstance(name, str) for name in body[key]):
            raise ValueError(f"{path}: {key!r} must be a list of names; got {body.get(key)!r}")
    return body
