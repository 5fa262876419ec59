"""A sparse matrix with fixed places, and the product that rebuilds W and keeps nothing dense.

    W = scale · left right,     W.flat[places] += values,     y = x Wᵀ           [SLTrain, arXiv 2406.02214]

With plain autograd that keeps a dense W for every layer. Here W is dropped after the product and rebuilt in
the backward pass, where it is freed before G = Gyᵀ x is formed:

    dx = Gy W     dleft = scale · G rightᵀ     dright = scale · leftᵀ G     dvalues = G.flat[places]

It saves memory and parameters, not arithmetic: 4·rank / 3·(rows of x) more than a dense layer's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.structure import Structure, check_size

FEW = 64  # rows of x up to which an accelerator multiplies the entries one by one
WIDE = 2**31  # from so many entries of W on, places are int64


class Sparse(Structure, kind="sparse"):
    """W is zero except at `nonzeros` fixed places. [the sparse term of SLTrain]

    values  (nonzeros,), a parameter
    places  (nonzeros,), a buffer: flat row-major indices row·in + column, strictly ascending; int32, or int64
            where out·in >= 2³¹
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        nonzeros: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(shape)
        entries = self.shape[0] * self.shape[1]
        self.nonzeros = check_size(f"sparse structure of shape {self.shape}: nonzeros", nonzeros, entries)
        self.values = nn.Parameter(torch.empty(self.nonzeros, dtype=dtype, device=device))
        self.places: Tensor
        first = torch.arange(self.nonzeros, dtype=place_dtype(self.shape), device=device)
        self.register_buffer("places", first)  # until others are drawn or loaded
        if not self.values.is_meta:
            nn.init.uniform_(self.values, -(self.shape[1] ** -0.5), self.shape[1] ** -0.5)

    @classmethod
    def of(cls, shape: tuple[int, int], values: Tensor, places: Tensor) -> Sparse:
        """From values (nonzeros,) and their places (nonzeros,), integers in strictly ascending order. Raises
        ValueError for places that are not."""
        structure = cls(shape, nonzeros=len(values), dtype=values.dtype, device="meta")
        structure.values = nn.Parameter(values.contiguous())
        structure.places = places.to(place_dtype(structure.shape)).contiguous()
        structure.validate()
        return structure

    @staticmethod
    def draw(shape: tuple[int, int], nonzeros: int, generator: torch.Generator) -> Tensor:
        """`nonzeros` places of a matrix (out, in), uniform without replacement, ascending, on the CPU.

        Needs at most 64 bytes a nonzero while it runs, not a permutation of out·in: it draws as many as are
        missing, drops those that it has, and goes on. No place is favoured: all supports are equally likely.
        """
        entries = shape[0] * shape[1]
        check_size(f"sparse structure of shape {shape}: nonzeros", nonzeros, entries)
        if 2 * nonzeros > entries:  # the places left out are the fewer ones
            left_out = Sparse.draw(shape, entries - nonzeros, generator) if nonzeros < entries else []
            free = torch.ones(entries, dtype=torch.bool)
            free[left_out] = False
            return free.nonzero().flatten().to(place_dtype(shape))
        drawn = torch.empty(0, dtype=torch.int64)
        while len(drawn) < nonzeros:
            missing = nonzeros - len(drawn)
            # 62 bits, then the remainder: `randint(entries)` may lean to small numbers (32 bits).
            more = torch.randint(2**62, (missing,), generator=generator) % entries
            drawn = torch.cat([drawn, more]).unique()
        return drawn.to(place_dtype(shape))

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ. Saves x, values and places for the backward pass, and nothing else."""
        if torch.is_grad_enabled() or not self.entrywise(x):
            return product(x, self.values, self.places, self.shape[0])
        (out, inner), rows, dtype = self.shape, x.numel() // self.shape[1], _autocast_dtype(x) or x.dtype
        # Entries are sorted by row: y[:, i] sums over a segment of them, a weighted bag of columns of x.
        ends = torch.arange(0, out * inner + 1, inner, dtype=self.places.dtype, device=self.places.device)
        y = F.embedding_bag(
            self.places % inner,
            x.reshape(rows, inner).mT.to(dtype).contiguous(),
            torch.searchsorted(self.places, ends, out_int32=self.places.dtype == torch.int32),
            mode="sum",
            per_sample_weights=self.values.to(dtype),
            include_last_offset=True,
        )  # (out, rows)
        return y.mT.reshape(*x.shape[:-1], out)

    def entrywise(self, x: Tensor) -> bool:
        """Whether multiplying the entries one by one is faster than filling up W and multiplying that: as
        measured on a CPU, at any number of rows."""
        few = x.device.type == "cpu" or x.numel() <= FEW * self.shape[1]
        return few and x.numel() > 0 and 4 * self.nonzeros <= self.shape[0] * self.shape[1]

    def rows(self, index: Tensor) -> Tensor:
        out, inner = self.shape
        if torch.compiler.is_compiling():  # the number of entries in some rows is no static shape
            full = self.values.new_zeros(out * inner).index_put((self.places.long(),), self.values)
            return F.embedding(index, full.view(out, inner))
        first = index.reshape(-1).long() * inner
        bounds = torch.stack([first, first + inner]).to(self.places.dtype)
        start, end = torch.searchsorted(self.places, bounds)
        counts = end - start
        which = torch.arange(len(first), device=first.device).repeat_interleave(counts)
        # The entries of row i of the answer are consecutive ones of W, from start[i] on.
        entry = torch.arange(len(which), device=first.device) + (start - counts.cumsum(0) + counts)[which]
        target = which * inner + self.places[entry] - first[which]
        flat = self.values.new_zeros(len(first) * inner).index_put((target,), self.values[entry])
        return flat.view(*index.shape, inner)

    @property
    def macs(self) -> int:
        return self.nonzeros

    def sizes(self) -> dict[str, Any]:
        return {"nonzeros": self.nonzeros}

    def validate(self) -> None:
        entries, wanted = self.shape[0] * self.shape[1], place_dtype(self.shape)
        where = f"sparse structure of shape {self.shape}"
        found = (self.places.dtype, *self.places.shape)
        if found != (wanted, self.nonzeros):
            raise ValueError(f"{where}: places are {found}, expected {(wanted, self.nonzeros)}")
        unsorted = int((self.places[1:] <= self.places[:-1]).sum())
        if unsorted:
            raise ValueError(f"{where}: {unsorted} of {self.nonzeros} places do not exceed the one before")
        first, last = int(self.places[0]), int(self.places[-1])
        if first < 0 or last >= entries:
            raise ValueError(f"{where}: places lie between {first} and {last}, expected 0 to {entries - 1}")


def place_dtype(shape: tuple[int, int]) -> torch.dtype:
    """int32 while it can number every entry: half the bytes of int64."""
    return torch.int32 if shape[0] * shape[1] < WIDE else torch.int64


def plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is exactly of this class and nobody has hooked into its forward: only then may its
    weight be used without calling it. An adapter, a quantizer or an offloader puts itself in between."""
    return (
        type(module) is kind
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and "forward" not in vars(module)
        and all(p is None or type(p) in (nn.Parameter, Tensor) for p in module._parameters.values())
    )


