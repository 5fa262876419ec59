"""Products with sparse codes C (rows, columns) that keep exactly `count` entries in every row.

    multiply              y[r] = Σ_l values[r, l] t[index[r, l]]      y = C t
    multiply_transposed   u[c] = Σ_{index[r, l] = c} values[r, l] x[r]      u = Cᵀ x

Each is the other's backward; the gradient of the values is the product x tᵀ at the stored places only. Few
tokens are bound by memory, so a kernel reads the packed places as they are stored (`rankfold.kernels`). Many
tokens are bound by arithmetic, where nothing beats a dense product of C rebuilt for the occasion. `path_of`
says in words which of them a call takes: C is never multiplied as a dense matrix silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rankfold import kernels
from rankfold.kernels import reference

PATHS = {
    "native": "CPU kernel that reads the packed places",
    "triton": "GPU kernel that reads the packed places",
    "dense": "codes rebuilt as a dense matrix, then a dense product",
    "gather": "entries gathered one by one (naive)",
}


class Codes:
    """Codes of `rows` rows: in each of `blocks` blocks of `atoms` columns a row has `nonzeros` entries.

    support  flat uint8: the places, as a bit mask or as bit-packed indices (`rankfold.packing`)
    packing  "mask" | "index": which of the two
    values   (rows, blocks·nonzeros) by ascending place, or None for places alone; may require a gradient
    """

    def __init__(
        self,
        *,
        rows: int,
        blocks: int,
        atoms: int,
        nonzeros: int,
        packing: str,
        support: Tensor,
        values: Tensor | None = None,
    ) -> None:
        self.layout = [rows, blocks, atoms, nonzeros]
        self.packing, self.support, self._values = packing, support, values
        if values is not None and values.shape != (self.rows, self.count):
            raise ValueError(
                f"values {tuple(values.shape)} do not fit codes of {self.rows} rows with {self.count} entries"
            )

    @property
    def rows(self) -> int:
        return self.layout[0]

    @property
    def columns(self) -> int:
        """blocks·atoms, the width of C."""
        return self.layout[1] * self.layout[2]

    @property
    def count(self) -> int:
        """blocks·nonzeros, the entries of a row."""
        return self.layout[1] * self.layout[3]

    @property
    def values(self) -> Tensor:
        if self._values is None:
            raise ValueError("these codes have places but no values; use `with_values`")
        return self._values

    def with_values(self, values: Tensor) -> Codes:
        """The same places with values (rows, blocks·nonzeros)."""
        sizes = dict(zip(("rows", "blocks", "atoms", "nonzeros"), self.layout, strict=True))
        return Codes(**sizes, packing=self.packing, support=self.support, values=values)

    def index(self) -> Tensor:
        """The column of every entry, (rows, count) int32, ascending in each row. Decoded at every call: kept,
        it would cost more than the values. Raises ValueError where the support is damaged."""
        return places(self.support, self.packing, self.layout)

    def dense(self, index: Tensor | None = None) -> Tensor:
        """C (rows, columns), or its rows C[index] (*index.shape, columns); differentiable in the values."""
        where, values = self.index().long(), self.values
        if index is not None:
            where, values = where[index], torch.nn.functional.embedding(index, values)
        return values.new_zeros(*values.shape[:-1], self.columns).scatter(-1, where, values)


def multiply(t: Tensor, codes: Codes, *, path: str | None = None) -> Tensor:
    """C t for every t (..., columns): (..., rows), in t's dtype.

    Sums in float32, or float64 where either side is. `path` forces one of PATHS (for tests and benchmarks).
    """
    return _product(t, codes, False, path)


def multiply_transposed(x: Tensor, codes: Codes, *, path: str | None = None) -> Tensor:
    """Cᵀ x for every x (..., rows): (..., columns), in x's dtype; otherwise as `multiply`."""
    return _product(x, codes, True, path)


def factored(x: Tensor, dictionary: Tensor, codes: Codes, orient: str = "in") -> Tensor:
    """x Wᵀ for W = C D (orient "in") or W = (C D)ᵀ (orient "out"), D block-diagonal from its blocks.

    x (..., in), dictionary (blocks, atoms, width). A few tokens on a CPU take one kernel call for both.
    """
    turned, values = orient == "out", codes.values
    across = codes.rows if turned else dictionary.shape[0] * dictionary.shape[2]
    if x.shape[-1] == across and dictionary.dtype == values.dtype and _plainly(x, dictionary, values):
        tokens = x.numel() // across
        if (
            x.device.type == "cpu"
            and tokens <= kernels.FUSED_TOKENS
            and kernels.takes(tokens, x.dtype, values.dtype, x.device)
        ):
            flat = x.reshape(tokens, across)
            y = kernels.product(flat, values, codes.support, codes.packing, codes.layout, turned, dictionary)
            assert y is not None
            return y.view(*x.shape[:-1], y.shape[1])
    if turned:
        return per_block(multiply_transposed(x, codes), dictionary)
    return multiply(per_block(x, dictionary.mT), codes)


def per_block(x: Tensor, factor: Tensor) -> Tensor:
    """x (..., blocks·a) times factor (blocks, a, b), block by block: (..., blocks·b)."""
    if factor.shape[0] == 1:
        return x @ factor[0]
    blocks, a, b = factor.shape
    parts = x.reshape(-1, blocks, a).transpose(0, 1) @ factor  # (blocks, tokens, b)
    return parts.transpose(0, 1).reshape(*x.shape[:-1], blocks * b)


def path_of(codes: Codes, tokens: int, *, dtype: torch.dtype | None = None) -> str:
    """How a product with `tokens` inputs of `dtype` (the values' by default) is computed, in words."""
    values = codes.values
    name = _choose(tokens, dtype or values.dtype, values.dtype, values.device)
    reason = kernels.why_not(values.device)
    return PATHS[name] + (f"; no kernel: {reason}" if name == "dense" and reason else "")


