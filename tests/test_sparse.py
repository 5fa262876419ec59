"""Sparse: a structure like any other, with places that are drawn fairly and checked."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensor_bytes import peak_bytes
from torch import nn
from toy_sltrain import gradients, pair

from rankfold import sparse
from rankfold.sparse import Sparse, place_dtype, product
from rankfold.structure import build
from rankfold.structures import Sum
from rankfold.testing import check_host, check_structure


@given(
    shape=st.tuples(*[st.sampled_from((1, 2, 3, 5, 8, 13))] * 2),
    share=st.floats(0, 1),
    dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16)),
)
def test_laws(shape: tuple[int, int], share: float, dtype: torch.dtype) -> None:
    nonzeros = 1 + int(share * (math.prod(shape) - 1))
    check_structure(Sparse(shape, nonzeros=nonzeros, dtype=dtype))
    total = pair(*shape, 1, nonzeros).to(dtype)
    check_structure(total)
    check_structure(Sum.of(total.terms[1], total.terms[0]))


@pytest.mark.parametrize("nonzeros", [3, 35])
def test_compiles_without_graph_breaks(nonzeros: int) -> None:
    check_structure(Sparse((7, 5), nonzeros=nonzeros), compile=True)
    check_structure(pair(7, 5, 2, nonzeros), compile=True)
    total, index = pair(7, 5, 2, nonzeros), torch.tensor([[3, 0], [3, 6]])
    found = torch.compile(total.rows, fullgraph=True, backend="eager")(index)
    torch.testing.assert_close(found, total.to_dense()[index])


def test_hosts() -> None:
    check_host(nn.Linear(5, 7), torch.randn(2, 5), structure=pair(7, 5, 2, 6))
    check_host(nn.Conv2d(3, 7, 2), torch.randn(2, 3, 5, 5), structure=pair(7, 12, 2, 9))
    check_host(nn.Embedding(7, 5), torch.randint(7, (2, 3)), structure=pair(7, 5, 2, 6))


@pytest.mark.parametrize(("shape", "nonzeros"), [((40, 30), 36), ((40, 30), 1000), ((3, 2), 6), ((1, 1), 1)])
def test_a_drawn_support_has_exactly_so_many_places_and_comes_back(
    shape: tuple[int, int], nonzeros: int
) -> None:
    one, two, other = (
        Sparse.draw(shape, nonzeros, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert one.dtype == torch.int32 and len(one) == nonzeros and torch.equal(one, two)
    assert bool((one[1:] > one[:-1]).all()) and 0 <= int(one[0]) and int(one[-1]) < math.prod(shape)
    assert nonzeros == math.prod(shape) or not torch.equal(one, other)


def test_every_place_is_drawn_equally_often() -> None:
    """Of 1,000 draws of 15 out of 50, and of 35 (drawn by what is left out): χ² of 49 degrees of freedom is
    above 85.4 once in a thousand times. Without replacement it is smaller by 1 - share."""
    random = torch.Generator().manual_seed(0)
    for nonzeros in (15, 35):
        counts, expected = torch.zeros(50), 1000 * nonzeros / 50
        for _ in range(1000):
            counts[Sparse.draw((5, 10), nonzeros, random).long()] += 1
        assert float(((counts - expected) ** 2 / expected).sum()) / (1 - nonzeros / 50) < 85.4


def test_drawing_needs_memory_for_the_nonzeros_only() -> None:
    nonzeros = 50_000
    peak = peak_bytes(lambda: Sparse.draw((20_000, 20_000), nonzeros, torch.Generator().manual_seed(0)))
    assert peak <= 64 * nonzeros < 8 * 20_000**2 / 100  # a permutation would take 8 bytes an entry


def test_wide_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 2³¹ entries on places are int64, and the same numbers come out."""
    huge = build({"kind": "sparse", "shape": [2**16, 2**16], "nonzeros": 5}, device="meta")
    assert huge.places.dtype == torch.int64 and huge.nbytes == 5 * (4 + 8)
    assert place_dtype((2**15, 2**16 - 1)) == torch.int32 and place_dtype((2**15, 2**16)) == torch.int64
    narrow, x = pair(40, 30, 3, 90), torch.randn(4, 30, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(sparse, "WIDE", 1)
    wide = pair(40, 30, 3, 90)
    assert (wide.terms[1].places.dtype, wide.nbytes - narrow.nbytes) == (torch.int64, 4 * 90)
    check_structure(wide)
    for one, two in zip(
        *(gradients(lambda t=t: t(x), [x, *t.parameters()]) for t in (narrow, wide)), strict=True
    ):
        assert torch.equal(one, two)
    with torch.no_grad():
        assert torch.equal(narrow(x), wide(x)) and torch.equal(narrow.to_dense(), wide.to_dense())


def test_a_cast_leaves_the_index_alone() -> None:
    total = pair(40, 30, 3, 90)
    places = total.terms[1].places.clone()
    half = total.to(torch.bfloat16)
    assert half.terms[1].places.dtype == torch.int32 and torch.equal(half.terms[1].places, places)


DAMAGES = {
    "unsorted": (lambda p: p.flip(0), "do not exceed the one before"),
    "twice": (lambda p: p.clone().index_copy_(0, torch.tensor([4]), p[3:4]), "1 of 6 places do not exceed"),
    "too large": (lambda p: p.clone().index_fill_(0, torch.tensor([5]), 35), "between 0 and 35, expected 0"),
    "negative": (lambda p: p.clone().index_fill_(0, torch.tensor([0]), -1), "between -1 and"),
    "short": (lambda p: p[:-1], "expected"),
    "floats": (lambda p: p.float(), "expected"),
    "wide": (lambda p: p.long(), "expected"),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_support_is_refused(how: str) -> None:
    change, says = DAMAGES[how]
    structure = Sparse((7, 5), nonzeros=6)
    structure.validate()
    structure.places = change(structure.places)
    with pytest.raises(ValueError, match=says):
        structure.validate()


def test_bad_sizes_are_refused() -> None:
    for nonzeros in (0, -1, 36, True, 2.0, None):
        with pytest.raises(ValueError, match=r"nonzeros=.* must be an integer between 1 and 35"):
            build({"kind": "sparse", "shape": [7, 5], "nonzeros": nonzeros}, device="meta")
    with pytest.raises(ValueError, match="do not exceed the one before"):
        Sparse.of((7, 5), torch.ones(2), torch.tensor([3, 3]))
    with pytest.raises(ValueError, match="does not split by rows"):
        Sparse((7, 5), nonzeros=3).split([3, 4])
    with pytest.raises(RuntimeError, match="dtype"):  # as nn.Linear
        product(torch.ones(2, 5), torch.ones(3, dtype=torch.float64), torch.arange(3), 7)
