"""Dense masters: what a factorization is trained through, when its discrete choices are to move as well.

    codes    W = (Z ∘ mask) D,  mask = the `nonzeros` largest |Z| of every row and block
             dL/dD = (Z ∘ mask)ᵀ G,  dL/dZ = G Dᵀ for all entries: straight through the mask
    weight   W' = fit(W),  dL/dW = dL/dW' = G: straight through the whole factorization

A master is a structure for training only. It is as large as a dense layer, so it refuses to give the spec
that a final checkpoint needs; `finish_` (`rankfold.straight_through`) turns it into the small structure.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.codes import per_block
from rankfold.sparse_code import SparseCode
from rankfold.structure import Structure, build


class Master(Structure):
    """What both kinds share. `straight` is set by the regime for the coming forward passes: True while the
    discrete choices may move, False once they are fixed. It is no state."""

    straight: bool = True
    draft: bool = False  # while the checkpoints of a training run are described

    def spec(self) -> dict[str, Any]:
        """Raises ValueError: whoever asks for a spec is about to write a final checkpoint."""
        if not self.draft:
            raise ValueError(
                f"the model is still in training: a {self.kind} of shape {self.shape} holds dense masters "
                f"({self.nbytes:,} bytes). Call finish_() of its StraightThrough regime, and save then"
            )
        return super().spec()

    @abstractmethod
    def master(self) -> nn.Parameter:
        """The dense parameter that the gradients go straight through to."""

    @abstractmethod
    def gap(self) -> Tensor:
        """The master minus what the forward pass uses of it, detached: what decay shrinks."""

    @abstractmethod
    def moved(self) -> float:
        """The share of the choices that differ from those at the start."""

    @abstractmethod
    def export(self) -> Structure:
        """The small structure of the same function."""


class CodeMaster(Master, kind="code_master"):
    """The coefficient reading: dense coefficients of which every row and block uses its largest. [DSFormer]

    codes       (rows, blocks, atoms), the parameter Z
    dictionary  (blocks, atoms, width), a parameter; that of the `SparseCode`, shared where it was shared
    mask        (rows, blocks, atoms) bool: the places in use, `nonzeros` of them in every row and block
    first       the same at the start

    Sizes, orientation and their checks are those of `SparseCode`. The forward pass multiplies the masked
    codes as a dense matrix: gradients need its every entry, used or not.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        atoms: int,
        nonzeros: int,
        blocks: int = 1,
        orient: str = "in",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(shape)
        like = SparseCode(
            self.shape, atoms=atoms, nonzeros=nonzeros, blocks=blocks, orient=orient, device="meta"
        )
        self.orient, self.blocks, self.atoms, self.nonzeros = orient, blocks, like.atoms, like.nonzeros
        size, options = (like.code_rows, blocks, like.atoms), {"dtype": dtype, "device": device}
        self.codes = nn.Parameter(torch.zeros(size, **options))  # type: ignore[arg-type]
        self.dictionary = nn.Parameter(torch.zeros(blocks, like.atoms, like.width, **options))  # type: ignore[arg-type]
        self.mask: Tensor
        self.first: Tensor
        self.register_buffer("mask", torch.zeros(size, dtype=torch.bool, device=device))
        self.register_buffer("first", torch.zeros(size, dtype=torch.bool, device=device))

    @classmethod
    def of(cls, structure: SparseCode, weight: Tensor | None = None) -> CodeMaster:
        """The master of a sparse code: its entries in their places, zero elsewhere.

        Given the `weight` (out, in) that the code stands for, what is not in use starts at its correlation
        with the residual, (W − C D) Dᵀ, as a straight-through step on the weight's own error would leave it;
        at most at the size of the smallest in use, so that the choices are still the code's. From zero, a
        place would need many steps to be considered at all.
        """
        sizes = {key: value for key, value in structure.sizes().items() if key != "storage"}
        master = cls(structure.shape, **sizes, device="meta")
        index, values = structure.index().long(), structure.coefficients().detach()
        empty = values.new_zeros(*index.shape[:2], structure.atoms)
        master.codes = nn.Parameter(empty.scatter(-1, index, values), structure.values.requires_grad)
        master.dictionary = structure.dictionary
        master.mask = torch.zeros_like(empty, dtype=torch.bool).scatter_(-1, index, True)
        master.first = master.mask.clone()
        if weight is not None:
            master._propose_(weight)
        return master

    @torch.no_grad()
    def _propose_(self, weight: Tensor) -> None:
        residual = weight - self.to_dense()
        parts = (residual if self.orient == "in" else residual.mT).unflatten(1, (self.blocks, -1))
        near = torch.einsum("rbw,baw->rba", parts, self.dictionary)
        norms = self.dictionary.norm(dim=-1).clamp_min(torch.finfo(near.dtype).tiny)
        lengths = self.codes.abs() * norms
        least = lengths.masked_fill(~self.mask, torch.inf).amin(-1, keepdim=True) * (1 - 1e-6)  # no rounding
        near = (near / norms).clamp(-least, least)  # along unit atoms: sizes can be compared
        self.codes.copy_(torch.where(self.mask, self.codes, near / norms))

    def coefficients(self) -> Tensor:
        """C (rows, blocks, atoms), dense: the codes in use and zeros."""
        if self.straight:
            masked: Any = _Masked.apply
            return masked(self.codes, self.mask)
        return self.codes * self.mask

    def forward(self, x: Tensor) -> Tensor:
        codes = self.coefficients().flatten(1)
        if self.orient == "out":
            return per_block(x @ codes, self.dictionary)
        return F.linear(per_block(x, self.dictionary.mT), codes)

    def rows(self, index: Tensor) -> Tensor:
        codes = self.coefficients().flatten(1)
        if self.orient == "out":
            return F.embedding(index, per_block(codes, self.dictionary).mT)
        return per_block(F.embedding(index, codes), self.dictionary)

    def select_(self, count: int) -> None:
        """Let every row and block use its `count` largest codes. Exactly `count`: of equals, the ones in use
        stay, then the first ones win."""
        size = self.codes.detach().abs()
        weakest = size.masked_fill(~self.mask, torch.inf).amin(-1)
        strongest = size.masked_fill(self.mask, -1.0).amax(-1)
        # Few rows change in a step: only those are sorted.
        stale = (weakest < strongest) | (self.mask.sum(-1) != count)
        best = size[stale].sort(dim=-1, descending=True, stable=True).indices[:, :count]
        self.mask[stale] = torch.zeros_like(self.mask[stale]).scatter_(-1, best, True)

    @torch.no_grad()
    def scale_(self, norms: Tensor) -> None:
        """Multiply the codes by the norms (blocks, atoms) that the dictionary's rows were divided by."""
        self.codes.mul_(norms)

    def master(self) -> nn.Parameter:
        return self.codes

    def gap(self) -> Tensor:
        return self.codes.detach().masked_fill(self.mask, 0.0)

    def moved(self) -> float:
        return float((self.mask & ~self.first).sum()) / float(self.first.sum())

    @torch.no_grad()
    def export(self) -> SparseCode:
        if bool((self.mask.sum(-1) != self.nonzeros).any()):
            self.select_(self.nonzeros)
        index = self.mask.nonzero()[:, -1].view(*self.mask.shape[:2], self.nonzeros)
        values = self.codes.gather(-1, index)
        structure = SparseCode.of(self.dictionary, values, index, orient=self.orient)
        structure.values.requires_grad_(self.codes.requires_grad)
        return structure

    @property
    def macs(self) -> int:
        return self.codes.numel() + self.dictionary.numel()

    def sizes(self) -> dict[str, Any]:
        return {
            "atoms": self.atoms,
            "nonzeros": self.nonzeros,
            "blocks": self.blocks,
            "orient": self.orient,
        }