def _choose(tokens: int, dtype: torch.dtype, stored: torch.dtype, device: torch.device) -> str:
    if kernels.takes(tokens, dtype, stored, device):
        return "native" if device.type == "cpu" else "triton"
    return "dense"


def _product(x: Tensor, codes: Codes, transposed: bool, path: str | None) -> Tensor:
    across = codes.rows if transposed else codes.columns
    if x.shape[-1] != across or x.device != codes.values.device:
        raise ValueError(
            f"codes of {across} inputs on {codes.values.device} cannot multiply a tensor {tuple(x.shape)} on "
            f"{x.device}"
        )
    if path is not None and path not in PATHS:
        raise ValueError(f"path={path!r} must be one of {sorted(PATHS)} or None")
    flat = x.reshape(-1, across)
    # The operator takes as long as a small product: it is left out where it is not needed.
    apply = _multiplied if _plainly(x, codes.values) else product
    y = apply(flat, codes.values, codes.support, codes.packing, codes.layout, transposed, path or "")
    return y.view(*x.shape[:-1], y.shape[-1])


def _plainly(*tensors: Tensor) -> bool:
    """Whether these are mere numbers: on one device, and nobody (autograd, a compiler) watches."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    device, grad = tensors[0].device, torch.is_grad_enabled()
    if device.type == "meta" or torch.is_autocast_enabled(device.type):
        return False
    plain = (Tensor, torch.nn.Parameter)
    return all(type(t) in plain and t.device == device and not (grad and t.requires_grad) for t in tensors)


def _multiplied(
    x: Tensor,
    values: Tensor,
    support: Tensor,
    packing: str,
    layout: Sequence[int],
    transposed: bool,
    path: str,
) -> Tensor:
    """C x, or Cᵀ x if `transposed`, for x (tokens, ·)."""
    if not len(x):
        return x.new_zeros(0, layout[1] * layout[2] if transposed else layout[0])
    path = path or _choose(len(x), x.dtype, values.dtype, values.device)
    if path in ("native", "triton"):
        found = kernels.product(x, values, support, packing, layout, transposed)
        if found is not None:
            return found
        path = "dense"
    if path == "gather":
        exact = x.to(reference.summed_in(x, values))
        y = reference.gathered(exact, values, support, packing, layout, transposed)
    else:
        wide = x.to(torch.promote_types(x.dtype, values.dtype))
        y = reference.rebuilt(wide, values, support, packing, layout, transposed, kernels.dense_rows)
    return y.to(x.dtype).contiguous()


# The three operators below are opaque to the compiler and to autograd, which see only their shapes and their
# formulas. `layout` is [rows, blocks, atoms, nonzeros]; `path` is one of PATHS, or "" to choose.


@torch.library.custom_op("rankfold::codes_places", mutates_args=())
def places(support: Tensor, packing: str, layout: Sequence[int]) -> Tensor:
    """The column of every entry, (rows, count) int32."""
    return reference.places(support, packing, layout, slice(0, layout[0]))


@places.register_fake
def _(support: Tensor, packing: str, layout: Sequence[int]) -> Tensor:
    return support.new_empty(layout[0], layout[1] * layout[3], dtype=torch.int32)


product = torch.library.custom_op("rankfold::codes_product", _multiplied, mutates_args=())


@product.register_fake
def _(
    x: Tensor,
    values: Tensor,
    support: Tensor,
    packing: str,
    layout: Sequence[int],
    transposed: bool,
    path: str,
) -> Tensor:
    return x.new_empty(x.shape[0], layout[1] * layout[2] if transposed else layout[0])


@torch.library.custom_op("rankfold::codes_sampled", mutates_args=())
def sampled(x: Tensor, t: Tensor, support: Tensor, packing: str, layout: Sequence[int], path: str) -> Tensor:
    """Σ over tokens of x[·, r] t[·, c] at the stored places (r, c): (rows, count), in the wider dtype."""
    wide = torch.promote_types(x.dtype, t.dtype)
    exact = reference.summed_in(x, t) if path == "gather" else wide
    taking = None if path == "gather" else kernels.entries_of
    found = reference.sampled(x.to(exact), t.to(exact), support, packing, layout, taking)
    return found.to(wide)


@sampled.register_fake
def _(x: Tensor, t: Tensor, support: Tensor, packing: str, layout: Sequence[int], path: str) -> Tensor:
    return x.new_empty(layout[0], layout[1] * layout[3], dtype=torch.promote_types(x.dtype, t.dtype))


def _save_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, support, *ctx.rest = inputs
    ctx.save_for_backward(x, values, support)


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, values, support = ctx.saved_tensors
    packing, layout, transposed, path = ctx.rest
    to_x = to_values = None
    if ctx.needs_input_grad[0]:
        to_x = product(grad, values, support, packing, layout, not transposed, path).to(x.dtype)
    if ctx.needs_input_grad[1]:
        pair = (x, grad) if transposed else (grad, x)
        to_values = sampled(*pair, support, packing, layout, path).to(values.dtype)
    return to_x, to_values, None, None, None, None, None


product.register_autograd(_product_backward, setup_context=_save_product)


def _save_sampled(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, t, support, *ctx.rest = inputs
    ctx.save_for_backward(x, t, support)


def _sampled_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, t, support = ctx.saved_tensors
    packing, layout, path = ctx.rest
    to_x = product(t, grad, support, packing, layout, False, path).to(x.dtype)
    to_t = product(x, grad, support, packing, layout, True, path).to(t.dtype)
    return to_x, to_t, None, None, None, None


sampled.register_autograd(_sampled_backward, setup_context=_save_sampled)
