"""Small integers in as few bits as they need, so that a file has the bytes that a ratio claims.

    bit mask      which `count` of `columns` places of a row are taken, one bit a place
    bit stream    unsigned integers of `width` bits each, e.g. places of ceil(log2 columns) bits
    14-bit float  bfloat16 without its two last bits, rounded to nearest, ties to even [CoSpaDi]

Everything is flat and row-major, the lowest bit of a byte comes first, and only the last byte is padded (with
zeros). What is unpacked comes from a file and is checked: a place is in range, and no place is taken twice.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 20  # integers unpacked at a time; a multiple of 8, so that chunks end on bytes
LARGEST_14 = 0x7F7C >> 2  # the largest finite magnitude, in units of the last kept bit


def bytes_for(bits: int) -> int:
    """Whole bytes that hold `bits` bits."""
    return -(-bits // 8)


def index_width(columns: int) -> int:
    """Bits of one place among `columns`: ceil(log2 columns), at least 1."""
    return max(1, (columns - 1).bit_length())


def packing_for(columns: int, count: int) -> str:
    """ "mask" or "index": whichever takes fewer bits for `count` of `columns` places."""
    return "mask" if columns <= count * index_width(columns) else "index"


def support_bytes(packing: str, rows: int, columns: int, count: int) -> int:
    """Bytes of the packed places of `rows` rows."""
    return bytes_for(rows * (columns if packing == "mask" else count * index_width(columns)))


def pack_support(packing: str, index: Tensor, columns: int) -> Tensor:
    """Places (rows, count), ascending in each row, as flat uint8."""
    if packing == "index":
        return pack_bits(index.reshape(-1), index_width(columns))
    rows = max(1, 8 * CHUNK // columns // 8 * 8)  # a multiple of 8 rows ends on a byte
    parts = []
    for part in index.long().split(rows):
        taken = torch.zeros(len(part), columns, dtype=torch.bool, device=index.device)
        parts.append(_to_bytes(taken.scatter_(1, part, True).reshape(-1)))
    return torch.cat(parts)


def unpack_support(packing: str, support: Tensor, rows: int, columns: int, count: int) -> Tensor:
    """The places (rows, count) int32, ascending in each row.

    Raises ValueError for places that are out of range, out of order, taken twice, or not `count` in a row.
    """
    size = support_bytes(packing, rows, columns, count)
    if support.dtype != torch.uint8 or support.numel() != size:
        raise ValueError(
            f"the support of {rows} rows with {count} of {columns} places is {size} bytes (uint8); "
            f"got {support.numel()} of {support.dtype}"
        )
    return (
        unpack_mask(support, rows, columns, count)
        if packing == "mask"
        else unpack_index(support, rows, columns, count)
    )


def unpack_mask(support: Tensor, rows: int, columns: int, count: int) -> Tensor:
    """The places (rows, count) int32 of a bit mask; see `unpack_support`."""
    step = max(1, 8 * CHUNK // columns // 8 * 8)
    parts = []
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        part = support[start * columns // 8 : bytes_for(stop * columns)]
        offsets = torch.arange(stop - start, device=support.device)[:, None] * columns
        parts.append((taken(part, stop - start, columns, count, start).view(-1, count) - offsets).int())
    return torch.cat(parts)


def taken(support: Tensor, rows: int, columns: int, count: int, first: int = 0) -> Tensor:
    """Which bits of `rows` rows of a mask are set: flat int64, ascending, counted from the first bit.

    `first` is the number of the first row, for the message. Raises ValueError for a row that has not `count`.
    """
    shifts = torch.arange(8, device=support.device)
    spread = (torch.arange(256, device=support.device)[:, None] >> shifts & 1).to(torch.uint8)
    words = spread.view(torch.int64).view(-1)  # the eight bits of a byte as eight bytes: one look-up each
    bits = words.index_select(0, support.int()).view(torch.bool)
    used = bits[: rows * columns]
    if bool(bits[rows * columns :].any()):
        raise ValueError("the mask's last byte is padded with ones: the file is damaged")
    found = used.view(rows, columns).sum(1)
    if bool((found != count).any()):
        row = int((found != count).nonzero()[0])
        raise ValueError(
            f"row {first + row} of the mask takes {int(found[row])} places, its size says {count}: the file "
            "is damaged"
        )
    if used.device.type == "cpu":  # many times faster than torch's nonzero
        return torch.from_numpy(np.flatnonzero(used.numpy()))
    return used.nonzero().view(-1)


def unpack_index(support: Tensor, rows: int, columns: int, count: int) -> Tensor:
    """The places (rows, count) int32 of bit-packed integers; see `unpack_support`."""
    index = unpack_bits(support, index_width(columns), rows * count).view(rows, count)
    if bool((index >= columns).any()):
        raise ValueError(f"an index is {int(index.max())}, but there are only {columns} places")
    if count > 1 and not bool((index[:, 1:] > index[:, :-1]).all()):
        row = int((index[:, 1:] <= index[:, :-1]).any(1).nonzero()[0])
        raise ValueError(f"the indices of row {row} are not ascending, or one is there twice")
    return index


def pack_bits(numbers: Tensor, width: int) -> Tensor:
    """Unsigned integers (n,) below 2^width as a flat uint8 bit stream."""
    places = torch.arange(width, device=numbers.device)
    parts = [
        _to_bytes((part[:, None].long() >> places & 1).bool().reshape(-1)) for part in numbers.split(CHUNK)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8, device=numbers.device)


def unpack_bits(packed: Tensor, width: int, count: int) -> Tensor:
    """The first `count` integers (int32) of a bit stream. Raises ValueError for padding that is not zero."""
    places = torch.arange(width, dtype=torch.int32, device=packed.device)
    parts = []
    for start in range(0, count, CHUNK):
        stop = min(start + CHUNK, count)
        bits = _to_bits(packed[start * width // 8 : bytes_for(stop * width)])
        used = (stop - start) * width
        if stop == count and bits[used:].any():
            raise ValueError("the bit stream's last byte is padded with ones: the file is damaged")
        parts.append((bits[:used].view(-1, width).int() << places).sum(1, dtype=torch.int32))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int32, device=packed.device)


def pack_14(values: Tensor) -> Tensor:
    """Floats of any shape as a flat uint8 stream of 14-bit floats. Raises ValueError for NaN and infinity."""
    if not bool(torch.isfinite(values).all()):
        raise ValueError("14-bit storage needs finite values")
    bits = values.detach().to(torch.bfloat16).reshape(-1).view(torch.int16).int() & 0xFFFF
    magnitude = bits & 0x7FFF
    kept, rest = magnitude >> 2, magnitude & 3
    kept = kept + ((rest == 3) | ((rest == 2) & (kept & 1 == 1))).int()
    return pack_bits((bits >> 15 << 13) | kept.clamp_max(LARGEST_14), 14)


def unpack_14(packed: Tensor, count: int) -> Tensor:
    """The `count` values (bfloat16) of a stream of 14-bit floats. Raises ValueError for NaN and infinity."""
    codes = unpack_bits(packed, 14, count)
    if bool(((codes & 0x1FFF) > LARGEST_14).any()):
        raise ValueError("a 14-bit value is NaN or infinite: the file is damaged")
    return ((codes >> 13 << 15) | ((codes & 0x1FFF) << 2)).to(torch.int16).view(torch.bfloat16)


def _to_bytes(bits: Tensor) -> Tensor:
    """Flat bool -> uint8, the last byte padded with zeros."""
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    weights = torch.tensor([1 << place for place in range(8)], dtype=torch.uint8, device=bits.device)
    return (bits * weights).sum(1, dtype=torch.uint8)


def _to_bits(packed: Tensor) -> Tensor:
    """uint8 -> flat bool."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed[:, None] >> places & 1).bool().view(-1)
