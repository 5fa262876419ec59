"""The laws of allocators. Public through `rankfold.testing`."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import replace

from rankfold.allocate import Allocation
from rankfold.method import Curve
from rankfold.testing_structure import require


def check_allocator(
    allocate: Callable[[Mapping[str, Curve], int], Allocation], *, exact: bool = False
) -> None:
    """Check an allocator `(curves, budget) -> Allocation` on random menus; `exact` also demands the optimum.

    Laws: one valid entry per layer, reported cost and error true, never over budget, deterministic, inputs
    left alone, the unit of the error irrelevant; no single useful upgrade still fits, and fine menus spend
    98 %; `bound` holds for every allocation; a full budget leaves all dense; an impossible one raises and
    states the smallest possible, bad numbers raise and name the layer.

    Raises:
        AssertionError: a law is broken; the message names it.
    """
    draw = random.Random(0)
    for layers, options in [(1, 1), (1, 5), (2, 4), (3, 5), (4, 4), (5, 4)] * 4:
        curves = {f"layer.{i}": _random_curve(draw, options) for i in range(layers)}
        smallest, dense = _extremes(curves)
        for budget in {smallest, dense - 1, draw.randint(smallest, dense), draw.randint(smallest, dense)}:
            if budget >= smallest:
                _check_small(allocate, curves, budget, exact)
        _check_ends(allocate, curves, smallest, dense)

    fine = {f"layer.{i}": _random_curve(draw, 48) for i in range(6 if exact else 24)}
    smallest, dense = _extremes(fine)
    for share in (0.2, 0.5, 0.8, 0.97):
        budget = round(smallest + share * (dense - smallest))
        spent = _check_valid(fine, budget, allocate(fine, budget)).cost
        require(spent >= 0.98 * budget, f"fine menus leave the budget unspent: {spent} of {budget}")


def _random_curve(draw: random.Random, options: int) -> Curve:
    """Sizes of rising cost and falling error, and the jump to dense: a low-rank curve with uneven steps."""
    dense, energy = draw.randint(20, 90) * 1000, 2.0 ** draw.uniform(-8, 8)
    shares = sorted(draw.uniform(0.05, 0.95) for _ in range(options - 1))
    costs = tuple(int(share * dense) + j for j, share in enumerate(shares))
    decay = draw.uniform(0.5, 4)
    errors = tuple(energy * (1 - 0.9 * share) ** decay for share in shares)
    return Curve((*range(1, options), None), (*costs, dense), (*errors, 0.0), energy=energy)


def _extremes(curves: Mapping[str, Curve]) -> tuple[int, int]:
    return sum(min(curve.costs) for curve in curves.values()), sum(
        curve.costs[-1] for curve in curves.values()
    )


def _check_valid(curves: Mapping[str, Curve], budget: int, got: Allocation) -> Allocation:
    require(
        list(got.index) == list(curves),
        f"one entry per layer, in order: {list(got.index)} != {list(curves)}",
    )
    require(
        all(0 <= j < len(curves[name].costs) for name, j in got.index.items()),
        f"no such entry: {got.index}",
    )
    cost = sum(curves[name].costs[j] for name, j in got.index.items())
    error = math.fsum(curves[name].errors[j] for name, j in got.index.items())
    require(got.cost == cost, f"reported cost {got.cost}, true cost {cost}")
    require(math.isclose(got.error, error, rel_tol=1e-9), f"reported error {got.error}, true error {error}")
    require(got.budget == budget, f"reported budget {got.budget}, given {budget}")
    require(cost <= budget, f"over budget: {cost} > {budget}")
    require(
        got.bound is None or 0 <= got.bound <= error * (1 + 1e-9),
        f"beats its bound {got.bound}: {error}",
    )
    for name, j in got.index.items():
        curve = curves[name]
        for k, (c, e) in enumerate(zip(curve.costs, curve.errors, strict=True)):
            useful = curve.errors[j] - e > 1e-9 * error
            require(not useful or c - curve.costs[j] > budget - cost, f"{name}: {j} -> {k} still fits")
    return got


def _check_small(allocate: Callable, curves: Mapping[str, Curve], budget: int, exact: bool) -> None:
    before = dict(curves)
    got = _check_valid(curves, budget, allocate(curves, budget))
    require(got == allocate(curves, budget), "not deterministic")
    require(dict(curves) == before, "the curves were changed")
    scaled = {
        name: replace(c, errors=tuple(1024 * e for e in c.errors), energy=1024 * c.energy)
        for name, c in curves.items()
    }
    require(allocate(scaled, budget).index == got.index, "the choice depends on the unit of the error")

    every = itertools.product(*(zip(c.costs, c.errors, strict=True) for c in curves.values()))
    best = min(math.fsum(e for _, e in some) for some in every if sum(c for c, _ in some) <= budget)
    require(got.error >= best * (1 - 1e-9), f"better than the optimum: {got.error} < {best}")
    require(
        got.bound is None or got.bound <= best * (1 + 1e-9),
        f"the bound {got.bound} exceeds the optimum {best}",
    )
    require(not exact or got.error <= best * (1 + 1e-9), f"not optimal: {got.error} > {best}")


def _check_ends(allocate: Callable, curves: Mapping[str, Curve], smallest: int, dense: int) -> None:
    for budget in (dense, 10 * dense):
        got = _check_valid(curves, budget, allocate(curves, budget))
        last = {name: len(curve.costs) - 1 for name, curve in curves.items()}
        require(got.index == last, f"the budget holds the dense model, but {got.index}")
    name, curve = next(iter(curves.items()))
    _raises(allocate, curves, smallest - 1, str(smallest))
    _raises(allocate, {}, dense, "")
    _raises(allocate, {**curves, name: replace(curve, sizes=(), costs=(), errors=())}, dense, name)
    for bad in (math.nan, math.inf, -1.0):
        _raises(allocate, {**curves, name: replace(curve, errors=(bad, *curve.errors[1:]))}, dense - 1, name)
    _raises(allocate, {**curves, name: replace(curve, costs=(-1, *curve.costs[1:]))}, dense - 1, name)


def _raises(allocate: Callable, curves: Mapping[str, Curve], budget: int, says: str) -> None:
    try:
        got = allocate(curves, budget)
    except ValueError as error:
        require(says in str(error), f"the message does not mention {says!r}: {error}")
    else:
        raise AssertionError(f"no ValueError (should mention {says!r}) but {got}")
