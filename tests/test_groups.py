"""Layers fitted together: the paper's closed form, exact accounts, and bad groups refused before any work."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy_groups import LOW, PAIRS, data, stored, tower

import rankfold
from rankfold import SVD, Activation, Dictionary, Frobenius, LowRank, Metric, Recipe, allocate, recipes
from rankfold.factorize import calibrate, factorize_
from rankfold.groups import Groups, Stack
from rankfold.hosts import hosts
from rankfold.layers import Layer, select
from rankfold.structure import Structure


def moment(size: int) -> Tensor:
    x = torch.randn(3 * size, size, dtype=torch.float64)
    return x.mT @ x / len(x)


def stack(*weights: Tensor) -> Stack:
    layers = {}
    for i, weight in enumerate(weights):
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        module.weight = nn.Parameter(weight)
        layers[str(i)] = Layer(module)
    return Stack(layers)


# The stack.


@pytest.mark.parametrize("rank", [1, 5, 9])
def test_a_stack_is_the_closed_form_of_the_paper(rank: int) -> None:
    """S = chol(ΣC)ᵀ, SVD of S [W₁ᵀ W₂ᵀ], basis S⁻¹ U Σ, coefficients V: in the paper's own orientation."""
    weights = [torch.randn(rows, 9, dtype=torch.float64) for rows in (12, 7)]
    moments = [moment(9), moment(9) * 3]
    s = torch.linalg.cholesky(moments[0] + moments[1]).mT
    u, sigma, v = torch.linalg.svd(s @ torch.cat(weights).mT, full_matrices=False)
    basis = torch.linalg.solve(s, u[:, :rank] * sigma[:rank])
    expected = (basis @ v[:rank]).mT

    item = stack(*weights)
    metric = item.metric({str(i): Metric(None, c) for i, c in enumerate(moments)})
    assert metric is not None
    parts = item.split(SVD().fit(item.matrix(), metric, rank))
    found = torch.cat([part.to_dense().detach() for part in parts.values()])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    one, two = parts.values()
    assert isinstance(one, LowRank) and isinstance(two, LowRank)
    assert one.right.weight is two.right.weight and one.shape == (12, 9) and two.shape == (7, 9)
    assert one.left.weight.untyped_storage().nbytes() == one.left.weight.nbytes  # a view would keep the stack


def test_the_metric_of_a_stack() -> None:
    weights = [torch.randn(rows, 8, dtype=torch.float64) for rows in (6, 6, 4)]
    item, c = stack(*weights), moment(8)
    residual = torch.randn(16, 8, dtype=torch.float64)
    parts = residual.split([6, 6, 4])
    scalars = [torch.tensor(g, dtype=torch.float64) for g in (0.5, 2.0, 7.0)]

    def of(lefts: list[Any], rights: list[Any]) -> tuple[Metric, list[Metric]]:
        held = [Metric(left, right) for left, right in zip(lefts, rights, strict=True)]
        found = item.metric({str(i): metric for i, metric in enumerate(held)})
        assert found is not None
        return found, held

    # One input for all: exact for every residual, whatever each layer weighs.
    vectors = [torch.rand(rows, dtype=torch.float64) for rows in (6, 6, 4)]
    for lefts in ([None] * 3, scalars, vectors, [None, *scalars[1:]]):
        metric, held = of(lefts, [c] * 3)
        apart = sum(one.error(part) for one, part in zip(held, parts, strict=True))
        assert metric.right is c and metric.error(residual) == pytest.approx(apart, rel=1e-12)
    # Several: the weights have the energy that they have apart, and the direction is the mean's.
    for lefts in ([None] * 3, scalars):
        metric, held = of(lefts, [c, moment(8), moment(8) * 5])
        apart = sum(one.error(weight) for one, weight in zip(held, weights, strict=True))
        assert metric.error(item.matrix()) == pytest.approx(apart, rel=1e-12)
        torch.testing.assert_close(metric.right, sum(one.right for one in held) / 3)  # type: ignore[arg-type]
    assert item.metric({"0": Metric(), "2": Metric()}) is None
    metric, _ = of([None] * 3, [None] * 3)
    assert metric.left is None and metric.right is None
    with pytest.raises(ValueError, match=r"layers '0', '1', '2' form a group.*matrices on the left"):
        of([None, torch.eye(6), None], [c] * 3)
    with pytest.raises(ValueError, match="right sides have the forms"):
        of([None] * 3, [c, None, c])
    metric, _ = of([None] * 3, [torch.zeros(8, 8), torch.zeros(8, 8), torch.zeros(8, 8)])
    assert metric.error(residual) == 0


