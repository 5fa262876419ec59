"""Layers that are structured already, seen as the matrices they stand for: an adapter goes beside them too.

W = LowRank, SparseCode, …   ->   Sum(that structure, frozen; adapter)
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankfold.hosts import Conv2d, Embedding, Host, hosts
from rankfold.layers import Layer
from rankfold.structure import Structure
from rankfold.structures import Sum


@dataclass(frozen=True)
class Compressed(Layer):
    """A host and its structure. Inputs and gradients are those of the matrix, as for a dense layer."""

    @property
    def held(self) -> Structure:
        structure = self.module.weight
        assert isinstance(structure, Structure)
        return structure

    @property
    def owner(self) -> object:
        return self.held

    def parameters(self) -> list[nn.Parameter]:
        return list(self.held.parameters())

    @property
    def lookup(self) -> bool:
        return isinstance(self.module, Embedding)

    @property
    def host(self) -> str:
        return type(self.module).__name__

    @property
    def tensor(self) -> nn.Parameter:
        """One of the floating-point parameters: their dtype, device and whether they train."""
        return next(p for p in self.held.parameters() if p.is_floating_point())

    @property
    def shape(self) -> tuple[int, int]:
        return self.held.shape

    def matrix(self) -> Tensor:
        with torch.no_grad():
            return self.held.to_dense()

    def join(self, structure: Structure) -> Structure:
        """The structure that is held, with the adapters that a method put beside the matrix it stands for."""
        assert isinstance(structure, Sum) and structure.frozen
        assert not any(getattr(term, "taken", False) for term in structure.added), "the base would be another"
        return Sum.of(self.held, *structure.added, frozen=True)

    def wrap(self, structure: Structure) -> Host:
        """The same host, holding `structure`."""
        assert isinstance(self.module, Host) and structure.shape == self.shape
        self.module.weight = structure
        return self.module


def exact(layer: Layer) -> Tensor:
    """The matrix that a layer stands for, in float64 and built there: factors of 16 bits are exact numbers,
    their product in 16 bits is not."""
    with torch.no_grad():
        held = layer.held
        return layer.matrix().double() if held is None else copy.deepcopy(held).double().to_dense()


def compressed(model: nn.Module) -> dict[str, Layer]:
    """{name: layer} of the hosts of a model."""
    return {
        name: Compressed(host, isinstance(host, Conv2d) and host.spatial)
        for name, host in hosts(model).items()
    }
