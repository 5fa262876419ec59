"""SLTrain by plain autograd, a stack of a decoder's block linears, and the memory of one training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tensor_bytes import TensorBytes
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from rankfold.hosts import hosts
from rankfold.sparse import Sparse
from rankfold.structures import LowRank, Sum


def pair(
    out: int, inner: int, rank: int, nonzeros: int, scale: float = 0.25, dtype: Any = torch.float64
) -> Sum:
    """A sum of random factors and random values at random places."""
    random = torch.Generator().manual_seed(0)
    places = Sparse.draw((out, inner), nonzeros, random)
    left, right = (torch.randn(size, generator=random, dtype=dtype) for size in ((out, rank), (rank, inner)))
    values = torch.randn(nonzeros, generator=random, dtype=dtype)
    return Sum.of(LowRank.of(left, right, scale), Sparse.of((out, inner), values, places))


def by_autograd(x: Tensor, total: Sum) -> Tensor:
    """The same product in torch's own operations, which keep the dense W."""
    low, rest = total.terms
    full = low.scale * (low.left.weight @ low.right.weight)
    flat = full.flatten().index_add(0, rest.places, rest.values)
    return F.linear(x, flat.view(full.shape))


def gradients(f: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    y = f()
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return list(torch.autograd.grad((y * probe.to(y.dtype)).sum(), leaves))


class Block(nn.Module):
    """The seven linear layers of a decoder's block, with products of single numbers where attention was."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        for name in "qkvo":
            setattr(self, name, nn.Linear(hidden, hidden, bias=False))
        self.gate = nn.Linear(hidden, inner, bias=False)
        self.up = nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(self.q(x) * self.k(x) + self.v(x))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))

    @staticmethod
    def saved(hidden: int, inner: int) -> int:
        """Numbers a token that the backward pass needs: two inputs, q, k, o's input; gate, silu, up, their
        product."""
        return 5 * hidden + 4 * inner


class ByAutograd(nn.Module):
    """A sum of low rank and sparse in torch's own operations, which keep W until the backward pass."""

    def __init__(self, total: Sum) -> None:
        super().__init__()
        self.total, self.shape = total, total.shape

    def forward(self, x: Tensor) -> Tensor:
        return by_autograd(x, self.total)


def by_autograd_(model: nn.Module) -> nn.Module:
    for host in hosts(model).values():
        host.weight = ByAutograd(host.weight)  # type: ignore[assignment, arg-type]
    return model


@dataclass
class Step:
    """Bytes of one training step. `held`: weights, indices, gradients and the optimizer's state; `saved`:
    what the forward pass keeps for the backward pass beyond those; `transient`: one dense matrix of the
    largest linear layer; `peak`: the most that were alive at a time."""

    held: int
    saved: int
    transient: int
    peak: int

    @property
    def floor(self) -> int:
        """What no step of this kind can do without, its activations kept: W is freed before its gradient is
        formed, so there is one dense matrix at a time."""
        return self.held + self.saved + self.transient


def measured(model: nn.Module, loss_of: Callable[[], Tensor]) -> Step:
    """The second step with AdamW: gradients and moments exist, as in accumulation, and change in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    loss_of().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    state = [t for values in optimizer.state.values() for t in values.values()]
    tensors = [t for p in model.parameters() for t in (p, p.grad)] + list(model.buffers()) + state
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with TensorBytes(sum(own.values())) as counted:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of()
        loss.backward()
        del loss
        optimizer.step()
    sides = [(m.in_features, m.out_features) for m in model.modules() if hasattr(m, "out_features")]
    return Step(sum(own.values()), sum(kept.values()), 4 * max(m * n for m, n in sides), counted.peak)
