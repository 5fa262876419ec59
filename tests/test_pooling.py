"""LAMA pooling: the worked example, and what goes wrong where it is written down from memory."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rankfold.pooling import LamaPooling, diversity_penalty

VARIANTS = [
    {"context": "learned"},
    {"context": "mean"},
    {"context": "mean", "context_of": "words"},
    {"context": "mean", "context_of": "embedding"},
]


def made(width: int = 6, heads: int = 3, **options: object) -> LamaPooling:
    torch.manual_seed(0)
    return LamaPooling(width, heads, **options).double()  # type: ignore[arg-type]


def drawn(batch: int = 2, length: int = 5, width: int = 6) -> Tensor:
    return torch.randn(batch, length, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def worked_example() -> tuple[LamaPooling, Tensor]:
    pooling = LamaPooling(2, 2, word_mlp=False).double()
    with torch.no_grad():
        assert pooling.context is not None
        pooling.context.copy_(torch.tensor([1.0, -0.5]))
        pooling.context_proj.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        pooling.word_proj.weight.copy_(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
    return pooling, torch.tensor([[[1, 2], [-1, 0.5], [0.5, -1]]], dtype=torch.float64)


def near(found: Tensor, wanted: list) -> None:
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=found.dtype), atol=1e-6, rtol=0)


def test_worked_example() -> None:
    pooling, states = worked_example()
    f = [[0.784677, 0.619905], [0.518749, -0.854927], [-0.854927, 0.518749]]
    near(pooling.scores(states, None, None).mT[0], f)
    pooled, weights = pooling(states)
    near(weights[0], [[0.510061, 0.390959, 0.098981], [0.468909, 0.107295, 0.423796]])
    near(pooled[0], [0.168592, 1.116620, 0.573513, 0.567669])
    pooling.normalise_heads = False
    tanh = [[0.964028, 0.761594], [0.462117, -0.761594], [-0.761594, 0.462117]]
    near(pooling.scores(states, None, None).mT[0], tanh)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.int32])
def test_worked_example_with_the_third_word_masked(dtype: torch.dtype) -> None:
    pooling, states = worked_example()
    pooled, weights = pooling(states, torch.tensor([[1, 1, 0]], dtype=dtype))
    near(weights[0], [[0.566093, 0.433907, 0], [0.813791, 0.186209, 0]])
    near(pooled[0], [0.132186, 1.349139, 0.627581, 1.720686])


# --- The traps, by their number on the page --------------------------------------------------------------


def test_1_one_head_is_degenerate() -> None:
    with pytest.raises(ValueError, match=r"heads=1 with normalise_heads=True.*1 or -1.*at least 2 heads"):
        LamaPooling(6, 1)
    pooling = made(heads=1, normalise_heads=False)
    pooling(drawn())[0].square().sum().backward()
    assert pooling.context_proj.weight.grad.norm() > 1e-6  # type: ignore[union-attr]


@pytest.mark.parametrize("zero", ["context", "word", "P", "states"])
@pytest.mark.parametrize("options", [*VARIANTS, {"word_mlp": False}, {"word_mlp": False, "context": "mean"}])
def test_2_nothing_over_nothing(zero: str, options: dict) -> None:
    pooling, states, embeddings = made(**options), drawn(), drawn() + 1
    with torch.no_grad():
        if zero == "context" and pooling.context is not None:
            pooling.context.zero_()
        if zero == "P":
            pooling.context_proj.weight.zero_()
        if zero == "word":
            states[0, 1] = 0
        if zero == "states" or (zero == "context" and pooling.context is None):
            states.zero_(), embeddings.zero_()
    states.requires_grad_()
    pooled, weights = pooling(states, None, embeddings)
    (pooled.square().sum() + weights.square().sum()).backward()
    for found in (pooled, weights, states.grad, *(p.grad for p in pooling.parameters())):
        assert torch.isfinite(found).all()


def test_3_the_guard_is_not_a_cliff() -> None:
    pooling, states = made(word_mlp=False), torch.zeros(1, 4, 6, dtype=torch.float64, requires_grad=True)
    assert pooling.eps == 1e-6
    scores = pooling.scores(states, None, None)
    for head in range(3):
        (slope,) = torch.autograd.grad(scores[0, head, 0], states, retain_graph=True)
        assert 0 < slope.norm() < 1e7
    assert all(p.abs().max() > 1e-3 for p in made().parameters())  # the learned context is not zero


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.1, 3.0])
@pytest.mark.parametrize("normalise", [True, False])
def test_4_attention_cannot_become_sharp(temperature: float, normalise: bool) -> None:
    pooling, length = made(temperature=temperature, normalise_heads=normalise), 100
    bound = math.exp(2 / temperature) / (math.exp(2 / temperature) + length - 1)
    assert pooling.weight_bound(length) == pytest.approx(bound, rel=1e-12)
    assert pooling(100 * drawn(length=length))[1].max() <= bound * (1 + 1e-12)
    # The bound is reached: one word at 1 in a head, all others at -1.
    extreme = LamaPooling(2, 2, word_mlp=False, normalise_heads=False, temperature=temperature).double()
    with torch.no_grad():
        for p in extreme.parameters():
            p.fill_(1)
    states = torch.full((1, length, 2), -50.0, dtype=torch.float64)
    states[0, 7] = 50
    assert extreme(states)[1][0, 0, 7].item() == pytest.approx(bound, rel=1e-9)


def test_4_the_bound_of_the_page() -> None:
    assert LamaPooling(200, 10).weight_bound(100) == pytest.approx(0.069453, abs=5e-7)
    assert LamaPooling(8, 2).weight_bound(1) == 1
    assert LamaPooling(8, 2, temperature=1e-3).weight_bound(1000) == 1  # e^2000 is not computed
    with pytest.raises(ValueError, match="length=0"):
        LamaPooling(8, 2).weight_bound(0)


def test_5_the_word_mlp_is_there() -> None:
    with_it, without = made(), made(word_mlp=False)
    assert with_it.word_mlp is not None and with_it.word_mlp.weight.shape == (6, 6)
    assert with_it.word_mlp_params() == 6 * 6 + 6 and without.word_mlp_params() == 0
    sizes = [sum(p.numel() for p in pooling.parameters()) for pooling in (with_it, without)]
    assert sizes[0] - sizes[1] == 6 * 6 + 6


def test_6_values_are_the_states() -> None:
    pooling, states = made(), drawn()
    pooled, weights = pooling(states)
    by_head = pooled.unflatten(1, (3, 6))
    torch.testing.assert_close(by_head, weights @ states, atol=1e-12, rtol=0)
    assert pooling.word_mlp is not None
    assert (by_head - weights @ pooling.word_mlp(states).tanh()).abs().max() > 0.1


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_7_padding_changes_nothing(options: dict, side: str) -> None:
    """Of the pooling behind a packed GRU; what stands at padding is never read."""
    torch.manual_seed(0)
    gru, pooling, words = (
        nn.GRU(6, 3, bidirectional=True, batch_first=True).double(),
        made(**options),
        drawn(),
    )
    lengths = torch.tensor([5, 3])

    def encoded(embedded: Tensor) -> Tensor:
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(gru(packed)[0], batch_first=True, total_length=embedded.shape[1])[0]

    mask = torch.arange(5) < lengths[:, None]
    short, short_weights = pooling(encoded(words), mask, words)
    for junk in (0.0, 1e4, math.nan, math.inf):
        pads = torch.full((2, 7, 6), junk, dtype=torch.float64)
        parts = [encoded(words), pads], [words, pads], [mask, torch.zeros(2, 7, dtype=torch.bool)]
        if side == "left":
            parts = [part[::-1] for part in parts]
        longer, weights = pooling(torch.cat(parts[0], 1), torch.cat(parts[2], 1), torch.cat(parts[1], 1))
        torch.testing.assert_close(longer, short, atol=1e-12, rtol=0)
        kept = weights[..., :5] if side == "right" else weights[..., 7:]
        torch.testing.assert_close(kept, short_weights, atol=1e-12, rtol=0)
    alone = pooling(encoded(words)[1:, :3], None, words[1:, :3])[0]
    torch.testing.assert_close(alone, short[1:], atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", VARIANTS)
def test_8_a_sample_of_padding_alone_is_zeros(options: dict) -> None:
    pooling, states = made(**options), drawn(batch=3)
    states[1] = math.nan  # as an encoder gives that attends to nothing
    states.requires_grad_()
    mask = torch.tensor([[True] * 5, [False] * 5, [True] * 2 + [False] * 3])
    pooled, weights = pooling(states, mask, states)
    assert not pooled[1].any() and not weights[1].any()
    others = pooling(states.detach()[[0, 2]], mask[[0, 2]], states.detach()[[0, 2]])[0]
    torch.testing.assert_close(pooled[[0, 2]], others, atol=1e-13, rtol=0)
    pooled.square().sum().backward()
    assert states.grad is not None and not states.grad[1].any()
    for grad in (states.grad, *(p.grad for p in pooling.parameters())):
        assert torch.isfinite(grad).all()  # type: ignore[arg-type]


def test_9_heads_major_and_reloads_bit_equal() -> None:
    pooling, states = made(heads=4, rank_per_head=2), drawn()
    pooled, weights = pooling(states)
    assert pooling.out_features == pooled.shape[1] == 24
    for i in range(4):
        assert torch.equal(pooled[:, i * 6 : (i + 1) * 6], (weights @ states)[:, i])
    keys = ["context", "context_proj.weight", "word_proj.weight", "word_mlp.weight", "word_mlp.bias"]
    assert list(pooling.state_dict()) == keys
    other = LamaPooling(6, 4, rank_per_head=2).double()
    other.load_state_dict(copy.deepcopy(pooling.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(other(states), (pooled, weights), strict=True))
    torch.manual_seed(3)
    one = LamaPooling(6, 4).state_dict()
    torch.manual_seed(3)
    assert all(torch.equal(one[key], value) for key, value in LamaPooling(6, 4).state_dict().items())


def test_10_scale_moves_between_p_and_q() -> None:
    pooling, states = made(), drawn()
    before = pooling.scores(states, None, None)
    with torch.no_grad():
        pooling.context_proj.weight.mul_(8.0)
        pooling.word_proj.weight.div_(8.0)
    torch.testing.assert_close(pooling.scores(states, None, None), before, atol=1e-12, rtol=0)


def test_11_both_ranks_of_the_context() -> None:
    learned, states = made(), drawn()
    own = made(context="mean", context_of="embedding")
    own.load_state_dict({k: v for k, v in learned.state_dict().items() if k != "context"})
    assert learned.context is not None
    repeated = learned.context.detach().expand_as(states)  # of which the mean is (B, d): the same vector
    torch.testing.assert_close(own(states, None, repeated), learned(states), atol=1e-12, rtol=0)
    # With a context of its own, a word's scores depend on the rest of its sample.
    mean, shared = made(context="mean"), drawn()
    shared[1, 0] = shared[0, 0]
    f = mean.scores(shared, None, None)[:, :, 0]
    assert (f[0] - f[1]).abs().max() > 1e-2
    f = learned.scores(shared, None, None)[:, :, 0]
    torch.testing.assert_close(f[0], f[1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("context", ["learned", "mean"])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_12_equals_unfactored_affinities(rank: int, context: str, normalise: bool) -> None:
    """Brute force with (d, d) matrices; the sum of a head's k products comes before tanh."""
    pooling = made(rank_per_head=rank, context=context, normalise_heads=normalise)
    with torch.no_grad():
        pooling.context_proj.weight.mul_(10)  # so that tanh bends
    states, mask = 3 * drawn(), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    pooled, weights = pooling(states, mask)
    p, q = (
        layer.weight.detach().view(3, rank, 6)  # type: ignore[operator]
        for layer in (pooling.context_proj, pooling.word_proj)
    )
    affinities = torch.stack([sum(torch.outer(p[i, k], q[i, k]) for k in range(rank)) for i in range(3)])  # type: ignore[arg-type]
    torch.testing.assert_close(pooling.affinities(), affinities, atol=1e-12, rtol=0)
    assert pooling.word_mlp is not None
    for b, n in ((0, 5), (1, 3)):
        h = states[b, :n]
        c = h.mean(0) if pooling.context is None else pooling.context
        u = pooling.word_mlp(h).tanh()
        f = torch.stack([torch.stack([c @ affinities[i] @ u[t] for i in range(3)]) for t in range(n)]).tanh()
        a = ((f / f.norm(dim=1, keepdim=True) if normalise else f).softmax(0)).mT
        torch.testing.assert_close(weights[b, :, :n], a, atol=1e-10, rtol=0)
        torch.testing.assert_close(pooled[b], (a @ h).flatten(), atol=1e-10, rtol=0)
        if rank > 1 and not normalise:
            terms = torch.einsum("ikd,d->ik", p, c) * torch.einsum("ikd,td->tik", q, u)
            assert (terms.tanh().sum(-1) - f).abs().max() > 1e-4


def test_13_the_axes_of_the_norms() -> None:
    pooling, states = made(heads=4), drawn()
    norms = pooling.scores(states, None, None).norm(dim=1)  # over heads, of each word
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-12, rtol=0)
    weights = pooling(states)[1]
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, dtype=torch.float64), atol=1e-12, rtol=0)


def test_diversity_penalty() -> None:
    apart = torch.eye(3)[None]  # three heads, each at a word of its own
    alike = torch.tensor([[[1.0, 0.0, 0.0]] * 3])  # A Aᵀ is all ones: six entries off by one
    assert diversity_penalty(apart) == 0 and diversity_penalty(alike) == 6
    assert diversity_penalty(torch.cat([apart, alike])) == 3
    pooling = made()
    diversity_penalty(pooling(drawn())[1]).backward()
    assert pooling.word_proj.weight.grad.abs().max() > 0  # type: ignore[union-attr]
