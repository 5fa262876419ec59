"""What the tests of automatic factorization share."""

from __future__ import annotations

from torch import nn

from rankfold.structures import LowRank

SOLVERS = ("svd", "random")


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 24))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def low(model: nn.Module, name: str) -> LowRank:
    structure = model.get_submodule(name).weight
    assert isinstance(structure, LowRank)
    return structure