def test_a_group_of_one_is_no_group() -> None:
    one, two, batches = tower(), tower(), data()
    alone = Recipe("alone", SVD(), Activation("scalar"), allocate.lagrangian)
    single = dataclasses.replace(alone, groups=Groups(size=1))
    first, second = (
        factorize_(model, recipe, budget=0.5, batches=batches)
        for model, recipe in ((one, alone), (two, single))
    )
    assert [vars(row) for row in first.layers] == [vars(row) for row in second.layers]
    state = two.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in one.state_dict().items())


def test_the_worked_example_of_the_page() -> None:
    with torch.device("meta"):
        item = Stack({str(i): Layer(nn.Linear(4096, 4096, bias=False)) for i in range(2)})
        alone = Stack({"0": item.layers["0"]})
    size, single = ((4 * 4096 * 4096 * m // 5) // (4096 * (1 + m)) for m in (2, 1))
    assert (size, single) == (2184, 1638)
    pair, one = SVD().empty(item.shape, size), SVD().empty(alone.shape, single)
    assert item.cost(pair, "params") == 26_836_992 and item.dense("params") == 33_554_432
    assert item.cost(pair, "nbytes") == 4 * 26_836_992
    assert item.cost(pair, "macs") == 2 * 17_891_328
    assert alone.cost(one, "macs") == 13_418_496 and alone.dense("macs") == 16_777_216


# The pipeline.


@settings(max_examples=15)
@given(
    st.floats(0.25, 1.0),
    st.sampled_from(["nbytes", "params", "macs"]),
    st.sampled_from([Frobenius(), Activation(), Activation("scalar")]),
    st.sampled_from([allocate.uniform, allocate.lagrangian, allocate.energy]),
    st.sampled_from([SVD(), Dictionary(solver="rocket")]),
    st.integers(2, 4),
)
def test_the_accounts_are_exact(
    budget: float, unit: str, metric: Any, allocator: Any, method: Any, size: int
) -> None:
    model = tower()
    recipe = Recipe("grouped", method, metric, allocator, groups=Groups(size))
    report = factorize_(model, recipe, budget=budget, batches=data(), unit=unit)
    assert report.reached <= budget
    rows = {row.name: row for row in report.layers}
    assert list(rows) == ["blocks.0", "blocks.1", "blocks.2", "blocks.3", "last.blocks.4"]
    key = {"nbytes": "bytes", "params": "params", "macs": "macs"}[unit]
    assert report.allocation["cost"] == sum(getattr(row, f"{key}_after") for row in rows.values())
    assert report.totals["model_after"] == stored(model)
    assert report.totals["params_after"] == sum(p.numel() for p in model.parameters())
    assert len({row.size if row.size is None else str(row.size) for row in list(rows.values())[:size]}) == 1
    for name, host in hosts(model).items():
        assert rows[name].macs_after == host.weight.macs and rows[name].spec == host.weight.spec()
        if name.startswith("blocks") and size != 3:
            assert "counted in equal parts" in rows[name].note
            assert rows[name].bytes_after < host.weight.nbytes
    again = rankfold.Report.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False)))
    assert again.to_json() == report.to_json()
    told = any("counted in equal parts" in row.note for row in rows.values())
    assert ("counted in equal parts" in report.to_html()) == told
    assert report.to_text(width=200)


