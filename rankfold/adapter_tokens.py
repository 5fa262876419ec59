"""TokenWaras in an adapter file: what of them is stored, and how they get around the layers of a base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.layers import replace_
from rankfold.token_layer import TokenWara, token_layers


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What trains in the TokenWaras of a model, by its names in the file."""
    return {
        f"tokens.{name}.{key}": parameter
        for name, layer in token_layers(model).items()
        for key, parameter in layer.named_parameters(recurse=False)
    }


@contextmanager
def around_(
    model: nn.Module, specs: Mapping[str, Any], state: Mapping[str, Tensor], folder: Path
) -> Iterator[None]:
    """Put TokenWaras of these specs, filled from the file, around layers of `model`, in place of those that
    are there; take them off again where the block raises.

    Raises ValueError naming the layer, with the model unchanged, for one that is missing or does not fit its
    spec, and for tensors that do not.
    """
    modules, made = dict(model.named_modules()), {}
    for name, spec in specs.items():
        old = modules.get(name) if name else None
        if old is None:
            raise ValueError(f"the adapter is for layer {name!r}, which {type(model).__name__} lacks")
        try:
            host = old.host if isinstance(old, TokenWara) else old
            made[name] = _filled(TokenWara.rebuilt(host, spec), name, state)
        except ValueError as error:
            raise ValueError(f"{folder}: layer {name!r}: {error}") from error
    for name, module in made.items():
        replace_(model, name, module)
    try:
        yield
    except BaseException:
        for name in made:
            replace_(model, name, modules[name])
        raise


def _filled(module: TokenWara, name: str, state: Mapping[str, Tensor]) -> TokenWara:
    for key, parameter in module.named_parameters(recurse=False):
        found = state.get(f"tokens.{name}.{key}")
        if found is None or found.shape != parameter.shape or not found.is_floating_point():
            held = "missing" if found is None else f"{found.dtype} {tuple(found.shape)}"
            raise ValueError(f"tensor {key!r} is {held} in the file, its spec says {tuple(parameter.shape)}")
        if not torch.isfinite(found).all():
            raise ValueError(f"tensor {key!r} holds NaN or infinite entries")
        with torch.no_grad():
            parameter.copy_(found)
    return module