class WeightMaster(Master, kind="weight_master"):
    """The weight reading: a dense weight, of which the forward pass sees a factorization of any kind.

    full    (out, in), the parameter W
    fitted  the structure that stands for it; its tensors do not train, they are fitted anew
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        fitted: Mapping[str, Any],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(shape)
        self.full = nn.Parameter(torch.zeros(self.shape, dtype=dtype, device=device))
        self.fitted: Structure
        self.adopt_(build(fitted, dtype=dtype, device=device))
        if self.fitted.shape != self.shape:
            raise ValueError(f"a factorization of shape {self.fitted.shape} does not stand for {self.shape}")

    @classmethod
    def of(cls, weight: Tensor, fitted: Structure) -> WeightMaster:
        """The master `weight` (out, in), in whose place `fitted` works."""
        master = cls(fitted.shape, fitted=fitted.spec(), device="meta")
        trains = any(parameter.requires_grad for parameter in fitted.parameters())
        master.full = nn.Parameter(weight.detach().clone(), trains)
        master.adopt_(fitted)
        return master

    def adopt_(self, fitted: Structure) -> None:
        """Take a new factorization of the master."""
        self.fitted = fitted.requires_grad_(False)
        self._product: Tensor | None = None  # its dense product; derived, never saved

    def weight(self) -> Tensor:
        """W' (out, in), with the gradient of W."""
        if self._product is None:
            self._product = self.fitted.to_dense().detach()
        if not self.straight:
            return self._product
        replaced: Any = _Replaced.apply
        return replaced(self.full, self._product)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight())

    def rows(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight())

    def master(self) -> nn.Parameter:
        return self.full

    def gap(self) -> Tensor:
        return self.full.detach() - self.weight().detach()

    def moved(self) -> float:
        """NaN: only codes have places to count."""
        return float("nan")

    def export(self) -> Structure:
        return self.fitted.requires_grad_(self.full.requires_grad)

    @property
    def macs(self) -> int:
        return self.shape[0] * self.shape[1]

    def sizes(self) -> dict[str, Any]:
        return {"fitted": self.fitted.spec()}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        self._product = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._product = None  # the children load after this, and nothing runs in between


class _Masked(torch.autograd.Function):
    """codes ∘ mask; backward is the identity onto the codes."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, mask: Tensor) -> Tensor:
        return codes * mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Replaced(torch.autograd.Function):
    """The product in place of the weight; backward is the identity onto the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, product: Tensor) -> Tensor:
        return product.view_as(product)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
