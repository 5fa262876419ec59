"""Adapters: parameter counts by formula, what the layouts let tokens see, masks, and the start."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.attention import MultiheadAttention
from rankfold.hoi.bottleneck import AdapterBlock, ContextMLP, LoneAttention


def count(*modules: nn.Module | None) -> int:
    return sum(p.numel() for module in modules if module is not None for p in module.parameters())


def block(width: int = 6, context: int | None = None, **options: object) -> AdapterBlock:
    """One that adds something, in float64."""
    made = AdapterBlock(width, context, **{"bottleneck": 4, "ffn": 8, "hidden": 5} | options).double()  # type: ignore[arg-type]
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# --- parameters --------------------------------------------------------------------------------------------


def test_counts_of_the_public_code() -> None:
    """The page's derived numbers, both backbones: (D, V) = (512, 768) and (768, 1024)."""
    expected = {
        (512, 768): (133_504, 413_568, 611_200, 410_432, 91_072),
        (768, 1024): (166_784, 545_152, 841_600, 509_504, 123_840),
    }
    for (d, v), (layer, language, pairs, tokens, prior) in expected.items():
        one = AdapterBlock(v, self_attention=False, scale=1e-9, dead=True)
        two = AdapterBlock(d, d, dead=True)
        assert count(one) - count(one.down, one.up) - v == 33_600
        assert count(two) - count(two.down, two.up, two.read) == 50_240
        assert count(one) == layer
        assert count(two, AdapterBlock(d, d, attend=True, dead=True)) == language
        assert count(AdapterBlock(2 * d, d, dead=True), AdapterBlock(2 * d, 2 * d, dead=True)) == pairs
        rest = nn.Sequential(nn.Linear(256, v), nn.LayerNorm(v), nn.Linear(36, 128), nn.Linear(128, 256))
        assert count(AdapterBlock(256, d, dead=True), rest) == tokens
        assert count(ContextMLP(d + 5)) == prior


def test_what_is_dead_never_gets_a_gradient_and_is_left_out_by_default() -> None:
    width, attention = 6, 2 * (4 * 4 + 4)  # query and key
    for options, dead in (
        ({"context": 5}, attention),
        ({}, 2 * attention),
        ({"attend": True}, 0),
        ({"self_attention": False}, 2 * 4),  # a LayerNorm
    ):
        lean, full = block(width, **options), block(width, **options, dead=True)
        assert count(full) - count(lean) == dead
        context = randn(2, 3, 4) if lean.needs_context else None
        for made in (lean, full):
            made(randn(2, 3, width), context).square().sum().backward()
        without = {n for n, p in full.named_parameters() if p.grad is None}
        without -= {n for n, _ in full.named_parameters() if n.startswith("read")}  # the caller calls it
        assert sum(dict(full.named_parameters())[n].numel() for n in without) == dead
        assert {n for n, _ in full.named_parameters()} - {n for n, _ in lean.named_parameters()} == without
        assert all(p.grad is not None for n, p in lean.named_parameters() if not n.startswith("read"))


def test_dead_parameters_change_no_output() -> None:
    for options in ({}, {"self_attention": False}, {"context": 5}):
        lean, full = block(**options), block(**options, dead=True)
        full.load_state_dict(lean.state_dict(), strict=False)
        x, context = randn(2, 3, 6), randn(2, 7, 4) if lean.needs_context else None
        assert torch.allclose(lean(x, context), full(x, context))


# --- layouts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dead", [False, True])
def test_tokens_see_each_other_only_if_asked(dead: bool) -> None:
    x = randn(1, 5, 6)
    other = x.clone()
    other[:, 1:] = randn(1, 4, 6)
    alone, together = block(dead=dead), block(attend=True, dead=dead)
    assert torch.equal(alone(x)[:, 0], alone(other)[:, 0])
    assert not torch.allclose(together(x)[:, 0], together(other)[:, 0])


def test_a_lone_token_is_attended_by_a_linear_map() -> None:
    """Softmax over one key: the layout in which every token is a sequence of its own."""
    lone, full = LoneAttention(8).double(), MultiheadAttention(8, 2).double()
    full.load_state_dict(lone.state_dict(), strict=False)
    x = randn(5, 8)
    found, weights = full(*[x.unsqueeze(0)] * 3)  # sequence first: length 1
    assert torch.allclose(found[0], lone.out_proj(lone.v_proj(x)))
    assert torch.equal(weights, torch.ones(5, 1, 1, dtype=torch.float64))