def test_each_layer_has_its_own_error() -> None:
    model, batches = tower(), data()
    recipe = Recipe("grouped", SVD(), Activation("scalar"), allocate.lagrangian, groups=Groups(4))
    layers = select(model)
    metrics = calibrate(model, recipe, layers, batches)
    weights = {name: layer.matrix().clone() for name, layer in layers.items()}
    report = factorize_(model, recipe, budget=0.5, metrics=metrics)
    for row in report.layers:
        if row.size is not None:
            lost = weights[row.name].double() - model.get_submodule(row.name).weight.to_dense().double()
            assert row.error == pytest.approx(metrics[row.name].error(lost), rel=1e-4)
            energy = metrics[row.name].error(weights[row.name])
            assert row.relative_error == pytest.approx((row.error / energy) ** 0.5)
    assert report.allocation["bound"] is not None and not report.warnings
    assert sum(row.loss_share for row in report.layers) == pytest.approx(1)


def test_who_is_grouped(tiny_llama: Callable[..., Any]) -> None:
    layers = select(tiny_llama(num_hidden_layers=3, tie_word_embeddings=True), ["*"])
    found = recipes.PAIRS.of(layers)
    kinds = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
    assert found == [[f"model.layers.{i}.{kind}" for i in (0, 1)] for kind in kinds]
    triples = Groups(3).of(layers)
    assert len(triples) == 7 and all(len(group) == 3 for group in triples)
    # A run ends where the shape changes, and nothing is paired across.
    odd = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(8, width)}) for width in (6, 6, 6, 5, 5, 6))
    assert Groups(2).of(select(odd)) == [["0.fc", "1.fc"], ["3.fc", "4.fc"]]
    assert not Groups(2).of(select(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))))


def grouped(*members: tuple[str, ...]) -> Recipe:
    return dataclasses.replace(LOW, groups=Groups(members=members))


