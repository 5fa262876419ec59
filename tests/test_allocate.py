"""Allocators: the laws, the exact solver against brute force, the certificate on a realistic model."""

import itertools
import math
import random
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold.allocate import (
    Allocation,
    energy,
    knapsack,
    lagrangian,
    same_size_by_type,
    split_by_type,
    uniform,
)
from rankfold.method import Curve
from rankfold.testing import check_allocator

ALL = [uniform, energy, lagrangian, knapsack]


def curve(costs, errors, energy=None):
    sizes = (*range(1, len(costs)), None)
    return Curve(sizes, tuple(costs), tuple(errors), energy=max(errors) if energy is None else energy)


@st.composite
def problems(draw, layers=5, options=5):
    """Arbitrary menus (not convex, not even monotone, with ties), dense last, and a feasible budget."""
    curves = {}
    for i in range(draw(st.integers(1, layers))):
        cost_error = st.tuples(st.integers(1, 60), st.integers(0, 50).map(lambda n: n / 8))
        menu = draw(st.lists(cost_error, max_size=options - 1))
        costs, errors = [c for c, _ in menu], [e for _, e in menu]
        curves[f"block.{i}.proj"] = curve([*costs, draw(st.integers(1, 80))], [*errors, 0.0], energy=7.0)
    smallest = sum(min(c.costs) for c in curves.values())
    return curves, draw(st.integers(smallest, max(smallest, sum(c.costs[-1] for c in curves.values())) + 5))


def brute_force(curves, budget):
    every = itertools.product(*(zip(c.costs, c.errors, strict=True) for c in curves.values()))
    return min(math.fsum(e for _, e in some) for some in every if sum(c for c, _ in some) <= budget)


def llama(seed=0, blocks=32, step=64):
    """224 LLaMA-7B-shaped matrices: power-law spectra, menus in steps of `step` ranks below dense, bytes."""
    draw = random.Random(seed)
    shapes = {"q_proj": (4096, 4096), "k_proj": (4096, 4096), "v_proj": (4096, 4096), "o_proj": (4096, 4096)}
    shapes |= {"gate_proj": (11008, 4096), "up_proj": (11008, 4096), "down_proj": (4096, 11008)}
    curves = {}
    for block, (kind, (out, inner)) in itertools.product(range(blocks), shapes.items()):
        power, scale, full = draw.uniform(0.2, 0.7), math.exp(draw.gauss(0, 1)), min(out, inner)
        tail = list(
            itertools.accumulate((scale * r ** (-2 * power) for r in range(full, 0, -1)), initial=0.0)
        )[::-1]
        ranks = [r for r in range(step, full, step) if r * (out + inner) < out * inner]
        costs = [2 * r * (out + inner) for r in ranks]
        curves[f"model.layers.{block}.{kind}"] = Curve(
            (*ranks, None), (*costs, 2 * out * inner), (*(tail[r] for r in ranks), 0.0), energy=tail[0]
        )
    return curves


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.mark.parametrize("allocate", ALL)
def test_laws(allocate):
    check_allocator(allocate, exact=allocate is knapsack)


@pytest.mark.parametrize("breakage", ["over", "idle", "bound", "silent"])
def test_the_laws_notice_a_broken_allocator(breakage):
    def broken(curves, budget):
        if breakage == "silent":  # falls back when infeasible, as a peer does
            budget = max(budget, sum(min(c.costs) for c in curves.values()))
        got = lagrangian(curves, budget + (breakage == "over") * 20_000)
        if breakage == "idle":
            index = {
                name: int(min(range(len(c.costs)), key=c.costs.__getitem__)) for name, c in curves.items()
            }
            costs, errors = zip(
                *((curves[n].costs[j], curves[n].errors[j]) for n, j in index.items()), strict=True
            )
            return Allocation(index, sum(costs), budget, math.fsum(errors))
        return replace(got, bound=got.error) if breakage == "bound" else replace(got, budget=budget)

    with pytest.raises(AssertionError):
        check_allocator(broken)


