"""What LAMA pooling costs, that it composes with the rest, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from rankfold.factorize import factorize_
from rankfold.methods import SVD
from rankfold.metric import Metric
from rankfold.pooling import LamaPooling
from rankfold.recipes import svd
from rankfold.structure import Structure
from rankfold.structures import Dense


def flops(module: nn.Module, *inputs: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops()


def numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_of_the_page() -> None:
    """e = 300, h = 100, so d = 200; m = 10, k = 1."""
    pooling = LamaPooling(200, 10)
    assert numel(nn.GRU(300, 100, bidirectional=True)) == 241_200
    assert pooling.context_proj.weight.numel() + pooling.word_proj.weight.numel() == 4_000
    assert pooling.context is not None and pooling.context.numel() == 200
    assert pooling.word_mlp_params() == 40_200
    assert pooling.attention_params() == 4_200 and numel(pooling) == 44_400
    assert pooling.affinities().numel() == 400_000  # what it stands for
    assert LamaPooling(200, 10, context="mean").attention_params() == 4_000
    assert LamaPooling(200, 10, rank_per_head=4).attention_params() == 16_200
    assert pooling.attention_params() < 0.05 * 160_800  # multi-head attention at this width


def test_flops_of_the_page() -> None:
    pooling, bare = LamaPooling(200, 10), LamaPooling(200, 10, word_mlp=False)
    x = torch.randn(1, 100, 200)
    assert flops(bare, x) == 400_000 + 4_000 + 400_000
    assert flops(pooling, x) == 8_000_000 + flops(bare, x)
    # With a context for each sample, P is applied to each; a mean is no product of matrices.
    batch = torch.randn(3, 100, 200)
    assert flops(LamaPooling(200, 10, word_mlp=False, context="mean"), batch) == 3 * 804_000
    assert flops(bare, batch) == 3 * 800_000 + 4_000


@pytest.mark.parametrize("options", [{}, {"context": "mean"}, {"rank_per_head": 3, "word_mlp": False}])
def test_flops_are_linear_in_the_length(options: dict) -> None:
    pooling = LamaPooling(16, 4, **options)
    means = 16 if "context" in options else 0  # additions, which the counter leaves out
    counts = [flops(pooling, torch.randn(1, length, 16)) for length in (64, 128, 192, 1024)]
    wanted = [2 * (pooling.macs(length) - means * length) for length in (64, 128, 192, 1024)]
    assert counts == wanted
    assert counts[2] - counts[1] == counts[1] - counts[0]  # no square
    assert counts[3] - counts[0] == 15 * (counts[1] - counts[0])


class Shapes(TorchDispatchMode):
    """The shapes of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, tuple) else (out,)
        self.seen += [tuple(x.shape) for x in results if isinstance(x, Tensor)]
        return out


@pytest.mark.parametrize("context", ["learned", "mean"])
def test_nothing_has_the_length_twice(context: str) -> None:
    pooling, x = LamaPooling(16, 4, context=context), torch.randn(2, 97, 16, requires_grad=True)
    with Shapes() as shapes:
        pooled, weights = pooling(x, torch.ones(2, 97, dtype=torch.long))
        (pooled.sum() + weights.square().sum()).backward()
    assert (2, 4, 97) in shapes.seen
    assert not [shape for shape in shapes.seen if shape.count(97) > 1]
    assert not [shape for shape in shapes.seen if shape[-2:] == (16, 16) and len(shape) > 2]  # nor (m, d, d)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank_per_head": 2, "temperature": 0.5},
        {"context": "mean"},
        {"context": "mean", "context_of": "words", "phi": "gelu"},
        {"context": "mean", "context_of": "embedding"},
        {"normalise_heads": False, "word_mlp": False},
    ],
)
def test_gradients(options: dict) -> None:
    torch.manual_seed(0)
    pooling = LamaPooling(3, 2, **options).double()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    names = [name for name, _ in pooling.named_parameters()]

    def call(states: Tensor, embeddings: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(pooling, given, (states, mask, embeddings))

    x, e = (torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(call, (x, e, *pooling.parameters()))


# --- Composition -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 4])
def test_rank_k_identity_and_from_bilinear(rank: int) -> None:
    """Exact in float64 where the affinities have rank k, and where they have less."""
    torch.manual_seed(0)
    for true in {rank, 1}:
        wanted = torch.randn(3, 8, true, dtype=torch.float64) @ torch.randn(3, true, 8, dtype=torch.float64)
        pooling = LamaPooling.from_bilinear(wanted, rank, SVD(), context="mean")
        assert pooling.rank_per_head == rank and pooling.heads == 3 and pooling.context is None
        torch.testing.assert_close(pooling.affinities(), wanted, atol=1e-10, rtol=0)
        c, u = torch.randn(2, 1, 8, dtype=torch.float64)
        terms = (pooling.context_proj(c) * pooling.word_proj(u)).view(3, rank).sum(1)
        torch.testing.assert_close(terms, torch.einsum("d,ide,e->i", c[0], wanted, u[0]), atol=1e-10, rtol=0)


def test_from_bilinear_is_the_nearest_of_its_rank() -> None:
    torch.manual_seed(0)
    wanted = torch.randn(2, 8, 8)
    made = LamaPooling.from_bilinear(wanted, 3, SVD(), word_mlp=False)
    assert made.word_proj.weight.dtype == torch.float32 and made.word_mlp is None
    tails = torch.linalg.svdvals(wanted)[:, 3:].square().sum(1)
    torch.testing.assert_close((made.affinities() - wanted).square().sum((1, 2)), tails, rtol=1e-4, atol=0)


class Unchanged(SVD):
    """A method that does not factorize."""

    def fit(self, weight: Tensor, metric: Metric, size: int) -> Structure:  # type: ignore[override]
        return Dense.of(weight)


def test_from_bilinear_refuses() -> None:
    w = torch.randn(2, 8, 8)
    with pytest.raises(ValueError, match=r"\(2, 8, 7\); they must be \(heads, d, d\)"):
        LamaPooling.from_bilinear(w[..., :7], 2, SVD())
    with pytest.raises(ValueError, match="rank_per_head=9 must lie between 1 and width=8"):
        LamaPooling.from_bilinear(w, 9, SVD())
    with pytest.raises(ValueError, match="gave Dense; affinities need a method for LowRank"):
        LamaPooling.from_bilinear(w, 2, Unchanged())
    with pytest.raises(ValueError, match="64 NaN or infinite"):
        LamaPooling.from_bilinear(w / 0, 2, SVD())


def test_factorized() -> None:
    """The word MLP becomes low-rank, and P and Q may; counts follow, and the pooling is the same function."""
    torch.manual_seed(0)
    pooling = LamaPooling(32, 8, rank_per_head=4)
    x, mask = torch.randn(2, 9, 32), torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    dense = pooling.macs(9), pooling.word_mlp_params()
    report = factorize_(pooling, svd, budget=0.6)
    assert "word_mlp" in {row.name for row in report.layers}
    assert pooling.word_mlp is not None and type(pooling.word_mlp) is not nn.Linear
    assert pooling.macs(9) < dense[0] and pooling.word_mlp_params() < dense[1]
    assert pooling.attention_params() + pooling.word_mlp_params() == numel(pooling)
    assert 2 * pooling.macs(9) == flops(pooling, x[:1])
    pooled, weights = pooling(x, mask)
    assert torch.isfinite(pooled).all() and pooling.affinities().shape == (8, 32, 32)
    torch.testing.assert_close(pooling(x[1:, :4])[1], weights[1:, :, :4])


@pytest.mark.parametrize("context", ["learned", "mean"])
def test_compiles_whole(context: str) -> None:
    torch.manual_seed(0)
    pooling, x = LamaPooling(8, 2, context=context), torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0] * 5])
    compiled = torch.compile(pooling, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mask), pooling(x, mask))


