"""Cutting a trained model to any budget: curves, order, the greedy way, files, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold
from rankfold.cut import cut_, tail_errors
from rankfold.cut_items import items_of, prefix
from rankfold.cut_measure import measured
from rankfold.hosts import hosts
from rankfold.layers import Layer
from rankfold.method import Curve
from rankfold.metric import Metric
from rankfold.ordered_dropout import OrderedDropout
from rankfold.structures import LowRank


def products(model: Any, **options: Any) -> Any:
    """The model with its layers as products of full rank, largest singular value first."""
    regime = OrderedDropout(penalty=0, nested=True)
    regime.start_(model, **options)
    regime.finish_()
    return model


def mlp() -> nn.Sequential:
    first, second = nn.Linear(12, 20), nn.Linear(20, 16)
    return products(nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(16, 4)))


def pairs() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(16, 12), torch.randint(4, (16,))) for _ in range(2)]


def ranks(model: nn.Module) -> dict[str, int]:
    return {name: host.weight.rank for name, host in hosts(model).items()}  # type: ignore[misc]


def test_tails_in_a_metric() -> None:
    structure = LowRank((7, 9), rank=5, scale=2.0, dtype=torch.float64)
    side = torch.randn(7, 7, dtype=torch.float64)
    for metric in (Metric(), Metric(side @ side.mT, torch.rand(9)), Metric(torch.tensor(3.0))):
        found = tail_errors(structure, metric)
        left, right = structure.factors()
        for b in range(6):
            expected = metric.error(left[:, b:] @ right[b:])
            assert float(found[b]) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("unit", ["nbytes", "params", "macs"])
@pytest.mark.parametrize("options", [{}, {"batches": pairs}, {"batches": pairs, "method": "greedy"}])
def test_any_budget_from_one_model(unit: str, options: dict[str, Any]) -> None:
    model, x = mlp(), torch.randn(5, 12)
    expected = model(x)
    options = {key: value() if callable(value) else value for key, value in options.items()}
    size = 4 if unit == "nbytes" else 1
    for budget in (1.0, 0.6, 0.3):
        cut = copy.deepcopy(model)
        facts = cut_(cut, budget=budget, unit=unit, **options)
        assert facts.dense == size * (12 * 20 + 20 * 16 + 16 * 4)
        assert facts.before == size * (12 * 32 + 16 * 36 + 4 * 20)
        assert facts.after <= budget * facts.dense and facts.kept > 0.8 * budget
        assert {n: r for n, r in facts.ranks.items() if r is not None} == ranks(cut)
        spent = sum(host.weight.macs for host in hosts(cut).values())
        spent += sum(m.weight.numel() for m in cut if type(m) is nn.Linear)
        assert size * spent == facts.after
        for name, host in hosts(cut).items():
            kept = host.weight.right.weight
            assert torch.equal(kept, model.get_submodule(name).weight.right.weight[: len(kept)])
            assert kept.requires_grad and cut.training
        if budget == 1.0:
            assert not hosts(cut) and set(facts.ranks.values()) == {None}
            torch.testing.assert_close(cut(x), expected, rtol=0, atol=1e-5)
        if options.get("method") == "greedy":
            assert facts.loss is not None and facts.error is None
    assert facts.to_json()["kept"] == facts.kept


def test_data_give_the_rank_to_the_layer_that_needs_it() -> None:
    """Two equal layers, of which the loss hardly sees the second."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self.faint = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.seen(x) + 1e-2 * self.faint(x)

    model = Two()
    model.faint.load_state_dict(model.seen.state_dict())
    products(model)
    batches = [(torch.randn(64, 12), torch.randint(12, (64,)))]
    blind, told, greedy = (copy.deepcopy(model) for _ in range(3))
    cut_(blind, budget=0.5)
    assert ranks(blind)["seen"] == ranks(blind)["faint"]
    cut_(told, budget=0.5, batches=batches)
    cut_(greedy, budget=0.5, batches=batches, method="greedy")
    assert ranks(told)["faint"] < 2 and ranks(told)["seen"] > 3
    assert ranks(greedy)["faint"] <= ranks(greedy)["seen"]


def test_products_without_an_order_are_sorted_first() -> None:
    model = mlp()
    shuffled = copy.deepcopy(model)
    with torch.no_grad():
        for host in hosts(shuffled).values():
            order = torch.randperm(host.weight.rank)
            host.weight.left.weight.copy_(host.weight.left.weight[:, order])
            host.weight.right.weight.copy_(host.weight.right.weight[order])
    lost = {}
    for name, each, order in (
        ("svd", model, "prefix"),
        ("as is", shuffled, "prefix"),
        ("sorted", shuffled, "svd"),
    ):
        lost[name] = cut_(copy.deepcopy(each), budget=0.4, order=order).error
    assert lost["sorted"] == pytest.approx(lost["svd"], rel=1e-4) and lost["as is"] > 1.2 * lost["svd"]
    batches = pairs()
    aware = [
        cut_(copy.deepcopy(shuffled), budget=0.4, order=o, batches=batches).error for o in ("prefix", "svd")
    ]
    assert aware[1] < aware[0]


