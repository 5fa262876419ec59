"""Every structure obeys the laws, and the laws notice a structure that does not."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rankfold.structure import Structure, build
from rankfold.structures import Dense, LowRank, Sum
from rankfold.testing import check_structure

KINDS = ("dense", "low_rank", "sum", "nested")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def make(kind: str, shape: tuple[int, int], rank: int, dtype: torch.dtype | None = None) -> Structure:
    low = {"kind": "low_rank", "shape": list(shape), "rank": rank}
    dense = {"kind": "dense", "shape": list(shape)}
    total = {"kind": "sum", "shape": list(shape), "terms": [dense, low]}
    nested = {"kind": "sum", "shape": list(shape), "terms": [total, low, low]}
    return build({"dense": dense, "low_rank": low, "sum": total, "nested": nested}[kind], dtype=dtype)


@st.composite
def shapes(draw: Any) -> tuple[tuple[int, int], int]:
    """Odd sizes, 1 x n, n x 1, and ranks from 1 past break-even to min(out, in)."""
    shape = draw(st.tuples(*[st.sampled_from((1, 2, 3, 5, 7, 8, 13, 17))] * 2))
    return shape, draw(st.integers(1, min(shape)))


@pytest.mark.parametrize("kind", KINDS)
@given(sized=shapes(), dtype=st.sampled_from(DTYPES))
def test_laws(kind: str, sized: tuple[tuple[int, int], int], dtype: torch.dtype) -> None:
    check_structure(make(kind, *sized, dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "rank"), [((1, 9), 1), ((9, 1), 1), ((1, 1), 1), ((33, 17), 17)])
def test_laws_at_the_edges(kind: str, shape: tuple[int, int], rank: int) -> None:
    check_structure(make(kind, shape, rank, torch.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_graph_breaks(kind: str) -> None:
    check_structure(make(kind, (7, 5), 2), compile=True)


def test_of_takes_the_tensors_it_is_given() -> None:
    left, right = torch.randn(5, 3), torch.randn(3, 4)
    low = LowRank.of(left, right)
    assert (low.rank, low.shape, low.params, low.nbytes, low.macs) == (3, (5, 4), 27, 108, 27)
    assert torch.equal(low.to_dense(), left @ right)
    weight = torch.randn(5, 4)
    dense = Dense.of(weight)
    assert dense.full.weight.data_ptr() == weight.data_ptr()
    total = Sum.of(dense, low)
    assert total.terms[1] is low
    torch.testing.assert_close(total.to_dense(), weight + left @ right)
    assert Dense.of(weight.mT).full.weight.is_contiguous()
    for structure in (low, dense, total):
        check_structure(structure)


LOW = {"kind": "low_rank", "shape": [6, 4], "rank": 2}
BAD_SPECS = {
    "not an object": [1, 2],
    "no kind": {"shape": [6, 4]},
    "unknown kind": {**LOW, "kind": "monarch"},
    "kind is a number": {**LOW, "kind": 3},
    "rank missing": {"kind": "low_rank", "shape": [6, 4]},
    "shape missing": {"kind": "low_rank", "rank": 2},
    "unknown size": {**LOW, "atoms": 3},
    "rank too large": {**LOW, "rank": 7},
    "shape of three": {**LOW, "shape": [6, 4, 2]},
    "shape is a string": {**LOW, "shape": "64"},
    "empty sum": {"kind": "sum", "shape": [6, 4], "terms": []},
    "sum of strings": {"kind": "sum", "shape": [6, 4], "terms": "ab"},
    "sum of other shapes": {"kind": "sum", "shape": [6, 4], "terms": [{"kind": "dense", "shape": [4, 6]}]},
    "sum with a bad term": {"kind": "sum", "shape": [6, 4], "terms": [{**LOW, "rank": -1}]},
    "sum of too many": {"kind": "sum", "shape": [6, 4], "terms": [LOW] * 65},
    "dtype smuggled in": {**LOW, "dtype": "float32"},
}


@pytest.mark.parametrize("spec", BAD_SPECS.values(), ids=list(BAD_SPECS))
def test_a_bad_spec_is_refused(spec: Any) -> None:
    with pytest.raises(ValueError, match=r"structure|rank|sum"):
        build(spec, device="meta")


def test_a_deep_sum_is_refused_not_a_stack_overflow() -> None:
    spec: dict[str, Any] = {"kind": "dense", "shape": [2, 2]}
    for _ in range(sys.getrecursionlimit()):
        spec = {"kind": "sum", "shape": [2, 2], "terms": [spec]}
    with pytest.raises(ValueError):
        build(spec, device="meta")


def test_unknown_kind_says_what_to_do() -> None:
    with pytest.raises(
        ValueError, match=r"Unknown structure 'monarch'; known: .*'dense', .*Import the package"
    ):
        build({"kind": "monarch", "shape": [2, 2]})


def test_sum_of_nothing_or_of_two_shapes() -> None:
    with pytest.raises(ValueError, match="at least one term"):
        Sum.of()
    with pytest.raises(ValueError, match=r"term 1 of a sum has shape \(3, 2\), the sum has \(2, 3\)"):
        Sum.of(Dense((2, 3)), Dense((3, 2)))


def test_a_kind_is_taken_once() -> None:
    with pytest.raises(ValueError, match=r"'low_rank' is already taken by rankfold\.structures\.LowRank"):

        class Mine(LowRank, kind="low_rank"):
            pass


def law_of(cls: type[Structure]) -> str:
    """What `check_structure` says of a class of kind "flawed"."""
    Structure.kinds["flawed"], cls.kind = cls, "flawed"
    try:
        with pytest.raises(AssertionError) as caught:
            check_structure(cls((5, 4), rank=2))
    finally:
        del Structure.kinds["flawed"]
    return str(caught.value)


def test_the_laws_notice() -> None:
    class Shifted(LowRank):
        def forward(self, x):
            return super().forward(x) + 1e-6

    class Misread(LowRank):
        def rows(self, index):
            return super().rows(index.roll(1, -1) if index.dim() == 2 else index)

    class Frozen(LowRank):
        def forward(self, x):
            return x @ self.right.weight.detach().mT @ self.left.weight.mT + 0 * self.right.weight.sum()

    class Forgetful(LowRank):
        def __init__(self, shape, **options):
            super().__init__(shape, **options)
            self.register_buffer("shift", torch.ones(2), persistent=False)

    class Ragged(LowRank):
        def __init__(self, shape, **options):
            super().__init__(shape, **options)
            self.right.weight = nn.Parameter(self.right.weight.mT.contiguous().mT)

    class Thrifty(LowRank):
        @property
        def nbytes(self):
            return super().nbytes - 4

    class Heavy(LowRank):
        def __init__(self, shape, *, rank, dtype=None, device=None):
            super().__init__(shape, rank=rank, dtype=dtype, device=device)
            self.register_buffer("index", torch.zeros(3, dtype=torch.int32))

    class Vague(LowRank):
        def sizes(self):
            return {"rank": self.rank - 1}

    class Credulous(LowRank):
        def __init__(self, shape, *, rank, dtype=None, device=None):
            nn.Module.__init__(self)
            self.shape, self.rank, self.scale = tuple(shape), rank, 1.0
            self.right = nn.Linear(shape[1], int(rank), bias=False, dtype=dtype, device=device)
            self.left = nn.Linear(int(rank), shape[0], bias=False, dtype=dtype, device=device)

    class Misfactored(LowRank):
        def factors(self):
            return (self.left.weight,)

    class Promoting(LowRank):
        def forward(self, x):
            return super().forward(x).double()

    flaws = {
        Shifted: "forward(x) is not x @ to_dense().mT",
        Misread: "rows(index) is not to_dense()[index]",
        Frozen: "gradient of forward with respect to right.weight",
        Forgetful: "buffers ['shift'] are not persistent",
        Ragged: "['right.weight'] are not contiguous",
        Thrifty: "a file of it holds 72 bytes",
        Heavy: "['index'] took memory",
        Vague: "its state dict does not fit",
        Credulous: "not ValueError",
        Misfactored: "product of factors()",
        Promoting: "gives torch.float64",
    }
    for cls, part in flaws.items():
        assert part in law_of(cls), cls