@pytest.mark.parametrize("context", ["learned", "mean"])
def test_bf16(context: str) -> None:
    """Under autocast, and as a whole: scores and weights stay in float32, so that weights sum to one."""
    torch.manual_seed(0)
    pooling, x = LamaPooling(16, 4, context=context), torch.randn(2, 50, 16)
    mask = torch.tensor([[1] * 50, [1] * 20 + [0] * 30])
    pooled, weights = pooling(x, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, cast_weights = pooling(x, mask)
    (cast.float().square().sum()).backward()
    whole, whole_weights = pooling.bfloat16()(x.bfloat16(), mask)
    assert cast.dtype == whole.dtype == torch.bfloat16
    for found, found_weights in ((cast, cast_weights), (whole, whole_weights)):
        assert found_weights.dtype == torch.float32
        torch.testing.assert_close(found_weights.sum(-1), torch.ones(2, 4))
        torch.testing.assert_close(found_weights, weights, atol=3e-3, rtol=0)
        torch.testing.assert_close(found.float(), pooled, atol=3e-2, rtol=0)
    assert all(torch.isfinite(p.grad).all() for p in pooling.parameters() if p.grad is not None)


# --- Bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width=0 of a pooling must be a positive integer"),
        ({"heads": 2.0}, "heads=2.0"),
        ({"rank_per_head": 0}, "rank_per_head=0 must lie between 1 and width=8"),
        ({"context": "max"}, "context='max' is not one of learned, mean"),
        ({"context": "mean", "context_of": "U"}, "context_of='U' is not one of states, words, embedding"),
        ({"context_of": "words"}, "context is 'learned'"),
        ({"phi": "swish"}, "phi='swish' is not one of tanh, relu, gelu"),
        ({"phi": None}, "phi=None is not one of"),
        ({"phi": "relu", "word_mlp": False}, "word_mlp is False"),
        ({"temperature": 0}, "temperature=0 must be a positive, finite number"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"eps": "1e-6"}, "eps='1e-6'"),
    ],
)
def test_options_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LamaPooling(**{"width": 8, "heads": 2, **options})


def test_inputs_refused() -> None:
    pooling, x = LamaPooling(8, 2, context="mean", context_of="embedding"), torch.randn(2, 3, 8)
    assert pooling.reads_embeddings and not LamaPooling(8, 2).reads_embeddings
    with pytest.raises(ValueError, match="needs the embeddings"):
        pooling(x)
    with pytest.raises(ValueError, match=r"\(2, 3, 5\); a context of width 8 needs \(2, 3, 8\)"):
        pooling(x, None, torch.randn(2, 3, 5))
    with pytest.raises(ValueError, match=r"states have shape \(2, 3, 7\); this pooling takes \(B, T, 8\)"):
        pooling(x[..., :7])
    with pytest.raises(ValueError, match=r"mask has shape \(2, 1, 1, 3\); for these states it is \(2, 3\)"):
        pooling(x, torch.ones(2, 1, 1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="added to scores"):
        pooling(x, torch.zeros(2, 3))


def test_phi_is_any_function() -> None:
    x = torch.randn(2, 3, 8)
    torch.manual_seed(0)
    named = LamaPooling(8, 2, phi="relu")
    torch.manual_seed(0)
    torch.testing.assert_close(LamaPooling(8, 2, phi=torch.relu)(x), named(x))


def test_no_words_at_all() -> None:
    for context in ("learned", "mean"):
        pooled, weights = LamaPooling(8, 2, context=context)(torch.zeros(2, 0, 8))
        assert pooled.shape == (2, 16) and not pooled.any() and weights.shape == (2, 2, 0)
