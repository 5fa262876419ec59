"""The product that rebuilds W: the right numbers, the right gradients, and nothing dense kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensor_bytes import peak_bytes
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from toy_sltrain import by_autograd, gradients, pair

from rankfold.sparse import Sparse
from rankfold.structures import LowRank, Sum

PAPER = (1376, 512, 128, 21135)  # out, in, rank, nonzeros of the up projection of the paper's smallest model


def kept(f: Callable[[], Tensor], leaves: list[Tensor]) -> int:
    """Bytes that autograd saves beyond the leaves."""
    known = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = f()
    assert y.requires_grad
    return sum(found.values())


def test_the_layer_by_hand() -> None:
    """One nonzero in each row; scale ½ on the product, and not on the entries."""
    low = LowRank.of(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 0.0, -1.0]]), 0.5)
    total = Sum.of(low, Sparse.of((2, 3), torch.tensor([3.0, -1.0]), torch.tensor([1, 5])))
    assert total.to_dense().tolist() == [[0.5, 3, -0.5], [1, 0, -2]]
    x = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    y = total(x)
    y.backward(torch.ones(1, 2))
    assert y.tolist() == [[5, -5]]
    assert x.grad is not None and x.grad.tolist() == [[1.5, 3, -2.5]]
    found = {name: p.grad.tolist() for name, p in total.named_parameters() if p.grad is not None}
    assert found == {
        "terms.0.left.weight": [[-1], [-1]],
        "terms.0.right.weight": [[1.5, 3, 4.5]],
        "terms.1.values": [2, 3],
    }
    assert (total.params, total.macs, total.nbytes) == (7, 7, 7 * 4 + 2 * 4)


def test_gradcheck() -> None:
    total, x = pair(4, 3, 2, 5), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    parameters = tuple(total.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: total(x), (x, *parameters))
    assert torch.autograd.gradgradcheck(lambda x, *_: total(x), (x, *parameters))
    alone = total.terms[1]
    assert torch.autograd.gradcheck(lambda x, _: alone(x), (x, alone.values))
    index = torch.tensor([[3, 0], [3, 1]])
    assert torch.autograd.gradcheck(lambda _: alone.rows(index), (alone.values,))


def test_gradients_are_those_of_autograd_exactly_and_nothing_is_kept() -> None:
    total, x = pair(*PAPER), torch.randn(2, 12, 512, dtype=torch.float64, requires_grad=True)
    leaves = [x, *total.parameters()]
    assert torch.equal(total(x), by_autograd(x, total))
    mine, theirs = (gradients(lambda f=f: f(x), leaves) for f in (total, lambda x: by_autograd(x, total)))
    assert all(torch.equal(one, two) for one, two in zip(mine, theirs, strict=True))
    single = copy.deepcopy(total).float()
    leaves = [x.float().detach().requires_grad_(), *single.parameters(), *single.buffers()]
    assert kept(lambda: single(leaves[0]), leaves) == 0
    assert kept(lambda: by_autograd(leaves[0], single), leaves) == 4 * 1376 * 512 == 2_818_048


def test_the_dense_weight_is_freed_before_its_gradient_is_formed() -> None:
    total, x = pair(300, 200, 4, 600, dtype=torch.float32), torch.randn(8, 200, requires_grad=True)
    dense = 4 * 300 * 200
    assert dense < peak_bytes(lambda: total(x)) < 1.2 * dense
    grad, y = torch.ones(8, 300), total(x)
    assert dense < peak_bytes(lambda: y.backward(grad)) < 1.3 * dense


def test_only_what_is_asked_for_is_computed() -> None:
    """Without a gradient for x W is not rebuilt in the backward pass; frozen parameters need no G."""
    total, x = pair(300, 200, 4, 600, dtype=torch.float32), torch.randn(8, 200)
    grad = torch.ones(8, 300)

    def products(x: Tensor) -> int:
        y = total(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as run:
            y.backward(grad)
        return sum(event.count for event in run.key_averages() if event.key == "aten::mm")

    assert products(x) == 3  # G, dleft, dright
    assert products(x.requires_grad_()) == 5  # and W, dx
    total.requires_grad_(False)
    assert products(x) == 2
    total.terms[1].requires_grad_(True)
    assert products(x.detach()) == 1
    assert total.terms[0].left.weight.grad is not None and total.terms[1].values.grad is not None


def test_two_runs_are_bit_equal_in_deterministic_mode() -> None:
    total, x = pair(64, 48, 4, 300, dtype=torch.float32), torch.randn(8, 48, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        one, two = (gradients(lambda: total(x), [x, *total.parameters()]) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_autocast() -> None:
    total, x = pair(64, 48, 4, 300, dtype=torch.float32), torch.randn(8, 48, requires_grad=True)
    leaves, exact = [x, *total.parameters()], gradients(lambda: total(x), [x, *total.parameters()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = total(x)
        with torch.no_grad():
            assert total(x).dtype == total.terms[1](x).dtype == torch.bfloat16
    assert y.dtype == torch.bfloat16
    found = gradients(lambda: y, leaves)
    for leaf, one, two in zip(leaves, found, exact, strict=True):
        assert one.dtype == leaf.dtype == torch.float32
        assert float((one - two).norm() / two.norm()) < 0.02


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_and_double_use(reentrant: bool) -> None:
    total, x = pair(6, 6, 2, 7), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, *total.parameters()]
    expected = gradients(lambda: by_autograd(by_autograd(x, total), total), leaves)
    y = checkpoint(lambda x: total(total(x)), x, use_reentrant=reentrant)
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (y * probe).sum().backward()
    for leaf, slope in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, slope)


def traced(backend: Any) -> tuple[Sum, Callable[[Tensor], Tensor]]:
    total = pair(96, 80, 4, 200, dtype=torch.float32)
    torch._dynamo.reset()
    return total, torch.compile(total, fullgraph=True, backend=backend)


def check_compiled(backend: Any) -> None:
    total, compiled = traced(backend)
    x = torch.randn(8, 80, requires_grad=True)
    leaves = [x, *total.parameters()]
    assert kept(lambda: compiled(x), [*leaves, *total.buffers()]) == 0
    mine, theirs = gradients(lambda: compiled(x), leaves), gradients(lambda: total(x), leaves)
    assert all(torch.equal(one, two) for one, two in zip(mine, theirs, strict=True))


def test_compiled_it_is_one_operator_and_keeps_nothing_either() -> None:
    """A compiler that looked inside would build W once for both passes, and keep it."""
    seen: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = traced(backend)[1]
    compiled(torch.randn(8, 80))
    assert seen == [torch.ops.rankfold.rebuilt_product.default]
    check_compiled("aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # the partitioner's imports
def test_a_partitioner_that_recomputes_keeps_nothing_either() -> None:
    check_compiled("aot_eager_decomp_partition")


@pytest.mark.parametrize("nonzeros", [30, 900])
@pytest.mark.parametrize("rows", [1, 5, 90])
def test_without_gradients_it_is_the_same_product(rows: int, nonzeros: int) -> None:
    total, x = pair(40, 30, 3, nonzeros), torch.randn(rows, 30, dtype=torch.float64)
    with torch.no_grad():
        for structure in (total, total.terms[1]):
            torch.testing.assert_close(structure(x), x @ structure.to_dense().mT)


def test_whatever_sits_on_a_child_is_called() -> None:
    """An adapter, a hook or another forward on a term or a factor: then the terms are applied as modules."""

    class Mine(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    def replaced(total: Sum) -> None:
        total.terms[0].left = Mine(2, 7, bias=False, dtype=torch.float64)

    def hooked(total: Sum) -> None:
        total.terms[0].right.register_forward_hook(lambda module, args, y: y + 1)

    def patched(total: Sum) -> None:
        forward = total.terms[1].forward
        total.terms[1].forward = lambda x: forward(x) + 1

    x = torch.randn(4, 5, dtype=torch.float64)
    for change in (replaced, hooked, patched):
        total = pair(7, 5, 2, 6)
        change(total)
        assert total._low_rank_and_sparse() is None
        first, second = total.terms
        torch.testing.assert_close(total(x), first(x) + second(x))
    assert pair(7, 5, 2, 6)._low_rank_and_sparse() is not None
