"""Adapters on a model: what trains, and how they become part of the weights.

    freeze_   only adapters train, and what is named beside them (a head)
    merge_    W ← W + ΔW, built in at least float32 and cast once; `undo` puts back what was there, bit for
              bit

A merged layer is dense again, and nothing of rankfold is left in it. Where the base is low rank, the merged
layer is too: of both ranks together, which is exact, or cut to the old one.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.adapted import adapted, added, bases, is_adapted, parts, taken
from rankfold.hosts import Host, hosts
from rankfold.layers import Layer, replace_
from rankfold.low_rank_form import factors_of, truncated
from rankfold.manifest import described, recipe_of, stamp_, unstamp_
from rankfold.report import Report
from rankfold.structure import Structure
from rankfold.structures import Dense, LowRank, Sum
from rankfold.token_layer import token_layers

SIZES = ("exact", "same", "dense")


def freeze_(model: nn.Module, keep: Sequence[str] = ()) -> nn.Module:
    """Freeze everything but the adapters, and the parameters that the globs `keep` match by name
    ("classifier*"). Also what to call after loading a model with adapters, which then all trains.

    Raises ValueError for a model without adapters, and for a glob that matches no parameter, or only weights
    under adapters, which stay frozen.
    """
    if isinstance(keep, str):
        raise ValueError(f"keep is a list of globs, e.g. keep=[{keep!r}]")
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in names):
            close = difflib.get_close_matches(pattern, names, n=2, cutoff=0.3)
            raise ValueError(f"No parameter matches {pattern!r}. Nearest: {close}")
    trains = added(model)
    under = {id(p) for base in bases(model).values() for p in base.values()}
    free = [n for n, p in model.named_parameters(remove_duplicate=False) if id(p) not in under]
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in free):
            raise ValueError(f"{pattern!r} matches only weights under adapters, which stay frozen")
    model.requires_grad_(False)
    for parameter in trains:
        parameter.requires_grad_(True)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in under and any(fnmatchcase(name, pattern) for pattern in keep):
            parameter.requires_grad_(True)
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of what trains."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_(report: Report, model: nn.Module) -> None:
    """Write into the report of an adapter run how many parameters train, and the bytes that were added."""
    report.totals["params_trained"] = sum(p.numel() for p in trainable(model).values())
    report.totals["bytes_added"] = sum(row.bytes_after - row.bytes_before for row in report.layers)


def check_unadapted(layers: Mapping[str, Layer]) -> None:
    """Raise ValueError where one of the layers has an adapter already."""
    for name, layer in layers.items():
        if is_adapted(layer.held):
            raise ValueError(
                f"layer {name!r} has an adapter already; merge_ it into the weight first, or skip the layer. "
                "Several adapters beside one another, to switch between, are what PEFT does"
            )


def check_unmixed(model: nn.Module, takes: bool) -> None:
    """Raise ValueError where adapters that are taken out of their weight (`takes`: PiSSA) and others would be
    in one model: a saved one says for all of them together which they are."""
    held = next((name for name, host in hosts(model).items() if is_adapted(host.weight)), None)
    if held is not None and (taken(model) is not None) != takes:
        raise ValueError(
            f"layer {held!r} has an adapter already, and one of the two kinds is PiSSA, which changes the "
            "weight beside it; a model has the one kind or the other. merge_ what is there first"
        )


def check_dense(layers: Mapping[str, Layer], recipe: str) -> None:
    """Raise ValueError where one of the layers is compressed, for a recipe that takes its adapter's start out
    of the weight: no structure holds what is left."""
    for name, layer in layers.items():
        if layer.held is not None:
            raise ValueError(
                f"layer {name!r} is compressed (kind {layer.held.kind!r}), and recipe {recipe!r} takes the "
                "start of its adapter out of the weight, which leaves a dense rest; use recipes.lora, whose "
                "start is zero, or skip the layer"
            )


@dataclass
class Merged:
    """What `merge_` did. `undo` puts it back; without this object the old weights are freed.

    errors  {layer: ‖merged − (base + adapter)‖ / ‖base + adapter‖}: rounding to the base's dtype, and what
            was cut with size="same"
    """

    model: nn.Module
    errors: dict[str, float]
    _modules: dict[str, nn.Module] = field(repr=False)
    _weights: dict[str, Structure] = field(repr=False)
    _recipe: Mapping[str, Any] | None = field(repr=False)

    def undo(self) -> nn.Module:
        """Put base and adapters back, the very same tensors. Raises ValueError where that was done."""
        if not self._modules:
            raise ValueError("this merge was undone already")
        for name, host in self._modules.items():
            host.weight = self._weights[name]
            replace_(self.model, name, host)
        self._modules = {}
        stamp_(self.model, self._recipe)
        return self.model


def merge_(model: nn.Module, *, size: str = "exact") -> Merged:
    """Make every adapter part of its weight, in place.

    size  "exact"  a dense base stays dense, a low-rank one gets the adapter's rank on top; other structures
          have no exact form and are refused. "same": a low-rank base is cut to its old rank, by SVD.
          "dense": every layer becomes dense

    Autocast is switched off inside. Raises ValueError where there is no adapter (or it was merged before),
    naming the layer whose sum is not finite or that cannot be merged so; the model is then unchanged.
    """
    if size not in SIZES:
        raise ValueError(f"merge_(size={size!r}): choose one of {', '.join(SIZES)}")
    if not any(is_adapted(host.weight) for host in hosts(model).values()) and not token_layers(model):
        raise ValueError(
            f"{type(model).__name__} has no adapter to merge; one that was merged before is part of the "
            "weights"
        )
    held = adapted(model)  # a TokenWara is none of them, and stays
    made: dict[int, tuple[Structure, float]] = {}
    with torch.no_grad(), torch.autocast(_kind(model), enabled=False):
        for name, host in held.items():
            if id(host.weight) not in made:
                made[id(host.weight)] = _merged(name, host, size)
    recipe = recipe_of(model)
    done = Merged(model, {}, dict(held), {name: host.weight for name, host in held.items()}, recipe)
    tables: dict[int, nn.Parameter] = {}
    for name, host in held.items():
        merged, done.errors[name] = made[id(host.weight)]
        _replace_(model, name, host, merged, tables)
    if described(model):
        stamp_(model, recipe)
    else:
        unstamp_(model)
    return done


def _merged(name: str, host: Host, size: str) -> tuple[Structure, float]:
    """The structure that an adapted one becomes, and its relative error."""
    base, terms = parts(host)
    true = _wide(base) + sum(_wide(term) for term in terms)
    if not torch.isfinite(true).all():
        bad = int((~torch.isfinite(true)).sum())
        raise ValueError(
            f"layer {name!r}: base + adapter has {bad} NaN or infinite entries; it is not merged"
        )
    trains = any(p.requires_grad for p in base.parameters())
    if size == "dense" or isinstance(base, Dense):
        merged: Structure = Dense.of(true.to(base.dtype))
    else:
        merged = _thin(name, base, terms, size)
    merged.requires_grad_(trains)
    error, norm = float((_wide(merged) - true).norm()), float(true.norm())
    return merged, error / norm if norm else 0.0


def _thin(name: str, base: Structure, terms: list[Structure], size: str) -> LowRank:
    pair = factors_of(Sum.of(base, *terms)) if type(base) is LowRank else None
    if pair is None or type(base) is not LowRank:
        kinds = ", ".join(term.kind for term in terms)
        raise ValueError(
            f"layer {name!r}: an adapter ({kinds}) beside a structure of kind {base.kind!r} has no exact "
            "merged form; merge_(size='dense') makes the layer dense"
        )
    left, right = pair
    if size == "same":
        left, right = truncated(left, right, base.rank)
    if left.shape[1] > right.shape[1]:
        raise ValueError(
            f"layer {name!r}: merged it has rank {left.shape[1]}, more than its {right.shape[1]} inputs; "
            "merge_(size='same') or size='dense'"
        )
    return LowRank.of(left.to(base.dtype), right.to(base.dtype))


def _replace_(
    model: nn.Module, name: str, host: Host, merged: Structure, tables: dict[int, nn.Parameter]
) -> None:
    """Put a merged structure in place; a dense one as the ordinary layer. Tied layers keep one parameter."""
    host.weight, before = merged, host.weight
    if isinstance(merged, Dense):
        dense: Any = host.to_dense()
        dense.weight.requires_grad_(merged.full.weight.requires_grad)
        shared = tables.setdefault(id(merged), dense.weight)
        if shared.shape == dense.weight.shape:
            dense.weight = shared
        host.weight = before
        replace_(model, name, dense)


def _wide(structure: Structure) -> Tensor:
    """The matrix in at least float32, whatever its parts are held in."""
    dtype = torch.promote_types(structure.dtype, torch.float32)
    return (structure if structure.dtype == dtype else copy.deepcopy(structure).to(dtype)).to_dense()


def _kind(model: nn.Module) -> str:
    return next(model.parameters()).device.type
