"""What the unit of the error is worth: one decomposition, one budget, seven ways to split it between layers.

One pass over the calibration text gives E[x xᵀ] and the energy E‖g‖² of the output gradients of every layer.
After that, a row is a Recipe: the same SVD, another metric, another allocator. The allocators defined here
are what a user would write: a function of the curves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import setting
import torch

from rankfold import factorize_
from rankfold.allocate import Allocation, lagrangian, uniform
from rankfold.method import Curve
from rankfold.methods import SVD
from rankfold.metric import Metric
from rankfold.metrics import Activation, Frobenius
from rankfold.recipe import Recipe

Curves = Mapping[str, Curve]


def relative(curves: Curves, budget: int) -> Allocation:
    """Lagrangian on errors relative to the layer's own energy."""
    return lagrangian(rescaled(curves, lambda error: error), budget)


def root_relative(curves: Curves, budget: int) -> Allocation:
    """Lagrangian on the square roots of the relative errors."""
    return lagrangian(rescaled(curves, lambda error: error**0.5), budget)


def rescaled(curves: Curves, shape: Callable[[float], float]) -> dict[str, Curve]:
    return {
        name: replace(curve, errors=tuple(shape(error / curve.energy) for error in curve.errors))
        for name, curve in curves.items()
    }


def powered(power: float) -> Callable[[Metric], Metric]:
    """E‖g‖² to a power on the output side, E[x xᵀ] on the input side."""
    return lambda metric: Metric(None if metric.left is None else metric.left**power, metric.right)


def inputs_only(metric: Metric) -> Metric:
    return Metric(None, metric.right)


ROWS: tuple[tuple[str, Recipe, Callable[[Metric], Metric]], ...] = (
    ("plain SVD, uniform", Recipe("svd", SVD(), Frobenius(), uniform), lambda metric: Metric()),
    ("whitened, uniform (SVD-LLM)", Recipe("uniform", SVD(), Activation(), uniform), inputs_only),
    (
        "whitened, global on raw activation errors",
        Recipe("raw", SVD(), Activation(), lagrangian),
        inputs_only,
    ),
    ("whitened, global on relative errors", Recipe("relative", SVD(), Activation(), relative), inputs_only),
    (
        "whitened, global on square roots of relative errors",
        Recipe("root", SVD(), Activation(), root_relative),
        inputs_only,
    ),
    (
        "whitened, global, weighted by output-gradient energy (`weighted`)",
        Recipe("weighted", SVD(), Activation(output="scalar"), lagrangian),
        powered(1.0),
    ),
    (
        "the same, weight to the power ½",
        Recipe("half", SVD(), Activation(output="scalar", power=0.5), lagrangian),
        powered(0.5),
    ),
)
# From the same experiment on other windows of the same texts; what has to agree is the order.
PUBLISHED = (5.6e6, 45.1, 111.0, 43.2, 46.4, 29.3, 34.2)


def main() -> None:
    chosen = setting.arguments(
        __doc__,
        budget={"type": float, "default": 0.8, "help": "bytes kept of the selected layers (default 0.8)"},
        metrics={"type": Path, "help": "read the statistics from this file, or keep them in it"},
    )
    opened = setting.open_smollm2()
    windows, held_out = setting.calibration(opened, chosen.sequences), setting.held_out(opened)
    statistics = setting.statistics(opened, windows, chosen.metrics)
    results = {"dense": setting.perplexities(opened.model, held_out)}
    rows = [["dense", *results["dense"].values(), "-"]]
    kept: dict[str, dict[str, float]] = {}
    for title, recipe, change in ROWS:
        metrics = {name: change(metric) for name, metric in statistics.items()}
        model = copy.deepcopy(opened.model)
        report = factorize_(model, recipe, budget=chosen.budget, metrics=metrics)
        result = setting.perplexities(model, held_out)
        gap = report.allocation["gap"]
        results[title] = {**result, "reached": report.reached, "gap": gap}
        rows.append([title, *result.values(), "-" if gap is None else f"{gap:.3%}"])
        kept[title] = by_type(report)
        print(rows[-1], flush=True)
        del model
    types = list(next(iter(kept.values())))
    shares = [[title, *(f"{share[kind]:.2f}" for kind in types)] for title, share in kept.items()]
    text = setting.table(["allocation", *held_out, "gap"], rows)
    text += "\n\nShare of the bytes kept, by type of layer:\n\n" + setting.table(
        ["allocation", *types], shares
    )
    measured = [results[title]["in domain"] for title, _, _ in ROWS]
    same = order(measured) == order(PUBLISHED)
    text += f"\n\nSame order of rows as the reference, in domain: {'yes' if same else 'no'}"
    facts = {
        "budget": chosen.budget,
        "calibration": windows.facts(),
        "perplexity": results,
        "kept": kept,
        "order": same,
    }
    setting.finish(f"Allocation at {chosen.budget} of the bytes, {windows.spec}", facts, text, chosen)


def by_type(report) -> dict[str, float]:
    """{type of layer: share of its bytes kept}."""
    types = dict.fromkeys(row.type for row in report.layers)
    before = {kind: sum(row.bytes_before for row in report.layers if row.type == kind) for kind in types}
    after = {kind: sum(row.bytes_after for row in report.layers if row.type == kind) for kind in types}
    return {kind: after[kind] / before[kind] for kind in types}


def order(values) -> list[int]:
    return torch.tensor(list(values), dtype=torch.float64).argsort().tolist()


if __name__ == "__main__":
    main()