def product(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    out: int,
    left: Tensor | None = None,
    right: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """x Wᵀ for W = scale · left right + the sparse matrix of `values` at `places`: x (..., in), y (..., out).

    left (out, rank), right (rank, in), or both None. Keeps x and the parameters for the backward pass. Under
    autocast it computes in that dtype; gradients have the parameters'. Deterministic, as places are unique.
    """
    arguments = (x, values, places, left, right, out, scale, _autocast_dtype(x))
    if not torch.is_grad_enabled():
        return _applied(*arguments)
    return product_op(*arguments) if torch.compiler.is_compiling() else _Product.apply(*arguments)


def rebuilt(
    values: Tensor,
    places: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    shape: Sequence[int],
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """W (out, in) in `dtype`, in one allocation of its size."""
    if left is None or right is None:
        full = torch.zeros(*shape, dtype=dtype, device=values.device)
    else:
        full = left.to(dtype) @ right.to(dtype)
        if scale != 1:
            full *= scale
    full.view(-1).index_add_(0, places, values.to(dtype))
    return full


def _applied(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    out: int,
    scale: float,
    dtype: torch.dtype | None,
) -> Tensor:
    full = rebuilt(values, places, left, right, (out, x.shape[-1]), scale, dtype or values.dtype)
    return F.linear(x if dtype is None else x.to(dtype), full)


def _gradients(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    places: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    scale: float,
    dtype: torch.dtype | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Of x, values, left and right those gradients that `needs` asks for, in this order."""
    wide, shape = dtype or values.dtype, (grad.shape[-1], x.shape[-1])
    to_x, to_values, to_left, to_right = needs
    grad, found = grad.reshape(-1, shape[0]), []
    if to_x:
        # W is freed at the end of this line, before G is formed: one of them at a time.
        dx = grad @ rebuilt(values, places, left, right, shape, scale, wide)
        found.append(dx.view(x.shape).to(x.dtype))
    if to_values or to_left or to_right:
        full = grad.mT @ x.reshape(-1, shape[1]).to(wide)  # G (out, in)
        if to_values:
            found.append(full.view(-1).index_select(0, places).to(values.dtype))
        if left is not None and right is not None:
            if to_left:
                found.append((full @ right.to(wide).mT).mul_(scale).to(left.dtype))
            if to_right:
                found.append((left.to(wide).mT @ full).mul_(scale).to(right.dtype))
    return found


class _Product(torch.autograd.Function):
    """`product` with its gradients."""

    forward = staticmethod(_applied)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, values, places, left, right, _, ctx.scale, ctx.dtype = inputs
        ctx.save_for_backward(x, values, places, left, right)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return _returned(ctx, grads[0], _gradients)


def _returned(ctx: Any, grad: Tensor, gradients: Callable[..., list[Tensor]]) -> tuple[Any, ...]:
    x, values, places, left, right = ctx.saved_tensors
    to_x, to_values, _, to_left, to_right = ctx.needs_input_grad[:5]
    needs = (to_x, to_values, to_left, to_right)
    found = iter(gradients(grad, x, values, places, left, right, ctx.scale, ctx.dtype, needs))
    dx, dvalues, dleft, dright = (next(found) if need else None for need in needs)
    return dx, dvalues, None, dleft, dright, None, None, None


# For a compiler the same two are opaque operators: were it to look inside, it would find the same W built in
# the forward and in the backward pass, and keep it.
product_op = torch.library.custom_op("rankfold::rebuilt_product", _applied, mutates_args=())
gradients_op = torch.library.custom_op("rankfold::rebuilt_product_gradients", _gradients, mutates_args=())
product_op.register_autograd(
    lambda ctx, grad: _returned(ctx, grad, gradients_op), setup_context=_Product.setup_context
)


@product_op.register_fake
def _(x: Any, values: Any, places: Any, left: Any, right: Any, out: int, scale: float, dtype: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], out, dtype=dtype or values.dtype)


@gradients_op.register_fake
def _(grad: Any, x: Any, values: Any, places: Any, *others: Any) -> list[Tensor]:
    left, right, _, _, needs = others
    asked = zip((x, values, left, right), needs, strict=True)
    return [tensor.new_empty(tensor.shape) for tensor, need in asked if need]


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast would multiply x, or None where it would not touch it."""
    device = x.device.type
    if device == "meta" or not x.is_floating_point() or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
