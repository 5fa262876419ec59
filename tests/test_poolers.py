"""The poolers by name: one behaviour for all, and each baseline against its formula and torch's own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rankfold.poolers import POOLERS, AdditivePooling, MultiheadPooling, SelfAttentivePooling, pooler
from rankfold.pooling import Pooling

OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "additive": {"hidden": 5},
    "self_attentive": {"heads": 3, "hidden": 7},
    "multihead": {"heads": 2},
    "lama": {"heads": 3, "context": "mean"},
}
NAMES = sorted(OPTIONS)


def made(name: str) -> Pooling:
    torch.manual_seed(0)
    return pooler(name, 6, **OPTIONS[name]).double()


def drawn(batch: int = 3, length: int = 5) -> Tensor:
    return torch.randn(batch, length, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_there_are_five() -> None:
    assert list(POOLERS) == ["mean", "additive", "self_attentive", "multihead", "lama"]
    assert sorted(POOLERS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_sums(name: str) -> None:
    pooling = made(name)
    pooled, weights = pooling(drawn())
    assert pooled.shape == (3, pooling.out_features) and weights.shape == (3, pooling.heads, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, pooling.heads, dtype=torch.float64))
    assert pooling.attention_params() + pooling.word_mlp_params() == sum(
        p.numel() for p in pooling.parameters()
    )
    all_true = pooling(drawn(), torch.ones(3, 5, dtype=torch.int64))
    torch.testing.assert_close(all_true, (pooled, weights), atol=1e-13, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_padding_is_never_read(name: str) -> None:
    pooling, states = made(name), drawn()
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 0, 1]])
    states[mask == 0] = math.nan
    states.requires_grad_()
    pooled, weights = pooling(states, mask)
    assert (
        not pooled[1].any()
        and not weights[1].any()
        and not weights[mask[:, None].expand_as(weights) == 0].any()
    )
    for row in (0, 2):
        alone, alone_weights = pooling(states[row : row + 1, mask[row].bool()])
        torch.testing.assert_close(pooled[row], alone[0], atol=1e-12, rtol=0)
        torch.testing.assert_close(weights[row][:, mask[row].bool()], alone_weights[0], atol=1e-12, rtol=0)
    (pooled.square().sum() + weights.square().sum()).backward()
    assert states.grad is not None and not states.grad[mask == 0].any()
    for grad in (states.grad, *(p.grad for p in pooling.parameters())):
        assert grad is not None and torch.isfinite(grad).all()


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str) -> None:
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]])
    pooling = made(name)
    assert torch.autograd.gradcheck(lambda x: pooling(x, mask), drawn(length=3).requires_grad_())


@pytest.mark.parametrize("name", NAMES)
def test_compiles_whole_and_under_autocast(name: str) -> None:
    pooling, x = made(name).float(), drawn().float()
    mask = torch.tensor([[1] * 5, [0] * 5, [1, 1, 0, 0, 0]])
    compiled = torch.compile(pooling, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mask), pooling(x, mask))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled, weights = pooling(x, mask)
    assert torch.isfinite(pooled).all() and weights.dtype == torch.float32
    torch.testing.assert_close(pooled.float(), pooling(x, mask)[0], atol=3e-2, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_macs_are_what_the_counter_counts(name: str) -> None:
    pooling, mean = made(name), {"mean": 6, "multihead": 6, "lama": 6}.get(name, 0)  # a mean is not counted
    for length in (3, 8, 20):
        with FlopCounterMode(display=False) as counter:
            pooling(drawn(1, length))
        assert counter.get_total_flops() == 2 * (pooling.macs(length) - mean * length), length


def test_parameters_and_flops_of_the_page() -> None:
    lin, attention = SelfAttentivePooling(200, 10), MultiheadPooling(200, 10)
    assert lin.attention_params() == 73_500
    assert attention.attention_params() == 160_800
    assert attention.attention_params() == sum(p.numel() for p in nn.MultiheadAttention(200, 10).parameters())
    assert 2 * attention.macs(100) == 40_000_000 + 2 * 100 * 200  # and the mean of what it gives
    assert pooler("mean", 200).attention_params() == 0


def test_formulas() -> None:
    x = drawn()
    additive = AdditivePooling(6, 5).double()
    scores = (x @ additive.inner.weight.mT + additive.inner.bias).tanh() @ additive.outer.weight[0]
    wanted = torch.einsum("bt,btd->bd", scores.softmax(1), x)
    torch.testing.assert_close(additive(x)[0], wanted, atol=1e-12, rtol=0)
    lin = SelfAttentivePooling(6, 3, 7).double()
    a = (lin.outer.weight @ (lin.inner.weight @ x.mT).tanh()).softmax(-1)
    torch.testing.assert_close(lin(x)[0], (a @ x).flatten(1), atol=1e-12, rtol=0)
    assert AdditivePooling(6).inner.out_features == 6


def test_multihead_is_torchs_attention_and_a_mean() -> None:
    x, mask = drawn(), torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] + [0] * 4])
    packed = nn.MultiheadAttention(6, 2, batch_first=True).double()
    pooling = MultiheadPooling(6, 2).double()
    pooling.attention = type(pooling.attention).of(packed)
    out, weights = packed(x, x, x, mask == 0, average_attn_weights=False)
    share = mask.double() / mask.sum(1, keepdim=True)
    pooled, got = pooling(x, mask)
    torch.testing.assert_close(pooled, torch.einsum("bt,btd->bd", share, out), atol=1e-12, rtol=0)
    torch.testing.assert_close(got, torch.einsum("bt,bhtk->bhk", share, weights), atol=1e-12, rtol=0)


def test_refused() -> None:
    with pytest.raises(
        ValueError, match="pooler 'max' is not one of mean, additive, self_attentive, multihead"
    ):
        pooler("max", 8)
    with pytest.raises(ValueError, match="pooler 'mean' has no option 'heads'; it has none"):
        pooler("mean", 8, heads=2)
    with pytest.raises(ValueError, match="'multihead' has no option 'hidden'; it has heads, dropout"):
        pooler("multihead", 8, hidden=2)
    with pytest.raises(ValueError, match="hidden=0"):
        pooler("self_attentive", 8, hidden=0)
    with pytest.raises(ValueError, match="embed_dim=8 must be a positive multiple of num_heads=3"):
        pooler("multihead", 8, heads=3)
    with pytest.raises(ValueError, match="heads=1 with normalise_heads"):
        pooler("lama", 8, heads=1)
    with pytest.raises(ValueError, match="width=0"):
        pooler("mean", 0)