def test_explicit_members() -> None:
    """Layers of other heights, and convolutions, that read as many numbers."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(18, 30), nn.Linear(18, 40)
            self.c, self.d = nn.Conv2d(2, 16, 3), nn.Conv2d(2, 24, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x.flatten(1)[:, :18]).sum(-1) + self.b(x.flatten(1)[:, :18]).sum(-1)
            return y + self.c(x).sum((1, 2, 3)) + self.d(x).sum((1, 2, 3))

    model = Net()
    report = factorize_(model, grouped(("b", "a"), ("c", "d")), budget=0.5)
    assert [row.name for row in report.layers] == ["a", "b", "c", "d"]
    assert model.a.weight.right.weight is model.b.weight.right.weight  # type: ignore[union-attr]
    assert model.c.weight.right.weight is model.d.weight.right.weight  # type: ignore[union-attr]
    assert report.totals["model_after"] == stored(model)
    dense = rankfold.to_dense_(copy.deepcopy(model))
    x = torch.randn(3, 2, 5, 5)
    torch.testing.assert_close(dense(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ((("blocks.0", "block.1"),), r"'block.1' is not one of the selected layers. Did you mean 'blocks.1'"),
        ((("blocks.0", "down"),), r"'blocks.0' has shape \(24, 24\) and 'down' \(24, 48\)"),
        ((("blocks.0", "table"),), "'table' is an embedding"),
        ((("blocks.0", "half"),), "torch.float32.*'half'.*torch.float16"),
        ((("blocks.0", "twin"),), r"'twin' shares its whole weight with \['twin2'\]"),
        ((("blocks.0", "twin2"),), r"'twin2' shares its whole weight with \['twin'\]"),
    ],
)
def test_members_that_do_not_fit(members: Any, message: str) -> None:
    model = tower()
    model.down, model.table, model.half = nn.Linear(48, 24), nn.Embedding(9, 24), nn.Linear(24, 24).half()
    model.twin, model.twin2 = nn.Linear(24, 24), nn.Linear(24, 24)
    model.twin2.weight = model.twin.weight
    with pytest.raises(ValueError, match=message):
        factorize_(model, grouped(*members), budget=0.5, targets=["*"])
    assert not hosts(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size=0"),
        ({"size": True}, "size=True"),
        ({"size": "2"}, "size='2'"),
        ({"private": "*.o_proj"}, "a tuple of globs"),
        ({"private": (3,)}, "a tuple of globs"),
        ({"members": ("a", "b")}, "tuples of layer names"),
        ({"members": ((1, 2),)}, "tuples of layer names"),
        ({"members": (3,)}, "tuples of layer names"),
        ({"members": (("a",),)}, r"at least two layers; got \('a',\)"),
        ({"members": (("a", "b"), ("b", "c"))}, "'b' is named twice"),
        ({"members": (("a", "a"),)}, "'a' is named twice"),
        ({"members": (("a", "b"),), "private": ("c",)}, "leave private out"),
    ],
    ids=str,
)
def test_groups_that_are_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Groups(**options)


def test_groups_in_json() -> None:
    for groups in (PAIRS, Groups(3), Groups(members=(("a", "b"), ("c", "d", "e")))):
        recipe = dataclasses.replace(LOW, groups=groups)
        again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
        assert again == recipe and again.groups == groups
    assert "groups" not in recipes.svd.to_json()
    for bad in (None, 3, {"size": 2, "depth": 1}, {"size": [2]}, {"private": "x"}, {"members": [3]}):
        with pytest.raises(ValueError, match=r"groups in JSON|Groups"):
            Recipe.from_json({**LOW.to_json(), "groups": bad})


class Watched:
    touched = False

    def __iter__(self) -> Any:
        self.touched = True
        return iter(data())


def test_what_cannot_be_grouped_is_refused_before_the_data() -> None:
    with pytest.raises(ValueError, match=r"'kfac' has a matrix for each layer's own outputs.*no groups"):
        dataclasses.replace(recipes.kfac, groups=PAIRS)
    model, batches = tower(), Watched()
    blocks = Recipe(
        "blocks", Dictionary(solver="rocket", width=8), Activation(), allocate.uniform, groups=PAIRS
    )
    with pytest.raises(ValueError, match=r"budget=0.01 is below .*blocks.0 \+ blocks.1 alone needs"):
        factorize_(model, dataclasses.replace(LOW, metric=Activation()), budget=0.01, batches=batches)

    class Stiff(LowRank):
        kind = "stiff"
        split = Structure.split

    class Method(SVD):
        def empty(self, shape: Any, size: Any, dtype: Any = None, device: Any = "meta") -> Any:
            return Stiff(shape, rank=size, dtype=dtype, device=device)

    stiff = Recipe("stiff", Method(), Activation(), allocate.uniform, groups=PAIRS)
    with pytest.raises(
        ValueError, match=r"'blocks.0', 'blocks.1' form a group, but .*'stiff' does not split"
    ):
        factorize_(model, stiff, budget=0.5, batches=batches)
    assert not hosts(model) and not batches.touched
    assert factorize_(model, blocks, budget=0.9, batches=batches).reached <= 0.9


@pytest.mark.parametrize("stage", ["measure", "factorize"])
def test_an_interrupt_leaves_the_model_as_it_was(stage: str) -> None:
    model = tower()
    before = copy.deepcopy(model.state_dict())

    def interrupt(at: str, done: int, total: int | None) -> None:
        assert at == "calibrate" or total == 3  # two pairs and the last layer
        if at == stage and done == 2:
            raise KeyboardInterrupt

    recipe = dataclasses.replace(recipes.weighted, groups=PAIRS)
    with pytest.raises(KeyboardInterrupt):
        factorize_(model, recipe, budget=0.5, batches=data(), progress=interrupt)
    assert not hosts(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_group_with_an_idle_layer_stays_dense() -> None:
    model = tower()
    model.idle = nn.ModuleDict({"blocks": nn.Linear(24, 24)})
    recipe = dataclasses.replace(
        LOW, metric=Activation(), groups=Groups(members=(("blocks.0", "idle.blocks"),))
    )
    report = factorize_(model, recipe, budget=0.8, batches=data())
    notes = {row.name: row.note for row in report.layers}
    assert notes["blocks.0"] == notes["idle.blocks"]
    assert notes["blocks.0"] == "stays dense: idle.blocks of its group never ran on the calibration data"


def test_trainability_of_what_is_shared() -> None:
    model = tower()
    model.blocks[0].weight.requires_grad_(False)
    factorize_(model, LOW, budget=0.5)
    one, two = (model.blocks[i].weight for i in (0, 1))
    assert not one.left.weight.requires_grad and two.left.weight.requires_grad  # type: ignore[union-attr]
    assert one.right.weight is two.right.weight and one.right.weight.requires_grad  # type: ignore[union-attr]
