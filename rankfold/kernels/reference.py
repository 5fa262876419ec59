"""Products with sparse codes in plain torch: the twins that every kernel is tested against.

    gathered   entry by entry from the index; right in every dtype on every device, slow
    rebuilt    the codes as a dense matrix for the occasion, then a dense product; fast for many tokens

Both work on pieces, so that what they hold beside input and output stays below TEMPORARY bytes. `layout` is
[rows, blocks, atoms, nonzeros] throughout; C is (rows, blocks·atoms) with blocks·nonzeros entries a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from rankfold.packing import bytes_for, index_width, taken, unpack_support

TEMPORARY = 16 << 20  # bytes; more is slower, as it leaves the cache


def places(support: Tensor, packing: str, layout: Sequence[int], piece: slice) -> Tensor:
    """The columns (stop - start, blocks·nonzeros) int32 of the entries of some rows, ascending in each row.

    `piece` starts with a multiple of 8, hence with a byte. Raises ValueError for a damaged support.
    """
    _, blocks, atoms, nonzeros = layout
    rows = piece.stop - piece.start
    if packing == "mask":
        first = torch.arange(rows, device=support.device) * (blocks * atoms)
        return (_taken(support, layout, piece).view(rows, -1) - first[:, None]).int()
    bits = blocks * nonzeros * index_width(atoms)  # of a row
    part = support[piece.start * bits // 8 : bytes_for(piece.stop * bits)]
    index = unpack_support(packing, part, rows * blocks, atoms, nonzeros).view(rows, blocks, nonzeros)
    if blocks > 1:
        index = index + atoms * torch.arange(blocks, dtype=torch.int32, device=index.device)[:, None]
    return index.view(rows, blocks * nonzeros)


def _taken(support: Tensor, layout: Sequence[int], piece: slice) -> Tensor:
    """Which bits of a mask are set in some rows, counted from the first of them: flat int64, ascending."""
    _, blocks, atoms, nonzeros = layout
    part = support[piece.start * blocks * atoms // 8 : bytes_for(piece.stop * blocks * atoms)]
    return taken(part, (piece.stop - piece.start) * blocks, atoms, nonzeros, piece.start * blocks)


def _flat(support: Tensor, packing: str, layout: Sequence[int], piece: slice) -> Tensor:
    """Where the entries of some rows lie in those rows laid out densely: flat int64."""
    if packing == "mask":
        return _taken(support, layout, piece)
    index = places(support, packing, layout, piece)
    first = torch.arange(len(index), device=index.device) * (layout[1] * layout[2])
    return (index + first[:, None]).view(-1)


def gathered(
    x: Tensor, values: Tensor, support: Tensor, packing: str, layout: Sequence[int], transposed: bool
) -> Tensor:
    """C x, or Cᵀ x, for x (tokens, ·), with sums in x's dtype (float32 or float64)."""
    rows, blocks, atoms, nonzeros = layout
    turned = x.mT.contiguous()  # a row of it is what one entry reads or adds to
    y = x.new_zeros(blocks * atoms if transposed else rows, len(x))
    for tokens, piece in _pieces(layout, len(x), blocks * nonzeros * x.element_size()):
        index = places(support, packing, layout, piece)
        entries = values[piece].to(x.dtype)
        if transposed:
            terms = entries[:, :, None] * turned[piece, None, tokens]
            y[:, tokens].index_add_(0, index.view(-1), terms.flatten(0, 1))
        else:
            near = turned[:, tokens].index_select(0, index.view(-1)).view(*index.shape, -1)
            y[piece, tokens] = (entries[:, None, :] @ near).squeeze(1)
    return y.mT


def rebuilt(
    x: Tensor,
    values: Tensor,
    support: Tensor,
    packing: str,
    layout: Sequence[int],
    transposed: bool,
    rows_of: Callable[..., Tensor],
) -> Tensor:
    """C x, or Cᵀ x, for x (tokens, ·), as dense products in x's dtype with rows of C from `rows_of`.

    What several pieces add up to is summed in float32 or more.
    """
    _, blocks, atoms, nonzeros = layout
    values = values.to(x.dtype)
    pieces = list(_rows(layout, blocks * (atoms * x.element_size() + 12 * nonzeros)))
    if transposed:
        total = x.new_zeros(len(x), blocks * atoms, dtype=summed_in(x) if len(pieces) > 1 else x.dtype)
        for piece in pieces:
            total += x[:, piece] @ rows_of(values, support, packing, layout, piece)
        return total
    parts = [x @ rows_of(values, support, packing, layout, piece).mT for piece in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def dense_rows(values: Tensor, support: Tensor, packing: str, layout: Sequence[int], piece: slice) -> Tensor:
    """Some rows of C, (stop - start, blocks·atoms), from all its values."""
    dense = values.new_zeros(piece.stop - piece.start, layout[1] * layout[2])
    dense.view(-1).scatter_(0, _flat(support, packing, layout, piece), values[piece].reshape(-1))
    return dense


def sampled(
    x: Tensor,
    t: Tensor,
    support: Tensor,
    packing: str,
    layout: Sequence[int],
    entries_of: Callable[..., None] | None,
) -> Tensor:
    """Σ over tokens of x[·, r] t[·, c] at the stored places (r, c): (rows, blocks·nonzeros).

    x (tokens, rows), t (tokens, blocks·atoms), of one dtype; `entries_of` takes them out of a dense product.
    """
    rows, blocks, atoms, nonzeros = layout
    found = x.new_zeros(rows, blocks * nonzeros)
    if entries_of is not None:
        for piece in _rows(layout, blocks * (atoms * x.element_size() + 12 * nonzeros)):
            entries_of(found, x[:, piece].mT @ t, support, packing, layout, piece)
        return found
    turned, other = t.mT.contiguous(), x.mT.contiguous()
    for tokens, piece in _pieces(layout, len(x), blocks * nonzeros * x.element_size()):
        index = places(support, packing, layout, piece)
        near = turned[:, tokens].index_select(0, index.view(-1)).view(*index.shape, -1)
        found[piece] += (near @ other[piece, tokens, None]).squeeze(-1)
    return found


def entries_of(
    values: Tensor, dense: Tensor, support: Tensor, packing: str, layout: Sequence[int], piece: slice
) -> None:
    """Put the entries of `dense`, some rows (stop - start, blocks·atoms), into the values."""
    found = dense.reshape(-1).index_select(0, _flat(support, packing, layout, piece))
    values[piece] = found.view(-1, values.shape[1])


def summed_in(*tensors: Tensor) -> torch.dtype:
    """The dtype of sums: float64 where any tensor has it, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _rows(layout: Sequence[int], row_bytes: int) -> Iterator[slice]:
    """Slices of whole bytes of rows, of at most TEMPORARY bytes together (or of eight rows)."""
    step = max(8, TEMPORARY // row_bytes // 8 * 8)
    for start in range(0, layout[0], step):
        yield slice(start, min(start + step, layout[0]))


def _pieces(layout: Sequence[int], tokens: int, row_bytes: int) -> Iterator[tuple[slice, slice]]:
    """(slice of tokens, slice of rows) such that `row_bytes` for each token and row stay below TEMPORARY."""
    step = max(1, min(tokens, TEMPORARY // (8 * row_bytes)))
    for start in range(0, tokens, step):
        here = slice(start, min(start + step, tokens))
        for piece in _rows(layout, row_bytes * (here.stop - here.start)):
            yield here, piece
