"""Products with sparse codes: every path multiplies by the matrix that `dense` shows, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rankfold import kernels
from rankfold.codes import Codes, factored, multiply, multiply_transposed, path_of
from rankfold.kernels import reference
from rankfold.packing import pack_support, packing_for

# rows, blocks, atoms, nonzeros: one entry, full rows, odd sizes, several blocks, many columns
LAYOUTS = [(1, 1, 1, 1), (7, 1, 13, 6), (33, 2, 17, 17), (5, 3, 9, 2), (40, 4, 64, 3), (9, 1, 333, 160)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}
PRODUCTS = [(multiply, False), (multiply_transposed, True)]


def some_codes(
    layout: tuple[int, int, int, int], packing: str | None = None, dtype: torch.dtype = torch.float64
) -> Codes:
    rows, blocks, atoms, nonzeros = layout
    index = torch.rand(rows * blocks, atoms).argsort(1)[:, :nonzeros].sort(1).values
    packing = packing or packing_for(atoms, nonzeros)
    return Codes(
        rows=rows,
        blocks=blocks,
        atoms=atoms,
        nonzeros=nonzeros,
        packing=packing,
        support=pack_support(packing, index, atoms),
        values=torch.randn(rows, blocks * nonzeros, dtype=dtype),
    )


def dense64(codes: Codes) -> Tensor:
    return codes.with_values(codes.values.detach().double()).dense()


def close(mine: Tensor, true: Tensor, tolerance: float) -> bool:
    mine, true = mine.detach().double(), true.detach().double()
    scale = max(float(true.norm()), 1e-3)
    return mine.shape == true.shape and float((mine - true).norm()) <= tolerance * scale


@pytest.mark.parametrize("path", [None, "gather", "dense"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("packing", ["mask", "index"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_path_multiplies_by_the_dense_matrix(
    layout: tuple[int, int, int, int], packing: str, dtype: torch.dtype, path: str | None
) -> None:
    codes = some_codes(layout, packing, dtype)
    full = dense64(codes)
    for lead in ((), (2,), (3, 7), (0,), (40,)):
        t, x = torch.randn(*lead, codes.columns, dtype=dtype), torch.randn(*lead, codes.rows, dtype=dtype)
        y, u = multiply(t, codes, path=path), multiply_transposed(x, codes, path=path)
        assert y.dtype == u.dtype == dtype
        assert close(y, t.double() @ full.mT, TOLERANCE[dtype])
        assert close(u, x.double() @ full, TOLERANCE[dtype])


@pytest.mark.parametrize("path", ["gather", "dense"])
@pytest.mark.parametrize(("product", "transposed"), PRODUCTS)
@pytest.mark.parametrize("packing", ["mask", "index"])
def test_gradients(packing: str, product: Callable[..., Tensor], transposed: bool, path: str) -> None:
    codes = some_codes((5, 2, 7, 3), packing)
    x = torch.randn(3, codes.rows if transposed else codes.columns, dtype=torch.float64, requires_grad=True)
    values = codes.values.requires_grad_()

    def call(x: Tensor, values: Tensor) -> Tensor:
        return product(x, codes.with_values(values), path=path)

    assert torch.autograd.gradcheck(call, (x, values))
    assert torch.autograd.gradgradcheck(call, (x, values))


@pytest.mark.parametrize("tokens", [1, 4, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("orient", ["in", "out"])
def test_gradients_equal_those_of_the_dense_form(orient: str, dtype: torch.dtype, tokens: int) -> None:
    """With the default path, whatever it is for that many tokens, and through the dictionary."""
    codes, width = some_codes((24, 2, 20, 7), dtype=dtype), 10
    atoms = torch.randn(2, 20, width, dtype=dtype, requires_grad=True)
    across = 2 * width if orient == "in" else codes.rows
    x = torch.randn(tokens, across, dtype=dtype, requires_grad=True)
    values = codes.values.requires_grad_()
    leaves = (x, atoms, values)
    y = factored(x, atoms, codes.with_values(values), orient)
    probe = torch.randn_like(y)
    mine = torch.autograd.grad((y * probe).sum(), leaves)

    double = [leaf.detach().double().requires_grad_() for leaf in leaves]
    weight = codes.with_values(double[2]).dense() @ torch.block_diag(*double[1])
    true = double[0] @ (weight.mT if orient == "in" else weight)
    grads = torch.autograd.grad((true * probe.double()).sum(), double)
    assert close(y, true, 4 * TOLERANCE[dtype])
    for one, two in zip(mine, grads, strict=True):
        assert one.dtype == dtype and close(one, two, 4 * TOLERANCE[dtype])
    with torch.no_grad():  # without gradients a kernel may take both products at once
        assert close(factored(x, atoms, codes.with_values(values), orient), true, 4 * TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_graph_breaks(backend: str) -> None:
    codes, atoms = some_codes((12, 2, 9, 4), dtype=torch.float32), torch.randn(2, 9, 5)

    def call(x: Tensor, values: Tensor) -> Tensor:
        return factored(x, atoms, codes.with_values(values)) @ codes.with_values(values).dense()

    torch._dynamo.reset()
    traced = torch.compile(call, fullgraph=True, backend=backend)
    x, values = torch.randn(3, 10, requires_grad=True), codes.values.requires_grad_()
    mine, true = traced(x, values), call(x, values)
    assert close(mine, true, 1e-6)
    for one, two in zip(*(torch.autograd.grad(y.sum(), (x, values)) for y in (mine, true)), strict=True):
        assert close(one, two, 1e-6)
    with torch.no_grad():
        assert close(traced(x, values), true, 1e-6)


def test_operators_keep_their_promises() -> None:
    codes = some_codes((6, 2, 9, 4), dtype=torch.float32)
    places = (codes.support, codes.packing, codes.layout)
    x, t = torch.randn(2, 6, requires_grad=True), torch.randn(2, 18, requires_grad=True)
    operators = torch.ops.rankfold
    torch.library.opcheck(operators.codes_places, places)
    torch.library.opcheck(operators.codes_product, (t, codes.values.requires_grad_(), *places, False, ""))
    torch.library.opcheck(operators.codes_product, (x, codes.values.requires_grad_(), *places, True, ""))
    torch.library.opcheck(operators.codes_sampled, (x, t, *places, ""))


@pytest.mark.parametrize("path", ["gather", "dense"])
def test_temporaries_are_bounded(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither path ever holds all the entries of all the tokens; pieces add up to the whole."""
    codes = some_codes((48, 1, 40, 20))
    monkeypatch.setattr(reference, "TEMPORARY", 8 << 10)
    monkeypatch.setenv("RANKFOLD_KERNELS", "0")
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            largest = max([largest, *(t.numel() * t.element_size() for t in tensors)])
            return result

    values = codes.values.requires_grad_()
    x = torch.randn(30, codes.rows, dtype=torch.float64, requires_grad=True)
    with Watch():
        u = multiply_transposed(x, codes.with_values(values), path=path)
        u.sum().backward()
    assert largest <= 2 * max(8 << 10, x.numel() * 8, codes.values.numel() * 8)
    assert close(u, x @ codes.dense(), 1e-12)
    assert values.grad is not None
    assert close(values.grad, x.sum(0)[:, None].expand_as(values), 1e-12)


