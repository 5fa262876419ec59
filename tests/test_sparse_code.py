"""Codes times dictionary: the laws, the bytes of the papers' pages, and what a damaged file may not do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankfold.packing import index_width
from rankfold.sparse_code import STORAGES, SparseCode
from rankfold.structure import build
from rankfold.testing import check_structure

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def random(
    shape: tuple[int, int],
    atoms: int,
    nonzeros: int,
    blocks: int = 1,
    orient: str = "in",
    storage: str = "float",
    dtype: torch.dtype = torch.float32,
) -> SparseCode:
    rows, across = shape if orient == "in" else shape[::-1]
    index = torch.rand(rows, blocks, atoms).topk(nonzeros).indices  # in no order
    dictionary = torch.randn(blocks, atoms, across // blocks, dtype=dtype)
    return SparseCode.of(
        dictionary, torch.randn(index.shape).to(dtype), index, orient=orient, storage=storage
    )


@st.composite
def sized(draw: Any) -> tuple[Any, ...]:
    """Odd sides, 1 x n, n x 1, s = k, one block and several, masks and indices."""
    rows, width = draw(st.sampled_from((1, 3, 7, 13))), draw(st.sampled_from((1, 2, 5, 8)))
    blocks, orient = draw(st.integers(1, 3)), draw(st.sampled_from(("in", "out")))
    atoms = draw(st.integers(1, max(rows, width)))
    shape = (rows, blocks * width) if orient == "in" else (blocks * width, rows)
    return shape, atoms, draw(st.integers(1, atoms)), blocks, orient


@pytest.mark.parametrize("storage", STORAGES)
@given(size=sized(), dtype=st.sampled_from(DTYPES))
def test_laws(storage: str, size: tuple[Any, ...], dtype: torch.dtype) -> None:
    check_structure(random(*size, storage, dtype))


@pytest.mark.parametrize("orient", ["in", "out"])
@pytest.mark.parametrize("storage", STORAGES)
def test_compiles_without_graph_breaks(storage: str, orient: str) -> None:
    check_structure(random((12, 12), 5, 2, 3, orient, storage), compile=True)
    check_structure(random((12, 12), 70 // 6, 1, 1, orient, storage), compile=True)  # packed as indices


@pytest.mark.parametrize("orient", ["in", "out"])
def test_the_matrix_is_codes_times_dictionary(orient: str) -> None:
    index = torch.tensor([[[2, 0]], [[1, 2]]])
    values = torch.tensor([[[3.0, 1.0]], [[-1.0, 0.5]]])
    atoms = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0, 0, 2]]])
    expected = torch.tensor([[1.0, 0, 6], [0, -1, 1]])
    structure = SparseCode.of(atoms, values, index, orient=orient)
    assert torch.equal(structure.to_dense(), expected if orient == "in" else expected.mT)
    assert structure.index().tolist() == [[[0, 2]], [[1, 2]]]
    assert structure.macs == 9 + 4


# (out, in), atoms, nonzeros, bytes: the worked examples of CoSpaDi's accounting
WHOLE = [
    ((576, 576), 307, 153, "bf14", 529_992),
    ((192, 576), 131, 65, "bf14", 175_896),
]


@pytest.mark.parametrize(("shape", "atoms", "nonzeros", "storage", "size"), WHOLE)
def test_the_file_has_the_bytes_of_the_accounting(
    shape: tuple[int, int], atoms: int, nonzeros: int, storage: str, size: int
) -> None:
    empty = SparseCode(
        shape, atoms=atoms, nonzeros=nonzeros, storage=storage, dtype=torch.bfloat16, device="meta"
    )
    assert empty.nbytes == size


@pytest.mark.parametrize(
    ("storage", "atoms", "nonzeros", "kept"), [("bf14", 3932, 1966, 0.79997), ("float", 3657, 1828, 0.79970)]
)
def test_a_large_layer_costs_what_the_page_says(storage: str, atoms: int, nonzeros: int, kept: float) -> None:
    empty = SparseCode(
        (12288, 4096), atoms=atoms, nonzeros=nonzeros, storage=storage, dtype=torch.bfloat16, device="meta"
    )
    assert abs(empty.nbytes / (2 * 12288 * 4096) - kept) < 5e-6
    if storage == "bf14":
        assert empty.macs == 40_263_680


def test_blocks_cost_what_their_page_says() -> None:
    """DSFormer counts ceil(log2 k) bits an index; a mask of k bits is smaller here, and is what we store."""
    for atoms, nonzeros, ratio in ((32, 8, 4.861), (64, 16, 2.341), (16, 4, 10.105)):
        empty = SparseCode(
            (768, 768), atoms=atoms, nonzeros=nonzeros, blocks=12, dtype=torch.float16, device="meta"
        )
        values, bases = 768 * 12 * nonzeros, atoms * 768
        page = 16 * (values + bases) + values * index_width(atoms)
        assert abs(16 * 768 * 768 / page - ratio) < 5e-4
        assert 8 * empty.nbytes == 16 * (values + bases) + min(values * index_width(atoms), 768 * 12 * atoms)


def test_values_are_stored_rounded() -> None:
    structure = random((9, 6), 5, 2, dtype=torch.float32)
    for storage, step in (("bf14", 2**-6 + 2**-8), ("int8", 0.5 / 127)):
        packed = structure.with_storage(storage)
        exact, found = structure.coefficients(), packed.coefficients()
        scale = exact.abs().amax((1, 2), keepdim=True) if storage == "int8" else exact.abs()
        assert bool(((found - exact).abs() <= scale * step * 1.01).all())
        assert packed.dictionary is structure.dictionary
        assert [name for name, _ in packed.named_parameters()] == ["dictionary"]
        again = packed.with_storage("float").with_storage(storage)
        assert torch.equal(again.coefficients(), found)  # rounding twice is rounding once
        assert packed.nbytes < structure.nbytes


def test_int8_of_a_row_of_zeros() -> None:
    structure = SparseCode.of(torch.randn(1, 3, 4), torch.zeros(2, 1, 2), torch.tensor([[[0, 1]], [[1, 2]]]))
    assert not structure.with_storage("int8").to_dense().any()


def test_parts_share_the_dictionary() -> None:
    whole = random((10, 8), 6, 3)
    parts = whole.split([7, 3])
    assert torch.equal(torch.cat([part.to_dense() for part in parts]), whole.to_dense())
    assert all(part.dictionary is whole.dictionary for part in parts)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="orient='out'"):
        random((8, 10), 6, 3, orient="out").split([4, 4])


def test_a_fresh_one_is_whole_and_trains() -> None:
    fresh = SparseCode((6, 8), atoms=4, nonzeros=2, blocks=2)
    fresh.validate()
    fresh(torch.randn(3, 8)).square().sum().backward()
    assert fresh.values.grad is not None and fresh.values.grad.any()


BAD: dict[str, dict[str, Any]] = {
    "nonzeros above atoms": {"nonzeros": 6},
    "no nonzeros": {"nonzeros": 0},
    "no atoms": {"atoms": 0},
    "more atoms than rows or columns": {"atoms": 11},
    "blocks do not divide": {"blocks": 3},
    "unknown orientation": {"orient": "up"},
    "unknown storage": {"storage": "fp4"},
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_spec_is_refused(case: str) -> None:
    spec = {"kind": "sparse_code", "shape": [10, 8], "atoms": 5, "nonzeros": 2}
    build(spec, device="meta")
    with pytest.raises(ValueError, match="sparse code"):
        build({**spec, **BAD[case]}, device="meta")


@pytest.mark.parametrize(
    ("index", "words"),
    [([[[0, 4]]], "between 0 and 4 for 4 atoms"), ([[[-1, 2]]], "between -1"), ([[[2, 2]]], "twice")],
)
def test_bad_places_are_refused(index: list[Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SparseCode.of(torch.randn(1, 4, 5), torch.randn(1, 1, 2), torch.tensor(index))


def damaged(support: Tensor) -> Tensor:
    """Eight places taken in a row that has four; index 15 where there are 13."""
    support = support.clone()
    support[0] = 0xFF
    return support


@pytest.mark.parametrize(("atoms", "nonzeros"), [(9, 4), (13, 1)])
def test_a_damaged_support_is_refused_when_loaded(atoms: int, nonzeros: int) -> None:
    structure = random((13, 4), atoms, nonzeros)
    state = {**structure.state_dict(), "support": damaged(structure.support)}
    for device, assign in (("cpu", False), ("meta", True)):
        empty = build(structure.spec(), device=device)
        with pytest.raises(RuntimeError, match=r"mask takes|index is|padded"):
            empty.load_state_dict(state, assign=assign)
    structure.support = damaged(structure.support)
    with pytest.raises(ValueError, match=r"mask takes|index is|padded"):
        structure.validate()


def test_moving_and_casting_keeps_the_matrix() -> None:
    structure = random((6, 8), 4, 2, 2, storage="int8", dtype=torch.float32)
    before = structure.to_dense()
    x = torch.randn(2, 8)
    structure(x)  # the plan is made
    assert torch.equal(copy.deepcopy(structure).double().float().to_dense(), before)
    moved = copy.deepcopy(structure).to_empty(device="cpu")
    moved.load_state_dict(structure.state_dict())
    assert torch.equal(moved.to_dense(), before) and torch.equal(moved(x), structure(x))
