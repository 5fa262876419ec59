"""Allocators choose one size per layer so that a whole model meets one budget.

    minimise  sum_i error_i(j_i)    subject to  sum_i cost_i(j_i) <= budget,  j_i in layer i's menu

This is the multiple-choice knapsack problem. `uniform` and `energy` are the rules of thumb of the literature,
`lagrangian` is near-optimal and says how near (a proven lower bound), `knapsack` is exact and for few layers.
All are pure functions of `{name: Curve}`; none ever exceeds the budget or quietly falls back to another rule.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from rankfold.method import Curve
from rankfold.multiple_choice import Menu, Option, exact, fill, relax, rise


@dataclass(frozen=True)
class Allocation:
    """One size per layer, what it costs and what it loses.

    `index[name]` is the position in `curves[name]`, `cost` and `budget` are in the unit of the curves' costs,
    `error` is the sum of the chosen errors, `bound` a proven lower bound on the error of *any* allocation
    within the budget (None when the allocator proves nothing).
    """

    index: dict[str, int]
    cost: int
    budget: int
    error: float
    bound: float | None = None

    @property
    def gap(self) -> float | None:
        """The largest share of `error` that a better allocation could save; None without a bound."""
        if self.bound is None:
            return None
        return (self.error - self.bound) / self.error if self.error > 0 else 0.0


def uniform(curves: Mapping[str, Curve], budget: int) -> Allocation:
    """Keep the same fraction of every layer; errors are ignored.

    Finds the largest fraction f such that giving every layer its largest size with cost <= f * dense fits,
    then spends the rest on single layers, lowest fraction first. The usual baseline of the low-rank papers.

    Raises:
        ValueError: a curve is malformed, or the budget is below the smallest possible total.
    """
    menus, budget = _menus(curves, budget, by_error=False)
    dense = [curve.costs[-1] for curve in curves.values()]

    def fraction(layer: int, position: int) -> tuple[float, float]:
        here, there = menus[layer][position].cost, menus[layer][position + 1].cost
        return there / dense[layer], here / dense[layer]

    return _result(curves, menus, rise(menus, budget, fraction), budget)


def fixed(curves: Mapping[str, Curve], budget: int) -> Allocation:
    """Every layer at the first size of its menu, dense where it has none: for a method that names one size.

    The errors are ignored. Raises ValueError where that costs more than the budget.
    """
    cost = sum(curve.costs[0] for curve in curves.values())
    if cost > budget:
        raise ValueError(f"the sizes that the method names cost {cost}, the budget is {budget}; raise it")
    return Allocation(dict.fromkeys(curves, 0), cost, budget, 0.0)


def energy(curves: Mapping[str, Curve], budget: int) -> Allocation:
    """Lose the same share of every layer's energy.

    Finds the smallest threshold t such that giving every layer its smallest size with error <= t * energy
    fits, then spends the rest on single layers, largest relative error first. It is the fixed-energy rule of
    the SVD papers (keep 90 % of the squared singular values), with the threshold solved for the budget.

    Raises:
        ValueError: a curve is malformed or has no energy, or the budget is below the smallest possible total.
    """
    menus, budget = _menus(curves, budget)
    energies = [float(curve.energy) for curve in curves.values()]
    for (name, curve), total in zip(curves.items(), energies, strict=True):
        if not (math.isfinite(total) and total >= 0) or (total == 0 and max(curve.errors) > 0):
            raise ValueError(
                f"{name}: energy={total} but errors reach {max(curve.errors)}; allocating by energy needs "
                "the weight's squared norm in the metric. Set Curve.energy, or use the lagrangian allocator"
            )

    def kept(layer: int, position: int) -> float:
        return -menus[layer][position].error / energies[layer]

    return _result(curves, menus, rise(menus, budget, kept), budget)


def lagrangian(curves: Mapping[str, Curve], budget: int) -> Allocation:
    """Minimise the summed error by Lagrangian relaxation, and prove how far from optimal that may be.

    Every layer starts at its cheapest option; the steps of all lower convex hulls are taken by falling slope
    -d(error)/d(cost) until one, of slope s, does not fit. That point minimises `error + s * cost`, so
    `error - s * (budget - cost)` is a lower bound for every allocation (weak duality). What is left is then
    spent over all options, on the hull or not (the jump to dense makes real curves non-convex). O(N log N).
    The gap shrinks with the number of layers: about 0.1 % for 200, several per cent below 16: use `knapsack`.

    Raises:
        ValueError: a curve is malformed, or the budget is below the smallest possible total.
    """
    menus, budget = _menus(curves, budget)
    start, slope = relax(menus, budget)
    relaxed = _result(curves, menus, start, budget)
    bound = relaxed.error - slope * (budget - relaxed.cost)
    filled = _result(curves, menus, fill(menus, start, budget), budget)
    bound = max(0.0, min(bound, filled.error))  # rounding must not lift it above the value
    return replace(filled, bound=bound)


def knapsack(curves: Mapping[str, Curve], budget: int, *, states: int = 2_000_000) -> Allocation:
    """Minimise the summed error exactly, by dynamic programming over Pareto states (cost, error).

    Costs are exact integers, nothing is discretised. `lagrangian` runs first: its value and bound prune
    the states, so that even a whole model is often solved.

    Args:
        states: the largest number of Pareto states to hold; each takes some 100 bytes, and 6 per layer.

    Raises:
        ValueError: as `lagrangian`, or the Pareto frontier outgrew `states`.
    """
    near = lagrangian(curves, budget)
    if near.bound is None or near.bound == near.error:
        return near
    menus, budget = _menus(curves, budget)
    # What a solution may lose against the bound, and room for the rounding of sums.
    excess = near.error - near.bound + 1e-9 * near.error + 1e-12 * max(menu[0].error for menu in menus)
    chosen = exact(menus, budget, excess, states)
    if chosen is None:
        raise ValueError(
            f"the exact allocation of {len(curves)} layers needs more than states={states} Pareto states. "
            f"Use the lagrangian allocator: here it is within {near.gap:.2%} of optimal"
        )
    # Improvements too small to show in the sum's last digit are still worth their room.
    best = _result(curves, menus, fill(menus, chosen, budget), budget)
    return replace(best, bound=best.error)


def last_name(name: str) -> str:
    """The type of a layer: `model.layers.3.self_attn.q_proj` -> `q_proj`."""
    return name.rpartition(".")[2]


def same_size_by_type(
    curves: Mapping[str, Curve], group: Callable[[str], str] = last_name
) -> dict[str, Curve]:
    """Merge the curves of each group into one, for runtimes that need equal shapes across layers.

    Allocate over the result, then `split_by_type` the allocation.

    Raises:
        ValueError: two layers of a group offer different sizes.
    """
    members: dict[str, list[str]] = {}
    for name in curves:
        members.setdefault(group(name), []).append(name)
    merged = {}
    for key, names in members.items():
        parts, sizes = [curves[name] for name in names], curves[names[0]].sizes
        for name in names:
            if tuple(curves[name].sizes) != tuple(sizes):
                raise ValueError(
                    f"{names[0]} and {name} cannot share one size ({key}): their menus {tuple(sizes)} and "
                    f"{tuple(curves[name].sizes)} differ. Group only layers of one shape"
                )
        merged[key] = Curve(
            sizes=sizes,
            costs=tuple(map(sum, zip(*(part.costs for part in parts), strict=True))),
            errors=tuple(map(math.fsum, zip(*(part.errors for part in parts), strict=True))),
            energy=math.fsum(part.energy for part in parts),
        )
    return merged


def split_by_type(
    allocation: Allocation, curves: Mapping[str, Curve], group: Callable[[str], str] = last_name
) -> Allocation:
    """Undo `same_size_by_type`: every layer gets its group's choice; cost and error are the same."""
    return replace(allocation, index={name: allocation.index[group(name)] for name in curves})