def test_path_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = some_codes((8, 1, 16, 8), dtype=torch.float32)
    assert "dense" in path_of(codes, 1000)
    assert "dense" in path_of(codes, 1, dtype=torch.float64)
    monkeypatch.setenv("RANKFOLD_KERNELS", "0")
    assert path_of(codes, 1).endswith("no kernel: RANKFOLD_KERNELS=0")


def test_bad_arguments() -> None:
    codes = some_codes((8, 1, 16, 8), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"16 inputs on cpu cannot multiply a tensor \(2, 15\)"):
        multiply(torch.randn(2, 15), codes)
    with pytest.raises(ValueError, match="cannot multiply"):
        multiply(torch.randn(2, 16, device="meta"), codes)
    with pytest.raises(ValueError, match=r"path='fast' must be one of \['dense'"):
        multiply(torch.randn(2, 16), codes, path="fast")
    with pytest.raises(ValueError, match=r"values \(8, 7\) do not fit codes of 8 rows with 8 entries"):
        codes.with_values(torch.randn(8, 7))


@pytest.mark.parametrize("path", [None, "gather", "dense"])
@pytest.mark.parametrize("packing", ["mask", "index"])
@pytest.mark.parametrize("fast", ["0", "1"])
def test_a_damaged_support_is_refused(
    fast: str, packing: str, path: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKFOLD_KERNELS", fast)
    codes = some_codes((8, 2, 16, 4), packing, torch.float32)
    codes.support[5] ^= 0xFF
    for call, across in ((multiply, 32), (multiply_transposed, 8)):
        with pytest.raises(ValueError, match=r"damaged|out of|ascending|twice|places"):
            call(torch.randn(1, across), codes, path=path)


def test_meta_and_shapes_only() -> None:
    codes = some_codes((8, 1, 16, 8), dtype=torch.float32)
    empty = Codes(
        rows=8,
        blocks=1,
        atoms=16,
        nonzeros=8,
        packing="mask",
        support=codes.support.to("meta"),
        values=codes.values.to("meta"),
    )
    assert multiply(torch.empty(3, 16, device="meta"), empty).shape == (3, 8)
    assert kernels.why_not(torch.device("meta")) is not None
