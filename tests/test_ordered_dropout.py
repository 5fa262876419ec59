"""Maestro's regime: how it starts, what it refuses, what a step is and costs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toy_ordered import Mixed, mlp

from rankfold.hosts import hosts
from rankfold.ordered import Ordered
from rankfold.ordered_dropout import OrderedDropout
from rankfold.structures import LowRank

# Start


@pytest.mark.parametrize("conv", ["channel", "spatial"])
def test_start_keeps_the_function(conv: str) -> None:
    model, index = Mixed(), torch.randint(9, (5, 4))
    expected = model(index)
    regime = OrderedDropout(penalty=0)
    regime.start_(model, targets=["*"], conv=conv)
    assert set(regime.ranks) == {"last", "conv", "first", "table"}
    torch.testing.assert_close(model(index), expected, rtol=0, atol=1e-5)
    left, right = model.first.weight.left.weight, model.first.weight.right.weight  # type: ignore[union-attr]
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))  # √σ on either side


def test_tied_layers_stay_tied_or_are_left_alone(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    ids = torch.randint(4, 128, (2, 6))
    expected = model(ids).logits
    regime = OrderedDropout(penalty=0)
    regime.start_(model)
    assert not {"lm_head", "model.embed_tokens"} & set(hosts(model))
    model = tiny_llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"shares its weight with 'lm_head', which is not"):
        regime.start_(model, targets=["*embed_tokens"])
    regime.start_(model, targets=["*embed_tokens", "lm_head"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
    regime.finish_()
    assert model.lm_head.weight is model.model.embed_tokens.weight  # folded
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)


def test_refusals() -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"penalty": -1.0}, "penalty=-1.0"),
        ({"penalty": math.nan}, "penalty=nan"),
        ({"penalty": 0, "sampler": "both"}, "choose one of"),
        ({"penalty": 0, "eps": 1.0}, "removes everything"),
        ({"penalty": 0, "shrink_every": 0}, "shrink_every=0"),
        ({"penalty": 0, "smallest": 1.5}, "smallest=1.5"),
    ]
    for options, message in bad:
        with pytest.raises(ValueError, match=message):
            OrderedDropout(**options)
    with pytest.raises(TypeError, match="penalty"):  # it depends on the task: there is no default
        OrderedDropout()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="od_sampler"):  # trap 11
        OrderedDropout(penalty=0, od_sampler="pair")  # type: ignore[call-arg]
    regime = OrderedDropout(penalty=0)
    for verb in (regime.before_step, regime.penalty, regime.after_step, regime.shrink_, regime.finish_):
        with pytest.raises(ValueError, match="not in training"):
            verb()
    model = mlp(8, 6, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="a SGD made earlier holds 2 of them"):
        regime.start_(model)
    assert not hosts(model)
    del optimizer
    nn.init.zeros_(model[2].weight)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layer '2' is zero"):
        regime.start_(model)
    assert not hosts(model)


def test_packed_attention_is_refused_and_left_alone() -> None:
    """Trap 19: nn.MultiheadAttention reads out_proj.weight without calling it."""
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    with pytest.raises(ValueError, match=r"cannot be factorized.*NonDynamicallyQuantizableLinear"):
        OrderedDropout(penalty=0).start_(model, targets=["*out_proj"])
    regime = OrderedDropout(penalty=0)
    regime.start_(model)
    assert set(regime.ranks) == {"linear1", "linear2"}
    regime.before_step()
    model(torch.randn(2, 3, 8)).sum().backward()


# Steps


def test_every_kind_of_layer_trains_a_step(tiny_llama: Callable[..., Any]) -> None:
    """Trap 4: attention projections too; embeddings and convolutions; with and without recomputation."""
    model = tiny_llama().train()
    regime = OrderedDropout(penalty=1e-4, sampler="independent")
    regime.start_(model, targets=["*_proj", "*embed_tokens", "lm_head"])
    assert {"model.layers.0.self_attn.q_proj", "model.embed_tokens"} <= set(regime.ranks)
    ids = torch.randint(4, 128, (2, 6))
    grads = []
    for recompute in (False, True):
        model.zero_grad()
        if recompute:
            model.activation_checkpointing_enable()
        regime.before_step()
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            (model(input_ids=ids, labels=ids).loss + regime.penalty()).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))
    widths = {n: h.weight.width for n, h in hosts(model).items()}  # type: ignore[union-attr]
    assert any(widths[name] < rank for name, rank in regime.ranks.items())
    mixed = Mixed()
    regime = OrderedDropout(penalty=1e-3)
    regime.start_(mixed, targets=["*"])
    optimizer = torch.optim.SGD(mixed.parameters(), lr=0.1)
    regime.before_step()
    (mixed(torch.randint(9, (5, 4))).square().sum() + regime.penalty()).backward()
    before = [p.detach().clone() for p in mixed.parameters()]
    optimizer.step()
    regime.after_step()
    assert all(not torch.equal(p, q) for p, q in zip(mixed.parameters(), before, strict=True))


def test_the_drawn_layer_gets_the_width_whatever_the_order_of_calls() -> None:
    """Trap 9: a sampler read in the order of the calls goes wrong silently."""
    model, index = Mixed(), torch.randint(9, (5, 4))
    regime = OrderedDropout(penalty=0, seed=3)
    regime.start_(model, targets=["*"])
    layers = {name: host.weight for name, host in hosts(model).items()}
    for _ in range(6):
        regime.before_step()
        drawn = {n: x for n, x in layers.items() if isinstance(x, Ordered) and x.width < x.alive}
        expected = copy.deepcopy(model)
        for name, layer in drawn.items():
            width = layer.width
            cut = LowRank.of(layer.left.weight[:, :width].detach(), layer.right.weight[:width].detach())
            expected.get_submodule(name).weight = cut
        for host in hosts(expected).values():
            if isinstance(host.weight, Ordered):
                host.weight.draw_(None)
        assert len(drawn) <= 1
        torch.testing.assert_close(model(index), expected(index))
        recomputed = checkpoint(model, index, use_reentrant=False)
        assert isinstance(recomputed, Tensor) and torch.equal(recomputed, model(index))
        regime.after_step()


def test_the_penalty_and_its_gradients() -> None:
    model = mlp(8, 6, 4)
    regime = OrderedDropout(penalty=0.3, smallest=0)
    regime.start_(model)
    model[0].weight.keep_(3)  # type: ignore[union-attr, operator]
    structures = [host.weight for host in hosts(model).values()]
    by_hand = torch.zeros(())
    for structure in structures:
        assert isinstance(structure, Ordered)
        for b in range(structure.alive):
            tail = slice(b, structure.alive)
            by_hand = by_hand + structure.left.weight[:, tail].norm() + structure.right.weight[tail].norm()
    torch.testing.assert_close(regime.penalty(), 0.3 * by_hand)
    factors = [p for s in structures for p in s.parameters()]
    grads = torch.autograd.grad(0.3 * by_hand, factors)
    for factor in factors:
        factor.grad = torch.ones_like(factor)
    regime.penalty_gradients_()
    for factor, grad in zip(factors, grads, strict=True):
        torch.testing.assert_close(factor.grad, 1 + grad)
    for structure in structures:
        structure.keep_(0)  # type: ignore[operator]
    assert regime.penalty().item() == 0
    regime.penalty_gradients_()
