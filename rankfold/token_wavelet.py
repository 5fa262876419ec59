"""Adapters on a grid of tokens: `TokenWara` around layers of a model (see `rankfold.token_layer`)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import nn

from rankfold.layers import replace_
from rankfold.manifest import recipe_of, stamp_
from rankfold.token_layer import TokenWara as TokenWara


def token_wara_(
    model: nn.Module, layers: Sequence[str], rank: int, alpha: float | None = None, **options: object
) -> dict[str, TokenWara]:
    """Freeze `model` and put a TokenWara around each of the named layers, in place; returns them by name.

    `options` are those of `TokenWara`; `seed` is drawn on by each layer's name. A transformers model is told,
    so that its own `save_pretrained` writes what `from_pretrained` rebuilds; a `grid` that is set later is
    written by `rankfold.save`. Raises ValueError as TokenWara does, naming the layer; the model is then as it
    was.
    """
    seed, made = options.pop("seed", 0), {}
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        for name in layers:
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            own: dict = {**options, "seed": int.from_bytes(digest[:7], "big")}
            made[name] = TokenWara(model.get_submodule(name), rank, alpha, **own)
    except (ValueError, AttributeError) as error:
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(trains[key])
        raise ValueError(f"layer {name!r}: {error}") from error
    model.requires_grad_(False)
    for name, module in made.items():
        replace_(model, name, module)
    stamp_(model, recipe_of(model))
    return made
