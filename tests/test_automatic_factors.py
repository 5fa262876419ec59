"""What `auto_` puts in a layer's place: the traps of the paper's page that are about factors, one test each.

Which layers it takes, and at which rank: tests/test_automatic.py.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from toy_automatic import SOLVERS, count, low, net

import rankfold
from rankfold import recipes
from rankfold.attention import unpack_attention_
from rankfold.automatic import auto, auto_, plan
from rankfold.factorize import factorize_
from rankfold.hosts import hosts
from rankfold.methods.at_ranks import AtRanks
from rankfold.metric import Metric
from rankfold.recipe import Recipe
from rankfold.testing import check_method

# Trap 10


def test_the_default_is_the_optimal_truncation_and_balanced() -> None:
    weight = torch.randn(64, 96)
    made = []
    for seed in (0, 1):
        model = nn.Sequential(nn.Linear(96, 64))
        model[0].weight = nn.Parameter(weight.clone())
        auto_(model, 20, seed=seed)
        made.append(low(model, "0"))
    assert torch.equal(made[0].to_dense(), made[1].to_dense())
    tail = torch.linalg.svdvals(weight.double())[20:].square().sum().sqrt()
    residual = (weight.double() - made[0].to_dense().detach().double()).norm()
    assert abs(float(residual / tail) - 1) < 1e-5
    left, right = made[0].left.weight, made[0].right.weight
    torch.testing.assert_close(left.norm(), right.norm())
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))


def test_random_factors_are_those_of_the_layer_s_name_and_the_seed() -> None:
    models = [net() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        auto_(model, 4, solver="random", seed=seed)
    first, again, other = (low(model, "0").to_dense() for model in models)
    assert torch.equal(first, again) and not torch.equal(first, other)


# Traps 11 and 12


@pytest.mark.parametrize("solver", SOLVERS)
def test_parameters_are_contiguous_and_inputs_need_not_be(solver: str, tmp_path: Path) -> None:
    model = net()
    auto_(model, 4, solver=solver)
    assert all(p.is_contiguous() for p in model.parameters())
    rankfold.save(model, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(stored[name], p) for name, p in model.named_parameters())
    x = torch.randn(32, 5).mT
    torch.testing.assert_close(model(x), model(x.contiguous()))
    model = nn.Sequential(nn.Conv2d(16, 16, 3))
    auto_(model, 4, solver=solver)
    x = torch.randn(2, 6, 6, 16).permute(0, 3, 1, 2)
    torch.testing.assert_close(model(x), model(x.contiguous()))


# Trap 13


class Tied(nn.Module):
    """64,000 parameters: an embedding and a head that are one."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(1000, 64), nn.Linear(64, 1000, bias=False)
        self.head.weight = self.table.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.table(index))


@pytest.mark.parametrize("solver", SOLVERS)
def test_tied_weights_stay_tied_or_alone(solver: str) -> None:
    model = Tied()
    report = auto_(model, 16, solver=solver, targets=["head"])
    assert count(model) == 64_000 and model.head.weight is model.table.weight
    (row,) = report.skipped
    assert row.reason == "shares its weight with 'table', which stays dense"
    auto_(model, 16, solver=solver, targets=["*"])
    assert model.head.weight is model.table.weight
    assert count(model) == plan(Tied(), 16, targets=["*"]).params_after == 16 * 1064
    both = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    both[1].weight = both[0].weight
    auto_(both, 4, solver=solver)
    assert both[0].weight is both[1].weight and count(both) == 4 * 64 + 2 * 32


# Trap 14


@pytest.mark.parametrize("solver", ["nmf", "snmf", "semi-nmf"])
def test_nmf_on_a_signed_weight_raises(solver: str) -> None:
    with pytest.raises(ValueError, match=r"not offered: weights have both signs, .* choose one of \('svd'"):
        auto_(net(), 4, solver=solver)


def test_a_copy_shares_no_parameter_with_the_original() -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.TransformerEncoderLayer(48, 4, 64), nn.Conv2d(16, 16, 3))
    before = copy.deepcopy(model.state_dict())
    made, _ = auto(model, 4, limit="channels")
    assert not {p.data_ptr() for p in made.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert len(hosts(made)) == 8 and not hosts(model)
    assert hosts(auto(nn.MultiheadAttention(16, 4), 4)[0]).keys() == {
        f"{name}_proj" for name in ("q", "k", "v", "out")
    }


# Trap 17


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_host_has_one_bias(solver: str) -> None:
    model = net()
    biases = [model[0].bias, model[2].bias]
    auto_(model, 4, solver=solver)
    for host, bias in zip((model[0], model[2]), biases, strict=True):
        assert host.bias is bias
        assert [p.shape for n, p in host.named_parameters() if "bias" in n] == [(host.out_features,)]


def test_the_method_obeys_the_laws_of_methods() -> None:
    method = AtRanks(((12, 20, 3),))
    check_method(method, (12, 20), metrics={"": Metric()}, best=True)
    assert Recipe.from_json(json.loads(json.dumps(auto_(net(), 4).recipe))).method.menu((48, 32)) == [4]
    assert method.menu((20, 12)) == []
    for bad in (5, (5,), ((12, 20, 8),), ((12, 20, 0),), ((12, 20),), ((12, 20, 3), (12, 20, 4))):
        with pytest.raises(ValueError, match="AtRanks: "):
            AtRanks(bad)  # type: ignore[arg-type]


def test_the_recipe_says_the_same_as_the_call() -> None:
    """`lrt` is the Low-Rank Transformer for `factorize_`: same ranks, same numbers drawn."""
    models = [nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24), 2, None, False) for _ in range(2)]
    auto_(models[0], 3, solver="random")
    unpack_attention_(models[1])
    factorize_(models[1], recipes.lrt(rank=3))
    for one, two in zip(hosts(models[0]).values(), hosts(models[1]).values(), strict=True):
        assert torch.equal(one.weight.to_dense(), two.weight.to_dense())