@given(problems())
@settings(max_examples=200, deadline=None)
def test_knapsack_is_brute_force_and_the_others_lie_between_bound_and_budget(problem):
    curves, budget = problem
    best = brute_force(curves, budget)
    exact = knapsack(curves, budget)
    assert exact.error == pytest.approx(best, rel=1e-12, abs=0)
    assert exact.gap == pytest.approx(0, abs=1e-9)
    near = lagrangian(curves, budget)
    assert near.bound <= best * (1 + 1e-12) <= near.error * (1 + 1e-12)
    for allocate in ALL:
        got = allocate(curves, budget)
        assert got.cost == sum(curves[name].costs[j] for name, j in got.index.items()) <= budget
        assert got.error >= best * (1 - 1e-12)


@given(problems(), st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_a_larger_budget_never_gives_a_larger_error(problem, more):
    curves, budget = problem
    assert knapsack(curves, budget + more).error <= knapsack(curves, budget).error * (1 + 1e-12)


@given(problems(), st.integers(-40, 40))
@settings(max_examples=100, deadline=None)
def test_the_unit_of_the_error_does_not_matter(problem, power):
    curves, budget = problem
    scaled = {
        name: replace(c, errors=tuple(e * 2.0**power for e in c.errors), energy=c.energy * 2.0**power)
        for name, c in curves.items()
    }
    for allocate in ALL:
        assert allocate(scaled, budget).index == allocate(curves, budget).index


@pytest.mark.parametrize("fraction", [0.4, 0.6, 0.8, 0.9])
def test_a_real_model_is_within_half_a_percent_of_optimal_and_spends_its_budget(model, fraction):
    budget = int(fraction * sum(c.costs[-1] for c in model.values()))
    started = time.perf_counter()
    near = lagrangian(model, budget)
    assert time.perf_counter() - started < 5  # 0.1 s; slow machines included
    assert near.gap <= 0.005
    for allocate in (uniform, energy):
        other = allocate(model, budget)
        assert near.error < other.error
        assert other.gap is None
        assert 0.98 * budget <= other.cost <= budget
    assert 0.98 * budget <= near.cost <= budget


def test_knapsack_improves_on_lagrangian_for_a_whole_model(model):
    curves = dict(itertools.islice(model.items(), 56))
    budget = sum(c.costs[-1] for c in curves.values()) // 2
    near, exact = lagrangian(curves, budget), knapsack(curves, budget)
    assert near.bound <= exact.error <= near.error
    assert exact.gap == 0


def test_uniform_keeps_one_fraction_and_ignores_errors(model):
    budget = sum(c.costs[-1] for c in model.values()) // 2
    got = uniform(model, budget)
    kept = [model[name].costs[j] / model[name].costs[-1] for name, j in got.index.items()]
    assert max(kept) - min(kept) < 0.05
    blind = {name: replace(c, errors=(0.0,) * len(c.errors), energy=0.0) for name, c in model.items()}
    assert uniform(blind, budget).index == got.index


def test_uniform_spends_a_coarse_menu():
    """Every layer may be .25, .5 or dense: .6 buys .5 everywhere and then dense, first layers first."""
    curves = {f"l{i}": curve([25, 50, 100], [2, 1, 0]) for i in range(10)}
    got = uniform(curves, 600)
    assert got.cost == 600
    assert list(got.index.values()) == [2, 2] + [1] * 8


def test_energy_levels_the_relative_error(model):
    budget = sum(c.costs[-1] for c in model.values()) // 2
    got = energy(model, budget)

    def smallest(t):
        """Every layer's smallest size with error <= t * energy, and what they cost together."""
        index = {
            name: next(j for j, e in enumerate(c.errors) if e / c.energy <= t) for name, c in model.items()
        }
        return index, sum(model[name].costs[j] for name, j in index.items())

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if smallest(middle)[1] <= budget else (middle, high)
    at_threshold, cost = smallest(high)
    assert 0.95 * budget < cost <= got.cost
    assert all(j >= at_threshold[name] for name, j in got.index.items())  # the threshold, then the fill
    assert sum(j > at_threshold[name] for name, j in got.index.items()) < 10


def test_energy_needs_energies():
    curves = {"head": curve([10, 20], [1.0, 0.0], energy=0.0), "zero": curve([5, 20], [0.0, 0.0], energy=0.0)}
    with pytest.raises(ValueError, match=r"head: energy=0\.0"):
        energy(curves, 30)
    assert energy({"zero": curves["zero"]}, 10).index == {"zero": 0}  # a zero weight loses nothing


@pytest.mark.parametrize("allocate", ALL)
def test_an_impossible_budget_says_what_would_be_possible(allocate):
    curves = {
        "q": curve([30, 100], [1, 0]),
        "lm_head": curve([610, 800], [1, 0]),
        "k": curve([20, 50], [1, 0]),
        "v": curve([10, 50], [1, 0]),
    }
    with pytest.raises(
        ValueError, match=r"budget=500 .*smallest possible 670 .*lm_head alone needs 610"
    ) as info:
        allocate(curves, 500)
    assert "v alone" not in str(info.value)
    assert "Raise the budget" in str(info.value)
    assert allocate(curves, 670).cost == 670


@pytest.mark.parametrize("allocate", ALL)
def test_bad_input_names_the_layer(allocate):
    good = curve([1, 2], [1, 0])
    for bad, says in [
        (curve([1, 2], [math.nan, 0.0], energy=1.0), "error=nan"),
        (replace(good, errors=(1.0,)), "as many sizes"),
        (replace(good, costs=(1.5, 2)), "integer"),
        (replace(good, costs=(-1, 2)), "negative"),
    ]:
        with pytest.raises(ValueError, match=rf"^b: .*{says}"):
            allocate({"a": good, "b": bad}, 3)
    with pytest.raises(ValueError, match="empty"):
        allocate({}, 3)
    with pytest.raises(ValueError, match="finite"):
        allocate({"a": good}, math.inf)


def test_lagrangian_may_miss_where_knapsack_does_not():
    """One big step has the best slope and blocks two smaller ones that are worth more together."""
    curves = {"a": curve([1, 11], [10.5, 0]), "b": curve([1, 9], [8, 0]), "c": curve([1, 9], [8, 0])}
    near, exact = lagrangian(curves, 19), knapsack(curves, 19)
    assert exact.index == {"a": 0, "b": 1, "c": 1}
    assert near.bound < exact.error < near.error
    assert near.gap == pytest.approx((near.error - near.bound) / near.error)


def test_knapsack_refuses_rather_than_exhausting_memory(model):
    with pytest.raises(ValueError, match="Use the lagrangian allocator"):
        knapsack(model, sum(c.costs[-1] for c in model.values()) // 2, states=1)


def test_dense_wins_ties():
    got = lagrangian({"a": curve([9, 10, 10], [1, 0, 0]), "b": curve([5, 30], [1, 0])}, 20)
    assert got.index == {"a": 2, "b": 0}


def test_all_layers_of_a_type_can_share_one_rank(model):
    shared = same_size_by_type(model)
    assert list(shared) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    budget = sum(c.costs[-1] for c in model.values()) // 2
    got = split_by_type(knapsack(shared, budget), model)
    assert list(got.index) == list(model)
    for kind in shared:
        assert len({j for name, j in got.index.items() if name.endswith(kind)}) == 1
    assert got.cost == sum(model[name].costs[j] for name, j in got.index.items()) <= budget
    assert got.error == pytest.approx(math.fsum(model[name].errors[j] for name, j in got.index.items()))
    assert shared["q_proj"].energy == pytest.approx(
        math.fsum(c.energy for n, c in model.items() if "q_proj" in n)
    )
    with pytest.raises(ValueError, match=r"q_proj and .*gate_proj cannot share one size"):
        same_size_by_type(model, lambda name: "all")
