"""What of a model can be cut: its low-rank structures, each with its sizes and what they cost.

A size is a rank, or None: the ordinary layer, which is smaller than a product from break-even on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rankfold.batches import Batch, count_examples
from rankfold.hosts import Embedding, hosts
from rankfold.layers import replace_
from rankfold.method import UNITS
from rankfold.methods.svd import SVD
from rankfold.structures import LowRank


@dataclass(frozen=True)
class Item:
    """One low-rank structure, the layers that hold it, and its sizes by rising cost, the last one whole."""

    names: tuple[str, ...]
    structure: LowRank
    sizes: tuple[int | None, ...]
    costs: tuple[int, ...]
    dense: int


def items_of(model: nn.Module, unit: str) -> list[Item]:
    """Every low-rank structure of a model. Raises ValueError where there is none, for an unknown unit, and
    for layers that share a factor."""
    if unit not in UNITS:
        raise ValueError(f"unit={unit!r} is not a unit of cost; choose one of {UNITS}")
    names: dict[int, list[str]] = {}
    held = hosts(model)
    for name, host in held.items():
        if isinstance(host.weight, LowRank):
            names.setdefault(id(host.weight), []).append(name)
    if not names:
        kinds = sorted({host.weight.kind for host in held.values()})
        raise ValueError(
            f"the model has no low-rank layer to cut; its factorized layers are {kinds or 'none'}"
        )
    items, owners = [], dict[int, str]()
    for group in names.values():
        group = sorted(group, key=lambda name: not isinstance(held[name], Embedding))
        structure = held[group[-1]].weight
        assert isinstance(structure, LowRank)
        for parameter in structure.parameters():
            other = owners.setdefault(id(parameter), group[-1])
            if other != group[-1]:
                raise ValueError(
                    f"layers {other!r} and {group[-1]!r} share a factor, so that one cannot be cut without "
                    "the other; factorize without groups"
                )
        out, inner = structure.shape
        dense = out * inner * (structure.dtype.itemsize if unit == "nbytes" else 1)
        whole = cost(structure, structure.rank, unit)
        ranks = [rank for rank in menu(structure) if cost(structure, rank, unit) < min(whole, dense)]
        sizes = (*ranks, structure.rank if whole < dense else None)
        costs = (*(cost(structure, rank, unit) for rank in ranks), min(whole, dense))
        items.append(Item(tuple(group), structure, sizes, costs, dense))
    return items


def menu(structure: LowRank) -> list[int]:
    """At most some 64 ranks below break-even: every one of a few, else in the steps of SVD."""
    out, inner = structure.shape
    largest = min(structure.rank, (out * inner - 1) // (out + inner))
    return list(range(1, largest + 1)) if largest <= 64 else SVD().menu(structure.shape)


def cost(structure: LowRank, rank: int, unit: str) -> int:
    """What the structure costs at a rank: bytes, parameters, or multiply-adds a row."""
    return rank * sum(structure.shape) * (structure.dtype.itemsize if unit == "nbytes" else 1)


def prefix(structure: LowRank, rank: int) -> LowRank:
    """The first `rank` components, in memory of their own."""
    left, right = structure.left.weight.detach(), structure.right.weight.detach()
    return LowRank.of(left[:, :rank].clone(), right[:rank].clone(), structure.scale)


@contextmanager
def trying(model: nn.Module, items: list[Item], batch: Batch) -> Iterator[None]:
    """Every item whole, and eval mode, but batch norms go by the batch at hand (if it has several examples):
    what they will see when their statistics are collected anew. Afterwards the model is as it was."""
    modes = {module: module.training for module in model.modules()}
    weights = {name: hosts(model)[name].weight for item in items for name in item.names}
    norms = [m for m in modes if isinstance(m, _BatchNorm) and m.track_running_stats]
    model.eval()
    try:
        for norm in norms if count_examples(batch) > 1 else ():
            norm.training, norm.track_running_stats = True, False
        for item in items:
            try_(model, item, -1)
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        for name, weight in weights.items():
            hosts(model)[name].weight = weight
        for module, mode in modes.items():
            module.training = mode


def try_(model: nn.Module, item: Item, pick: int) -> None:
    """Put an item at one of its sizes for a forward pass in eval mode; a product where it would be folded."""
    size = item.sizes[pick]
    held = item.structure if size is None else prefix(item.structure, size)
    for name in item.names:
        hosts(model)[name].weight = held.train(False)


@torch.no_grad()
def put_(model: nn.Module, item: Item, size: int | None) -> None:
    """The layers of an item at their final size: a prefix, or the ordinary layer."""
    made = None if size is None else prefix(item.structure, size)
    first: nn.Parameter | None = None
    for name in item.names:
        host = hosts(model)[name]
        trains = any(p.requires_grad for p in host.weight.parameters())
        host.weight = item.structure if made is None else made.requires_grad_(trains).train(host.training)
        if made is None:
            dense: Any = host.to_dense()
            dense.weight = first = dense.weight if first is None else first
            replace_(model, name, dense)
