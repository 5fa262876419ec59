"""Packed bits come back as they went in, take the bytes they claim, and damage is noticed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankfold import packing
from rankfold.packing import (
    index_width,
    pack_14,
    pack_bits,
    pack_support,
    packing_for,
    support_bytes,
    unpack_14,
    unpack_bits,
    unpack_support,
)


def places(rows: int, columns: int, count: int) -> Tensor:
    """`count` random places in each row, ascending."""
    return torch.rand(rows, columns).topk(count).indices.sort(1).values


@st.composite
def supports(draw: st.DrawFn) -> tuple[int, int, int]:
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    return rows, columns, draw(st.integers(1, columns))


@pytest.mark.parametrize("form", ["mask", "index"])
@given(size=supports())
def test_a_support_comes_back(form: str, size: tuple[int, int, int]) -> None:
    rows, columns, count = size
    index = places(rows, columns, count)
    packed = pack_support(form, index, columns)
    assert packed.dtype == torch.uint8 and packed.numel() == support_bytes(form, *size)
    assert torch.equal(unpack_support(form, packed, *size), index.int())


@pytest.mark.parametrize("form", ["mask", "index"])
def test_chunks_do_not_show(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index = places(301, 13, 5)
    whole = pack_support(form, index, 13)
    monkeypatch.setattr(packing, "CHUNK", 16)
    assert torch.equal(pack_support(form, index, 13), whole)
    assert torch.equal(unpack_support(form, whole, 301, 13, 5), index.int())


def test_the_smaller_form_is_taken() -> None:
    assert [index_width(k) for k in (1, 2, 32, 33, 64)] == [1, 1, 5, 6, 6]
    assert packing_for(32, 8) == "mask"  # 32 bits against 40
    assert packing_for(64, 4) == "index"  # 24 bits against 64


@given(st.integers(1, 30), st.integers(0, 50))
def test_bit_streams(width: int, count: int) -> None:
    numbers = torch.randint(1 << width, (count,))
    packed = pack_bits(numbers, width)
    assert packed.numel() == -(-count * width // 8)
    assert torch.equal(unpack_bits(packed, width, count), numbers.int())


@pytest.mark.parametrize(
    ("bits", "rounded"),
    [
        (0x3F83, 0x3F84),
        (0x3F82, 0x3F80),
        (0x3F86, 0x3F88),
        (0x7F7F, 0x7F7C),
        (0xBF83, 0xBF84),
        (0x8000, 0x8000),
    ],
)
def test_fourteen_bits_round_to_nearest_even(bits: int, rounded: int) -> None:
    """The vectors of the paper's page: cut at two bits less than bfloat16, clamped below infinity."""
    value = torch.tensor([bits - (bits >> 15 << 16)], dtype=torch.int16).view(torch.bfloat16)
    again = unpack_14(pack_14(value), 1).view(torch.int16)
    assert int(again.item()) & 0xFFFF == rounded


def test_fourteen_bits_are_a_projection() -> None:
    values = (torch.randn(1001) * torch.logspace(-30, 30, 1001)).bfloat16()
    once = unpack_14(pack_14(values), 1001)
    assert pack_14(values).numel() == -(-1001 * 14 // 8)
    assert torch.equal(unpack_14(pack_14(once), 1001), once)
    assert float(((once.float() - values.float()) / values.float()).abs().max()) <= 2**-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_fourteen_bits_need_finite_values(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        pack_14(torch.tensor([1.0, bad]))


def test_damage_is_noticed() -> None:
    index = places(5, 12, 3)
    mask, stream = pack_support("mask", index, 12), pack_support("index", index, 12)
    with pytest.raises(ValueError, match="8 bytes"):
        unpack_support("mask", mask[:-1], 5, 12, 3)
    with pytest.raises(ValueError, match="uint8"):
        unpack_support("mask", mask.int(), 5, 12, 3)
    for place in (0, 3, 6):
        broken = mask.clone()
        broken[place] ^= 1
        with pytest.raises(ValueError, match=r"row \d of the mask takes [24] places, its size says 3"):
            unpack_support("mask", broken, 5, 12, 3)
    padded = mask.clone()
    padded[-1] |= 0x80
    with pytest.raises(ValueError, match="padded with ones"):
        unpack_support("mask", padded, 5, 12, 3)
    out_of_range = pack_bits(torch.tensor([1, 2, 15]), 4)
    with pytest.raises(ValueError, match="an index is 15, but there are only 12 places"):
        unpack_support("index", out_of_range, 1, 12, 3)
    for rows in ([1, 1, 2], [4, 3, 7]):
        with pytest.raises(ValueError, match="row 0 are not ascending"):
            unpack_support("index", pack_bits(torch.tensor(rows), 4), 1, 12, 3)
    ones = stream.clone()
    ones[-1] |= 0xF0
    with pytest.raises(ValueError, match="padded with ones"):
        unpack_support("index", ones, 5, 12, 3)
    with pytest.raises(ValueError, match="NaN or infinite"):
        unpack_14(pack_bits(torch.tensor([0x1FE0]), 14), 1)
