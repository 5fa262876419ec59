"""The GPU kernels, in Triton: products of a few tokens with sparse codes that are read as they are stored.

    mask     a tile of rows by columns: a running count of the bits says where each set bit's value lies, so
             the tile is rebuilt in registers and multiplied there, on tensor cores from two tokens on
    index    a tile of rows by entries: places are cut out of the bit stream, inputs come from the cache

Bits, not int32 places: decode is bound by bytes, and an int32 place takes as many as one or two values do.
Tested against the naive twin in Triton's interpreter, and it compiles for sm_90; not measured on a GPU. Cᵀ x
is summed with atomic additions, so its last bits differ from run to run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankfold.packing import index_width

TYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS, COLUMNS = 16, 128  # of a tile


@triton.jit
def _mask_kernel(
    x, y, values, support, rows, columns, count, tokens,
    TRANSPOSED: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
    FACTORS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    t = tl.arange(0, TOKENS)
    row_there, token_there = r < rows, t < tokens
    before = tl.zeros((TILE_ROWS,), tl.int32)  # entries of the row in earlier tiles
    total = tl.zeros((TILE_ROWS, TOKENS), tl.float32)
    if TRANSPOSED:
        mine = tl.load(
            x + t[:, None] * rows + r[None, :], mask=token_there[:, None] & row_there[None, :], other=0.0
        ).to(FACTORS)  # (TOKENS, TILE_ROWS)
    for start in range(0, columns, TILE_COLUMNS):
        c = start + tl.arange(0, TILE_COLUMNS)
        there = row_there[:, None] & (c < columns)[None, :]
        bit = r.to(tl.int64)[:, None] * columns + c[None, :]
        byte = tl.load(support + (bit >> 3), mask=there, other=0).to(tl.int32)
        taken = (byte >> (bit & 7).to(tl.int32)) & 1
        entry = before[:, None] + tl.cumsum(taken, 1) - taken
        # entry < count: a damaged mask gives wrong numbers, never a read out of bounds
        wanted = there & (taken == 1) & (entry < count)
        tile = tl.load(values + r.to(tl.int64)[:, None] * count + entry, mask=wanted, other=0.0).to(FACTORS)
        before += tl.sum(taken, 1)
        outside = token_there[None, :] & (c < columns)[:, None]  # (TILE_COLUMNS, TOKENS)
        if TRANSPOSED:
            if TOKENS == 1:
                part = tl.sum(tile * tl.reshape(mine, (TILE_ROWS, 1)), 0)[:, None]
            else:
                part = tl.trans(tl.dot(mine, tile, input_precision="ieee"))
            tl.atomic_add(y + t[None, :] * columns + c[:, None], part, mask=outside)
        else:
            near = tl.load(x + t[None, :] * columns + c[:, None], mask=outside, other=0.0).to(FACTORS)
            if TOKENS == 1:
                total += tl.sum(tile * tl.reshape(near, (1, TILE_COLUMNS)), 1)[:, None]
            else:
                total += tl.dot(tile, near, input_precision="ieee")
    if not TRANSPOSED:
        out = row_there[:, None] & token_there[None, :]
        tl.store(y + t[None, :] * rows + r[:, None], total, mask=out)


@triton.jit
def _index_kernel(
    x, y, values, support, size, rows, columns, count, atoms, nonzeros,
    WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_ENTRIES: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    token = tl.program_id(1)
    row_there = r < rows
    total = tl.zeros((TILE_ROWS,), tl.float32)
    if TRANSPOSED:
        mine = tl.load(x + token * rows + r, mask=row_there, other=0.0).to(tl.float32)
    for start in range(0, count, TILE_ENTRIES):
        e = start + tl.arange(0, TILE_ENTRIES)
        there = row_there[:, None] & (e < count)[None, :]
        entry = r.to(tl.int64)[:, None] * count + e[None, :]
        bit = entry * WIDTH
        word = tl.zeros((TILE_ROWS, TILE_ENTRIES), tl.int64)
        for i in tl.static_range((WIDTH + 14) // 8):  # bytes that WIDTH bits may touch
            byte = tl.load(support + (bit >> 3) + i, mask=there & ((bit >> 3) + i < size), other=0)
            word |= byte.to(tl.int64) << (8 * i)
        place = (word >> (bit & 7)) & ((1 << WIDTH) - 1)
        wanted = there & (place < atoms)  # a damaged index gives wrong numbers, never a read out of bounds
        place += (e // nonzeros * atoms)[None, :]
        value = tl.load(values + entry, mask=wanted, other=0.0).to(tl.float32)
        if TRANSPOSED:
            tl.atomic_add(y + token * columns + place, value * mine[:, None], mask=wanted)
        else:
            near = tl.load(x + token * columns + place, mask=wanted, other=0.0).to(tl.float32)
            total += tl.sum(value * near, 1)
    if not TRANSPOSED:
        tl.store(y + token * rows + r, total, mask=row_there)


def product(
    x: Tensor, values: Tensor, support: Tensor, packing: str, layout: Sequence[int], transposed: bool
) -> Tensor:
    """C x, or Cᵀ x, for x (tokens, ·), in x's dtype, summed in float32."""
    rows, blocks, atoms, nonzeros = layout
    columns, count, tokens = blocks * atoms, blocks * nonzeros, len(x)
    x, values, support = x.contiguous(), values.contiguous(), support.contiguous()
    y = x.new_zeros(tokens, columns if transposed else rows, dtype=torch.float32)
    tiles = triton.cdiv(rows, ROWS)
    # Tensor cores multiply halves; Triton's interpreter would take the bits of a bfloat16 for an integer.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and x.dtype == torch.bfloat16
    halves = x.dtype == values.dtype != torch.float32 and not interpreted
    if packing == "mask":
        kernel: Any = _mask_kernel[(tiles,)]  # its compile-time parameters take plain numbers
        kernel(
            x, y, values, support, rows, columns, count, tokens,
            TRANSPOSED=transposed, TILE_ROWS=ROWS, TILE_COLUMNS=COLUMNS,
            TOKENS=1 if tokens == 1 else max(16, triton.next_power_of_2(tokens)),
            FACTORS=getattr(tl, str(x.dtype).removeprefix("torch.")) if halves else tl.float32,
        )  # fmt: skip
    else:
        kernel = _index_kernel[(tiles, tokens)]
        kernel(
            x, y, values, support, support.numel(), rows, columns, count, atoms, nonzeros,
            WIDTH=index_width(atoms), TRANSPOSED=transposed, TILE_ROWS=ROWS,
            TILE_ENTRIES=min(COLUMNS, triton.next_power_of_2(count)),
        )  # fmt: skip
    return y.to(x.dtype)
