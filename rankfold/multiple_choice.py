"""The multiple-choice knapsack problem on plain menus: take one option from each, within one budget.

Four solvers: `rise` (all menus together, by a key), `relax` (the Lagrangian relaxation, on the lower convex
hulls), `fill` (spend what is left, best first) and `exact` (dynamic programming over Pareto states). A menu
lists options of strictly rising cost; a choice is a list of positions, one a menu. Ties go to the first menu.
"""

import heapq
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Option(NamedTuple):
    cost: int
    error: float
    index: int  # whatever the caller calls this option


Menu = list[Option]


def rise(menus: Sequence[Menu], budget: int, key: Callable[[int, int], Any]) -> list[int]:
    """Raise all layers from their cheapest option, one step at a time, smallest `key(layer, position)` first.

    Up to the first step that does not fit this solves for one common threshold; the rest fills the room left.
    """
    chosen = [0] * len(menus)
    room = _room(menus, chosen, budget)
    heap = [(key(i, 0), i) for i, menu in enumerate(menus) if len(menu) > 1]
    heapq.heapify(heap)
    while heap:
        i = heapq.heappop(heap)[1]
        step = menus[i][chosen[i] + 1].cost - menus[i][chosen[i]].cost
        if step > room:
            continue  # the room only shrinks: this layer is finished
        chosen[i], room = chosen[i] + 1, room - step
        if chosen[i] + 1 < len(menus[i]):
            heapq.heappush(heap, (key(i, chosen[i]), i))
    return chosen


def relax(menus: Sequence[Menu], budget: int) -> tuple[list[int], float]:
    """Positions that minimise sum(error) + slope * sum(cost) within the budget; the slope (0: all fits)."""
    steps: list[tuple[float, int, int, int]] = []  # (-slope, layer, from, to)
    for i, menu in enumerate(menus):
        hull: list[tuple[float, int, int, int]] = []
        for j in range(1, len(menu)):
            last = hull[-1][3] if hull else 0
            step = (-_slope(menu[last], menu[j]), i, last, j)
            while hull and step[0] <= hull[-1][0]:  # also keeps the rounded slopes strictly falling
                last = hull.pop()[2]
                step = (-_slope(menu[last], menu[j]), i, last, j)
            hull.append(step)
        steps += hull
    chosen = [0] * len(menus)
    room = _room(menus, chosen, budget)
    for negative, i, last, j in sorted(steps):
        step = menus[i][j].cost - menus[i][last].cost
        if step > room:
            return chosen, -negative
        chosen[i], room = j, room - step
    return chosen, 0.0


def fill(menus: Sequence[Menu], chosen: Sequence[int], budget: int) -> list[int]:
    """While any upgrade of any layer fits, take the one that removes the most error per cost."""
    chosen = list(chosen)
    room = _room(menus, chosen, budget)
    heap: list[tuple[float, int, int]] = []  # one entry a layer: (-slope, layer, to)

    def offer(i: int) -> None:
        menu, j = menus[i], chosen[i]
        fitting = [k for k in range(j + 1, len(menu)) if menu[k].cost - menu[j].cost <= room]
        if fitting:
            heapq.heappush(heap, min((-_slope(menu[j], menu[k]), i, k) for k in fitting))

    for i in range(len(menus)):
        offer(i)
    while heap:
        _, i, k = heapq.heappop(heap)
        step = menus[i][k].cost - menus[i][chosen[i]].cost
        if step <= room:  # still the best of its layer: whatever fits now fitted when it was offered
            chosen[i], room = k, room - step
        offer(i)
    return chosen


def exact(menus: Sequence[Menu], budget: int, excess: float, states: int) -> list[int] | None:
    """The choice of least total error within the budget; None if more than `states` Pareto states are needed.

    Menus are added one at a time; a state (cost, error) survives if no other is both cheaper and better, if
    the rest can still fit, and if it lies at most `excess` above the bound of `relax`. The optimum's distance
    from that bound must not exceed `excess`, and errors must fall along each menu.
    """
    start, slope = relax(menus, budget)
    room = _room(menus, start, budget)
    # Differences to the relaxed choice: small numbers, and (d error) + slope * (d cost) >= 0 is the distance.
    moves: list[list[tuple[int, int, float]]] = []  # per menu: (position, d cost, d error)
    for menu, j in zip(menus, start, strict=True):
        steps = [(k, o.cost - menu[j].cost, o.error - menu[j].error) for k, o in enumerate(menu)]
        moves.append([step for step in steps if step[2] + slope * step[1] <= excess])
    cheapest = sum(steps[0][1] for steps in moves)  # of the menus still to come

    costs = torch.zeros(1, dtype=torch.int64, device="cpu")  # (states,); whatever the default device is
    errors = torch.zeros(1, dtype=torch.float64, device="cpu")  # (states,)
    trail: list[tuple[Tensor, Tensor]] = []  # per menu: (parent state, position)
    for steps in moves:
        cheapest -= steps[0][1]
        pool: list[tuple[Tensor, ...]] = []
        for position, c, e in steps:
            alive = (costs + (c + cheapest) <= room) & ((errors + e) + slope * (costs + c) <= excess)
            parents = alive.nonzero().squeeze(1).to(torch.int32)
            positions = torch.full_like(parents, position, dtype=torch.int16)
            pool.append((costs[parents] + c, errors[parents] + e, parents, positions))
            if sum(len(part[0]) for part in pool) > 2 * states:
                pool = [_pareto(pool)]  # bounds the memory to a few times `states`
                if len(pool[0][0]) > states:
                    return None
        costs, errors, parents, positions = _pareto(pool)
        if len(costs) > states:
            return None
        trail.append((parents, positions))

    state, chosen = int(errors.argmin()), []
    for parents, positions in reversed(trail):
        chosen.append(int(positions[state]))
        state = int(parents[state])
    return chosen[::-1]


def _room(menus: Sequence[Menu], chosen: Sequence[int], budget: int) -> int:
    return budget - sum(menu[j].cost for menu, j in zip(menus, chosen, strict=True))


def _slope(a: Option, b: Option) -> float:
    return (a.error - b.error) / (b.cost - a.cost)


def _pareto(pool: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Columns (cost, error, ...) of the states that no other beats: costs rising, errors strictly falling."""
    columns = [torch.cat(column) for column in zip(*pool, strict=True)]
    order = columns[1].argsort(stable=True)
    order = order[columns[0][order].argsort(stable=True)]
    errors = columns[1][order]
    keep = torch.ones_like(errors, dtype=torch.bool)
    keep[1:] = errors[1:] < errors.cummin(0).values[:-1]
    return tuple(column[order[keep]] for column in columns)