def _menus(curves: Mapping[str, Curve], budget: int, by_error: bool = True) -> tuple[list[Menu], int]:
    """Check everything; sort each layer's options by strictly rising cost, dropping the useless ones.

    `by_error` keeps an option only if it lowers the error; otherwise (errors may be unknown, all zero) unless
    it costs more than dense. A budget that holds the whole dense model leaves dense as the only option.
    """
    if not curves:
        raise ValueError("curves is empty: there is no layer to allocate a budget to")
    if not math.isfinite(budget):
        raise ValueError(f"budget={budget} must be a finite amount, in the unit of the costs")
    budget = math.floor(budget)
    menus = [_options(name, curve) for name, curve in curves.items()]
    if sum(m[-1].cost for m in menus) <= budget and all(m[-1].error == 0 for m in menus):
        return [m[-1:] for m in menus], budget
    _check_feasible(list(curves), menus, budget)
    kept: list[Menu] = []
    for menu in menus:
        rising: Menu = []
        for option in sorted(menu, key=lambda o: (o.cost, -o.error, o.index)):
            if rising and option.cost == rising[-1].cost:
                rising.pop()  # sorted: at equal cost the later one is at least as good, and dense wins a tie
            if not rising or (option.error < rising[-1].error if by_error else option.cost <= menu[-1].cost):
                rising.append(option)
        kept.append(rising)
    return kept, budget


def _options(name: str, curve: Curve) -> Menu:
    counts = len(curve.sizes), len(curve.costs), len(curve.errors)
    if len(set(counts)) > 1 or not counts[0]:
        raise ValueError(
            f"{name}: a curve needs as many sizes as costs and errors, at least one; got {counts}"
        )
    menu = []
    for index, (size, cost, error) in enumerate(zip(curve.sizes, curve.costs, curve.errors, strict=True)):
        try:
            cost, error = operator.index(cost), float(error)
        except TypeError:
            raise ValueError(
                f"{name}: cost={cost!r} at size {size} must be an integer; use a finer unit"
            ) from None
        if cost < 0:
            raise ValueError(f"{name}: cost={cost} at size {size} must not be negative")
        if not (math.isfinite(error) and error >= 0):
            raise ValueError(f"{name}: error={error} at size {size} must be finite and not negative")
        menu.append(Option(cost, error, index))
    return menu


def _check_feasible(names: Sequence[str], menus: Sequence[Menu], budget: int) -> None:
    needs = [min(option.cost for option in menu) for menu in menus]
    smallest, dense = sum(needs), max(1, sum(menu[-1].cost for menu in menus))
    if smallest <= budget:
        return
    most = sorted(range(len(names)), key=lambda i: (-needs[i], i))[:3]
    listed = ", ".join(f"{names[i]} alone needs {needs[i]} ({needs[i] / dense:.4f})" for i in most)
    raise ValueError(
        f"budget={budget} ({budget / dense:.4f} of dense) is below the smallest possible {smallest} "
        f"({math.ceil(smallest / dense * 1e4) / 1e4:.4f} of dense): {listed}. "  # rounded up: enough
        "Raise the budget, offer smaller sizes, or skip these layers"
    )


def _result(
    curves: Mapping[str, Curve], menus: Sequence[Menu], chosen: Sequence[int], budget: int
) -> Allocation:
    options = [menu[j] for menu, j in zip(menus, chosen, strict=True)]
    cost, error = sum(o.cost for o in options), math.fsum(o.error for o in options)
    assert cost <= budget, (cost, budget)
    return Allocation({name: o.index for name, o in zip(curves, options, strict=True)}, cost, budget, error)