@pytest.mark.parametrize("conv", ["channel", "spatial"])
def test_convolutions_and_batch_norms(conv: str) -> None:
    """Trap 18: statistics are collected anew after a cut."""
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2)]
    model = nn.Sequential(*layers, nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 9, 5))
    products(model, targets=["0", "3"], conv=conv)
    batches = [(torch.randn(32, 3, 8, 8) + 2, torch.randint(5, (32,))) for _ in range(2)]
    old = model[1].running_mean.clone()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="give batches with labels"):
        cut_(model, budget=0.4, batches=[batches[0][0]], method="greedy")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    facts = cut_(model, budget=0.4, batches=batches)
    assert facts.norms == 2 and set(facts.ranks) == {"0", "3"} and facts.kept <= 0.4
    assert not torch.allclose(old, model[1].running_mean)
    assert model[1].num_batches_tracked == 2 and model[1].momentum == 0.1
    assert model[1].track_running_stats and model[1].training
    with torch.no_grad():
        y, z = (model[0](batch[0]).mean((0, 2, 3)) for batch in batches)
    torch.testing.assert_close(model[1].running_mean, (y + z) / 2, rtol=1e-4, atol=1e-4)


def test_refusals() -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"budget": 0}, "budget=0 is the fraction of the dense nbytes kept"),
        ({"budget": 1.5}, "above 0 and at most 1"),
        ({"budget": 1e-3}, r"budget=0.001 is below the smallest possible 0\.1411"),
        ({"budget": 0.5, "unit": "bits"}, "unit='bits'"),
        ({"budget": 0.5, "order": "size"}, "order='size'"),
        ({"budget": 0.5, "method": "best"}, "method='best'"),
        ({"budget": 0.5, "method": "greedy"}, "scores on data but batches is None"),
        ({"budget": 0.5, "method": "greedy", "batches": [torch.randn(4, 12)]}, "give batches with labels"),
    ]
    model = mlp().train()
    held = {name: host.weight for name, host in hosts(model).items()}
    for options, message in bad:
        with pytest.raises(ValueError, match=message):
            cut_(model, **options)
        assert all(host.weight is held[name] for name, host in hosts(model).items())
        assert all(module.training for module in model.modules())
    cut_(model, budget=0.5)
    with pytest.raises(ValueError, match=r"budget=0.9 is above what the model has, 0\.[45]\d* of the dense"):
        cut_(model, budget=0.9)
    with pytest.raises(ValueError, match="no low-rank layer to cut; its factorized layers are none"):
        cut_(nn.Sequential(nn.Linear(3, 3)), budget=0.5)
    parts = LowRank((8, 6), rank=3).split([4, 4])
    shared = nn.ModuleList([Layer(nn.Linear(6, 4)).wrap(part) for part in parts])
    with pytest.raises(ValueError, match="layers '0' and '1' share a factor"):
        cut_(shared, budget=0.5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_is_cut_saved_and_opened(
    tiny_llama: Callable[..., Any], tmp_path: Path, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM

    targets = ["*_proj", "*embed_tokens", "lm_head"] if tied else None
    model = products(tiny_llama(tie_word_embeddings=tied), targets=targets)
    ids = torch.randint(4, 128, (4, 16))
    expected = model(ids).logits.detach()
    rankfold.save(model, tmp_path / "whole")
    found = {}
    for budget in (0.7, 0.4):
        cut = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
        torch.testing.assert_close(cut(ids).logits, expected, rtol=0, atol=1e-5)
        facts = cut_(cut, budget=budget, batches=ids)
        assert facts.kept <= budget and facts.error is not None
        rankfold.save(cut, tmp_path / str(budget))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(budget))
        assert torch.equal(again(ids).logits, cut(ids).logits)
        if tied:
            assert again.lm_head.weight is again.model.embed_tokens.weight
        found[budget] = (again(ids).logits - expected).square().mean().item()
    assert 0 < found[0.7] < found[0.4]


def test_a_curve_is_scaled_to_what_its_layer_was_seen_to_lose() -> None:
    model, batches = mlp().train(), pairs()
    items = items_of(model, "params")
    curves = {}
    for item in items:
        errors = tail_errors(item.structure, Metric()).tolist()
        lost = (*(errors[size] for size in item.sizes[:-1] if size is not None), 0.0)
        curves[item.names[0]] = Curve(item.sizes, item.costs, lost, energy=errors[0])
    held = {name: host.weight for name, host in hosts(model).items()}
    found = measured(model, items, curves, 0.4, batches)
    assert model.training and all(host.weight is held[name] for name, host in hosts(model).items())
    with torch.no_grad():
        before = model(batches[0][0]).log_softmax(-1)
    for item in items:
        name = item.names[0]
        pick = sum(cost <= 0.4 * item.dense for cost in item.costs[:-1]) - 1
        alone = copy.deepcopy(model)
        host, size = alone.get_submodule(name), item.sizes[pick]
        assert isinstance(size, int)
        host.weight = prefix(host.weight, size)  # type: ignore[arg-type]
        with torch.no_grad():
            after = alone(batches[0][0]).log_softmax(-1)
        divergence = (before.exp() * (before - after)).sum(-1).mean().item()
        assert found[name].errors[pick] == pytest.approx(2 * divergence, rel=1e-4)
        scale = found[name].errors[0] / curves[name].errors[0]
        assert found[name].errors == pytest.approx([scale * error for error in curves[name].errors])