def test_the_layout_of_length_1_equals_torchs_decoder_layer() -> None:
    """Post-norm: self-attention, attention to the input, feed-forward; the sequence first, of length 1."""
    ours = block(dead=True)
    theirs = nn.TransformerDecoderLayer(4, 2, 8, dropout=0.0, dtype=torch.float64)
    state = {}
    for name, inner in (("self_attn", ours.self_attention), ("multihead_attn", ours.cross_attention)):
        assert isinstance(inner, MultiheadAttention)
        for kind in ("weight", "bias"):
            parts = [getattr(getattr(inner, f"{x}_proj"), kind) for x in "qkv"]
            state[f"{name}.in_proj_{kind}"] = torch.cat(parts)
            state[f"{name}.out_proj.{kind}"] = getattr(inner.out_proj, kind)
    for i, place in ((0, "linear1"), (2, "linear2")):
        state |= {f"{place}.{k}": v for k, v in ours.feed_forward[i].state_dict().items()}
    for i in range(3):
        state |= {f"norm{i + 1}.{k}": v for k, v in ours.norms[i].state_dict().items()}
    theirs.load_state_dict(state)
    x = randn(5, 6)
    inner = F.relu(ours.down(x)).unsqueeze(0)
    assert torch.allclose(ours(x), x + ours.up(theirs(inner, inner)[0]))


def test_one_repeated_context_vector_is_one_key() -> None:
    """The 600 equal keys of the public code: the same image vector for every class."""
    made = block(context=5, attend=True)
    x, vector = randn(2, 3, 6), randn(2, 1, 4)
    assert torch.allclose(made(x, vector), made(x, vector.expand(-1, 3, -1)))


def test_leading_dimensions_broadcast() -> None:
    made = block(context=5, attend=True)
    x, context = randn(1, 3, 6), randn(4, 2, 4)
    out = made(x, context)
    assert out.shape == (4, 3, 6)
    for b in range(4):
        assert torch.allclose(out[b], made(x[0], context[b]))
    pairs = block(context=5)
    y, own = randn(2, 3, 1, 6), randn(2, 3, 7, 4)
    assert torch.allclose(pairs(y, own)[1, 2], pairs(y[1, 2], own[1, 2]))


# --- masks -------------------------------------------------------------------------------------------------


def test_padding_of_a_context_changes_nothing() -> None:
    made = block(self_attention=False)
    x, context = randn(2, 3, 6), randn(2, 4, 4)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    out = made(x, context, mask)
    assert torch.allclose(out[0], made(x[:1], context[:1, :2])[0])
    assert torch.allclose(out[1], made(x[1:], context[1:])[0])
    with torch.no_grad():
        context[0, 2:] = 1e3
    assert torch.equal(out, made(x, context, mask))


def test_a_key_of_zeros_is_a_key() -> None:
    made = block(self_attention=False)
    x, context = randn(1, 3, 6), randn(1, 4, 4)
    context[0, 2] = 0
    assert not torch.allclose(made(x, context), made(x, context[:, [0, 1, 3]]))


def test_no_context_at_all_is_finite() -> None:
    """An image without detections: what it attends to adds nothing, and no gradient is NaN."""
    made = block(self_attention=False)
    x, context = randn(2, 3, 6).requires_grad_(), randn(2, 4, 4).requires_grad_()
    mask = torch.tensor([[False] * 4, [True] * 4])
    out = made(x, context, mask)
    out.sum().backward()
    assert out.isfinite().all() and all(g.isfinite().all() for g in (x.grad, context.grad))  # type: ignore[union-attr]
    assert all(p.grad.isfinite().all() for p in made.parameters() if p.grad is not None)
    assert torch.allclose(out[0], made(x[:1], context[:1, :0])[0])


def test_padding_of_tokens_is_no_key() -> None:
    made = block(attend=True)
    x, present = randn(1, 5, 6), torch.tensor([[True, True, True, False, False]])
    assert torch.allclose(made(x, present=present)[:, :3], made(x[:, :3]))


def test_no_token() -> None:
    assert block(attend=True)(randn(2, 0, 6)).shape == (2, 0, 6)


# --- the start ---------------------------------------------------------------------------------------------


def test_adds_nothing_at_the_start_and_then_learns() -> None:
    """The first gradient of Up is as small as the scale: 1e-9 leaves the adapter nearly dead."""
    x, reached = torch.randn(2, 5, 16), {}
    for scale in (None, 1.0, 1e-9):
        torch.manual_seed(0)
        made = AdapterBlock(16, scale=scale)
        assert torch.equal(made(x), x)
        made(x).square().sum().backward()
        assert made.up.weight.grad is not None and made.down.weight.grad is not None
        assert not made.down.weight.grad.any()
        reached[scale] = float(made.up.weight.grad.norm())
    assert reached[None] == reached[1.0] > 1
    assert reached[1e-9] == pytest.approx(1e-9 * reached[1.0], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bottleneck": 5}, "bottleneck=5 of an adapter must be a multiple of heads=2"),
        ({"ffn": 0}, "ffn=0 of an adapter"),
        ({"width": -1}, "width=-1"),
    ],
)
def test_bad_sizes(options: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        AdapterBlock(**{"width": 8} | options)


def test_a_context_is_given_where_it_is_read_and_nowhere_else() -> None:
    for made in (block(context=5), block(self_attention=False)):
        with pytest.raises(ValueError, match="this adapter reads a context"):
            made(randn(1, 2, 6))
        with pytest.raises(ValueError, match="a context has width 5, this adapter reads 4"):
            made(randn(1, 2, 6), randn(1, 2, 5))
    with pytest.raises(ValueError, match="made without a context"):
        block()(randn(1, 2, 6), randn(1, 2, 4))
