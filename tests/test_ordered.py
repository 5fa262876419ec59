"""The ordered structure: widths, its laws, its hosts, compiled code, and the pure functions of Maestro."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rankfold.layers import Layer
from rankfold.ordered import Ordered, draw, surviving
from rankfold.structure import build
from rankfold.testing import check_host, check_structure

SHAPES = [(6, 9), (9, 6), (5, 5), (4, 1)]


def make(out: int = 6, inner: int = 9, **options: Any) -> Ordered:
    return Ordered((out, inner), rank=min(out, inner), **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_laws(shape: tuple[int, int]) -> None:
    check_structure(make(*shape))
    check_structure(Ordered(shape, rank=1))


@pytest.mark.parametrize("width", [0, 1, 4, 6])
def test_a_width_is_the_product_of_the_leading_components(width: int) -> None:
    structure = make(dtype=torch.float64)
    structure.draw_(width)
    left, right = structure.left.weight, structure.right.weight
    expected = left[:, :width] @ right[:width]
    x = torch.randn(2, 3, 9, dtype=torch.float64)
    torch.testing.assert_close(structure(x), x @ expected.mT)
    torch.testing.assert_close(structure.to_dense(), expected)
    torch.testing.assert_close(structure.rows(torch.tensor([[1, 5]])), expected[[1, 5]][None])
    structure(x).sum().backward()
    assert left.grad is not None and right.grad is not None
    assert not left.grad[:, width:].any() and not right.grad[width:].any()
    assert left.grad[:, :width].all() and right.grad[:width].all()


def test_eval_mode_uses_all_that_is_kept_and_so_does_training_without_a_draw() -> None:
    structure = make()
    structure.keep_(4)
    structure.draw_(2)
    assert structure.width == 2 and structure.macs == 4 * 15
    assert structure.eval().width == 4
    structure.train().draw_(None)
    assert structure.width == 4
    structure.kept = torch.tensor(3, dtype=torch.int32)  # another tensor, as some loaders put there
    assert structure.alive == 3
    with torch.inference_mode():
        structure.kept = torch.tensor(2, dtype=torch.int32)
        structure.kept.sub_(1)
        assert structure.alive == 1


def test_ranks_survive_a_checkpoint() -> None:
    """Trap 5: a mask that is no buffer comes back as the full-rank model."""
    structure = make().eval()
    structure.keep_(2)
    again = build(structure.spec(), device="meta").eval()
    again.load_state_dict(structure.state_dict(), assign=True)
    x = torch.randn(3, 9)
    assert isinstance(again, Ordered) and again.alive == 2 and torch.equal(again(x), structure(x))
    other = make().eval()
    other.load_state_dict(structure.state_dict())
    assert other.alive == 2 and torch.equal(other(x), structure(x))
    other.kept.fill_(7)
    with pytest.raises(ValueError, match="kept=7 must lie between 0 and the rank 6"):
        other.validate()


def test_refusals() -> None:
    structure = make()
    structure.keep_(3)
    with pytest.raises(ValueError, match="width 4 must lie between 0 and the 3 components"):
        structure.draw_(4)
    with pytest.raises(ValueError, match="rank 5 must lie between 0 and the 3"):
        structure.keep_(5)  # trap 8: no component comes back
    with pytest.raises(ValueError, match="rank=7 must be an integer between 1 and 6"):
        Ordered((6, 9), rank=7)


def test_integer_ranks_select_themselves() -> None:
    """Trap 1: a rank kept as a fraction of the full one comes back one too large for many pairs."""
    assert math.ceil(25 * (7 / 25)) == 8
    structure = Ordered((2048, 2048), rank=2048, device="meta")
    structure.kept = torch.tensor(2048, dtype=torch.int32)
    for r in (25, 29, 35, 38, 2048):
        for j in range(r + 1):
            structure.draw_(j)
            assert structure.width == j and structure._sliced()[0].shape[1] == j
    counts = {pick: 0 for pick in range(1, 39)}
    for step in range(38):
        counts[draw([38], "pair", 0, step, None)[0]] += 1
    assert set(counts.values()) == {1}


# Hosts


@pytest.mark.parametrize("width", [0, 2, None])
@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"padding": "same", "dilation": 2, "bias": False},
        {"stride": (2, 1), "padding": (0, 2), "padding_mode": "reflect"},
    ],
)
def test_convolutions(options: dict[str, Any], spatial: bool, width: int | None) -> None:
    """The factor pair is the dense convolution; trap 2: of rank 0 it is the bias in the right shape."""
    conv = nn.Conv2d(3, 5, (3, 2), **options)
    layer = Layer(conv, spatial)
    structure = Ordered.svd(layer.matrix())
    x = torch.randn(2, 3, 9, 8)
    torch.testing.assert_close(layer.wrap(structure)(x), conv(x), rtol=0, atol=1e-5)
    structure.draw_(width)
    check_host(conv, x, spatial=spatial, structure=structure)
    if width == 0:
        bias = torch.zeros(5) if conv.bias is None else conv.bias
        y = conv(x)
        structure.draw_(0)
        torch.testing.assert_close(layer.wrap(structure)(x), bias[:, None, None].expand_as(y))


def test_linear_of_rank_0_is_its_bias() -> None:
    linear = nn.Linear(9, 6)
    host = Layer(linear).wrap(Ordered.svd(linear.weight.detach()))
    host.weight.keep_(0)  # type: ignore[operator]
    for mode in (True, False):
        y = host.train(mode)(torch.randn(2, 3, 9))
        torch.testing.assert_close(y, linear.bias.expand(2, 3, 6))
    y.sum().backward()
    assert not host.weight.left.weight.grad.any()  # type: ignore[union-attr]


def test_embedding_rows() -> None:
    table = nn.Embedding(11, 4)
    host = Layer(table).wrap(Ordered.svd(table.weight.detach()))
    index = torch.tensor([[0, 10], [3, 3]])
    torch.testing.assert_close(host(index), table(index), rtol=0, atol=1e-6)
    host.weight.draw_(2)  # type: ignore[operator]
    host(index).sum().backward()
    grad = host.weight.left.weight.grad  # type: ignore[union-attr]
    assert grad[[0, 10, 3], :2].all() and not grad[:, 2:].any() and not grad[1].any()


# Compiled, recomputed, autocast


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = Layer(nn.Embedding(7, 6)).wrap(make(7, 6))
        self.linear = Layer(nn.Linear(6, 8)).wrap(make(8, 6))
        self.conv = Layer(nn.Conv2d(2, 4, 2)).wrap(make(4, 8))

    def structures(self) -> list[Ordered]:
        return [m for m in self.modules() if isinstance(m, Ordered)]

    def forward(self, index: Tensor) -> Tensor:
        return self.conv(self.linear(self.table(index)).view(len(index), 2, 2, -1)).flatten(1)


def test_compiled_code_agrees_and_is_not_compiled_again_for_a_new_width() -> None:
    torch._dynamo.reset()
    model = Net()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    index = torch.randint(7, (5, 2))

    def both() -> None:
        for step in range(20):
            for one, two in zip(model.structures(), twin.structures(), strict=True):
                width = draw([one.alive], "independent", 3, step, None)[0] if step else 0
                one.draw_(width)
                two.draw_(width)
            y, z = compiled(index), twin(index)
            torch.testing.assert_close(y, z)
            for net, out in ((model, y), (twin, z)):
                net.zero_grad()
                out.square().sum().backward()
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad)

    compiled(index)
    with torch.compiler.set_stance("fail_on_recompile"):
        both()
        for net in (model, twin):
            for structure in net.structures():
                structure.keep_(3)
        both()
    torch.testing.assert_close(compiled.eval()(index), twin.eval()(index))


def test_recomputation_sees_the_same_width() -> None:
    model = Net()
    index = torch.randint(7, (5, 2))
    grads = []
    for recompute in (False, True):
        model.zero_grad()
        for structure in model.structures():
            structure.draw_(2)
        y = checkpoint(model, index, use_reentrant=False) if recompute else model(index)
        assert isinstance(y, Tensor)
        y.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for one, two in zip(*grads, strict=True):
        assert torch.equal(one, two)  # type: ignore[arg-type]


def test_autocast() -> None:
    structure = make()
    structure.draw_(3)
    with torch.autocast("cpu", torch.bfloat16):
        y = structure(torch.randn(4, 9))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert structure.left.weight.grad is not None and structure.left.weight.grad.dtype == torch.float32


# Tails, thresholds, draws


def test_tails_are_inclusive() -> None:
    structure = Ordered.of(torch.diag(torch.tensor([3.0, 4])), torch.diag(torch.tensor([5.0, 12])))
    left, right = structure.tails()
    assert left.tolist() == [5, 4] and right.tolist() == [13, 12]
    assert (left.sum() + right.sum()).item() == 34  # vector 1
    assert structure.importance().tolist() == [65, 48]
    found = [surviving(structure.importance(), eps, relative=False) for eps in (48, 48.1, 66)]
    assert found == [2, 1, 0]
    assert surviving(structure.importance(), 0.75, relative=True) == 1


def test_a_zero_tail_has_a_finite_gradient_of_zero() -> None:
    """Trap 6."""
    structure = Ordered.of(torch.tensor([[1.0, 0], [2, 0], [0, 0]]), torch.tensor([[3.0, 4], [0, 0]]))
    sum(side.sum() for side in structure.tails()).backward()  # type: ignore[union-attr]
    grad = structure.left.weight.grad
    assert grad is not None and grad.isfinite().all() and not grad[:, 1].any()
    torch.testing.assert_close(grad[:, 0], torch.tensor([1.0, 2, 0]) / 5**0.5)
    assert surviving(structure.importance(), 0.0, relative=True) == 1  # what is dead goes


def test_importance_never_rises() -> None:
    """Trap 15: the kept set is a prefix, whatever the components are."""
    structure = make()
    with torch.no_grad():
        structure.left.weight[:, 2] = 0
    tail = structure.importance()
    assert tail.diff().le(0).all()
    kept = [surviving(tail, eps, relative=False) for eps in (0.0, 0.1, 1.0, 10.0)]
    assert kept == sorted(kept, reverse=True)


def test_pairs_are_drawn_without_replacement() -> None:
    """Vector 4: the list of a 64-128-128-10 network has 202 pairs, P(layer) ∝ rank."""
    ranks = [64, 128, 10]
    for cycle in range(2):
        seen = []
        for step in range(202 * cycle, 202 * (cycle + 1)):
            widths = draw(ranks, "pair", 5, step, None)
            small = [(i, w) for i, w in enumerate(widths) if w < ranks[i]]
            assert len(small) <= 1
            seen += small
        everything = [(i, b) for i, rank in enumerate(ranks) for b in range(1, rank)]
        assert sorted(seen) == everything
    first, again, other = ([draw(ranks, "pair", s, n, 50) for n in range(120)] for s in (5, 5, 6))
    assert first == again != other
    assert first[:50] != first[50:100]  # another order in every period


def test_a_layer_of_rank_0_takes_no_slot() -> None:
    """Trap 3: it leaves the list, and one pass over it stays exact."""
    seen = [draw([3, 0, 2], "pair", 0, step, None) for step in range(5)]
    assert all(widths[1] == 0 for widths in seen)
    assert sorted((w[0], w[2]) for w in seen) == [(1, 2), (2, 2), (3, 1), (3, 2), (3, 2)]
    assert draw([0, 0], "pair", 0, 3, None) == [0, 0]


def test_independent_widths_are_uniform() -> None:
    drawn = torch.tensor([draw([4, 0, 1], "independent", 0, step, 7) for step in range(800)])
    assert not drawn[:, 1].any() and (drawn[:, 2] == 1).all()
    assert torch.bincount(drawn[:, 0], minlength=5)[1:].sub(200).abs().max() < 50
