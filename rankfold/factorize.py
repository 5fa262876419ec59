"""The pipeline on one screen: calibrate, ask what each size would cost and lose, spend one budget, factorize, replace, report.

    factorize_(model, recipes.svd_llm, budget=0.8, batches=ids)

Five locals are the whole state. Nothing in the model changes before everything has been fitted: an error or an interrupt
leaves it as it was.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankfold import allocate
from rankfold.layers import Layer, left_dense, replace_, select
from rankfold.manifest import stamp_
from rankfold.method import Curve, Method, cost_of, from_json
from rankfold.metric import Metric
from rankfold.metrics import Calibration, Progress
from rankfold.batches import Batch
from rankfold.report import LayerRow, Report, SkippedRow
from rankfold.structure import Structure

Allocator = Callable[[Mapping[str, Curve], int], allocate.Allocation]


@dataclass(frozen=True)
class Recipe:
    """A method, a metric and an allocator, with a paper's name on it."""

    name: str
    method: Method
    metric: Calibration
    allocate: Allocator
    paper: str = ""
    summary: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "method": self.method.to_json(),
            "metric": {"kind": self.metric.kind, **vars(self.metric)},
            "allocate": getattr(self.allocate, "__name__", str(self.allocate)),
            "paper": self.paper,
        }

    @classmethod
    def from_json(cls, data: Any) -> Recipe:
        """The recipe that `to_json` wrote. Raises ValueError for unknown kinds, options or allocators."""
        if not isinstance(data, Mapping) or not {"name", "method", "metric", "allocate"} <= set(data):
            raise ValueError(f"a recipe in JSON has 'name', 'method', 'metric' and 'allocate'; got {data!r}")
        allocators = {
            f.__name__: f for f in (allocate.uniform, allocate.energy, allocate.lagrangian, allocate.knapsack)
        }
        if data["allocate"] not in allocators:
            raise ValueError(f"Unknown allocator {data['allocate']!r}; known: {sorted(allocators)}")
        method = from_json(Method.kinds, "method", data["method"])
        metric = from_json(Calibration.kinds, "metric", data["metric"])
        return cls(
            str(data["name"]), method, metric, allocators[data["allocate"]], str(data.get("paper", ""))
        )


def factorize_(
    model: nn.Module,
    recipe: Recipe,
    *,
    budget: float = 1.0,
    batches: Iterable[Batch] | Tensor | None = None,
    targets: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    conv: str = "channel",
    unit: str = "nbytes",
    metrics: Mapping[str, Metric] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Replace the selected layers of `model` in place by structures that together cost at most `budget`.

    budget   fraction of the selected layers' cost that is KEPT, in (0, 1]; biases and other layers are not counted
    batches  calibration data (see `observe`), for recipes that calibrate
    targets, skip, conv  which layers, and how a convolution is read (see `select`)
    unit     what the budget counts: "nbytes", "params" or "macs"
    metrics  the result of an earlier `calibrate`, instead of batches
    progress called as (stage, done, total), where total may be None

    Raises ValueError for bad arguments, before any long work begins; DecompositionError where a matrix defeats every
    solver. In both cases the model is unchanged.
    """
    layers = select(model, targets, skip, conv=conv)
    groups = tied(model, layers)
    heads = {members[-1]: layers[members[-1]] for members in groups.values()}
    limit = check_budget(recipe, heads, budget, unit)
    check_weights(model)
    seconds = {}
    with _timed(seconds, "calibrate"):
        if metrics is None:
            metrics = calibrate(model, recipe, layers, batches, seed=seed, progress=progress)
    with warnings.catch_warnings(record=True) as caught, _timed(seconds, "decompose"):
        warnings.simplefilter("always")
        curves = {}
        for done, (name, layer) in enumerate(heads.items()):
            _tell(progress, "measure", done, len(heads))
            curves[name] = curve_of(recipe.method, layer, name, metrics.get(name), unit)
        _tell(progress, "measure", len(heads), len(heads))
        chosen = recipe.allocate(curves, limit)
        fitted: dict[str, Structure] = {}
        rows = []
        for done, (name, layer) in enumerate(heads.items()):
            _tell(progress, "factorize", done, len(heads))
            size = curves[name].sizes[chosen.index[name]]
            structure, row = fit(recipe.method, layer, name, metrics.get(name), size, curves[name])
            rows.append(row)
            if structure is not None:
                fitted[name] = structure
        _tell(progress, "factorize", len(heads), len(heads))
    report = _report(model, recipe, budget, unit, layers, groups, rows, chosen, seconds)
    report.warnings += sorted({str(w.message) for w in caught})
    report.seed = seed
    for name, structure in fitted.items():
        for member in next(members for members in groups.values() if members[-1] == name):
            replace_(model, member, layers[member].wrap(structure))
    if fitted:
        stamp_(model, recipe.to_json())
    return report


def calibrate(
    model: nn.Module,
    recipe: Recipe,
    layers: Mapping[str, Layer],
    batches: Iterable[Batch] | Tensor | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Metric]:
    """The recipe's metric of each layer; a layer that never ran has none. Checked: finite and of the layer's shape."""
    if recipe.metric.needs_data and batches is None:
        raise ValueError(
            f"recipe {recipe.name!r} calibrates on data ({recipe.metric.kind}) but batches is None"
        )
    metrics = recipe.metric(model, layers, batches, seed=seed, progress=progress)
    for name, metric in metrics.items():
        metric.check(name, layers[name].shape)
    return metrics


def check_budget(recipe: Recipe, layers: Mapping[str, Layer], budget: float, unit: str) -> int:
    """The budget as an amount in `unit`. Raises ValueError if it is no fraction, or below the smallest possible size."""
    if not isinstance(budget, int | float) or isinstance(budget, bool) or not 0 < budget <= 1:
        raise ValueError(f"budget={budget!r} is the fraction of {unit} kept, a number above 0 and at most 1")
    costs = {name: costs_of(recipe.method, layer, unit) for name, layer in layers.items()}
    dense = {name: cost[-1] for name, cost in costs.items()}
    total, smallest = sum(dense.values()), sum(min(cost) for cost in costs.values())
    if smallest > budget * total:
        most = sorted(costs, key=lambda name: min(costs[name]), reverse=True)[:3]
        needs = ", ".join(f"{name} alone needs {min(costs[name]) / total:.4f}" for name in most)
        raise ValueError(
            f"budget={budget} is below the smallest possible {math.ceil(smallest / total * 1e4) / 1e4} of the selected layers' "
            f"{unit} ({needs}). Raise the budget, or skip those layers"
        )
    return math.floor(budget * total + 1e-9)


def costs_of(method: Method, layer: Layer, unit: str) -> list[int]:
    """What each size of the menu costs, dense last: known before any data is seen."""
    dtype = layer.tensor.dtype
    sizes = [cost_of(method.empty(layer.shape, size, dtype), unit) for size in method.menu(layer.shape)]
    return [*sizes, layer.tensor.numel() * (layer.tensor.element_size() if unit == "nbytes" else 1)]


def check_weights(model: nn.Module) -> None:
    """Raise ValueError naming the first tensor that is on meta or not finite."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"tensor {name!r} is on the meta device: load the weights before factorizing")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                f"tensor {name!r} of shape {tuple(tensor.shape)} holds {bad} NaN or infinite entries"
            )


def tied(model: nn.Module, layers: Mapping[str, Layer]) -> dict[int, list[str]]:
    """Names of the layers that share one parameter, embeddings first: the last of each group is fitted, for all of them.

    Raises ValueError where a selected layer shares its parameter with a module that is not selected: factorizing one side
    only would add parameters.
    """
    groups: dict[int, list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault(id(layer.tensor), []).append(name)
    chosen = {id(layer.module) for layer in layers.values()}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in groups and id(module) not in chosen:
                raise ValueError(
                    f"layer {groups[id(parameter)][0]!r} shares its weight with {name!r}, which is not selected; add it to "
                    "the targets, or skip both"
                )
    return {key: sorted(names, key=lambda name: not layers[name].lookup) for key, names in groups.items()}


def curve_of(method: Method, layer: Layer, name: str, metric: Metric | None, unit: str) -> Curve:
    """The layer's curve; only the dense entry for a layer without a metric."""
    weight = layer.matrix()
    if metric is None:
        return Curve((None,), (costs_of(method, layer, unit)[-1],), (0.0,))
    metric = metric.to(weight.device)
    try:
        return method.curve(weight, metric, unit)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error


def fit(
    method: Method, layer: Layer, name: str, metric: Metric | None, size: Any, curve: Curve
) -> tuple[Structure | None, LayerRow]:
    """The fitted structure (None: stays dense) and its row of facts; errors are measured after the cast."""
    weight = layer.matrix()
    dense = layer.tensor.numel() * layer.tensor.element_size()
    row = LayerRow(
        name=name,
        type=name.rpartition(".")[2],
        block=next((int(part) for part in name.split(".") if part.isdigit()), None),
        host=layer.host,
        shape=layer.shape,
        structure="dense",
        bytes_before=dense,
        bytes_after=dense,
        params_before=weight.numel(),
        params_after=weight.numel(),
        macs_before=weight.numel(),
        macs_after=weight.numel(),
        spectrum=_sampled(curve.spectrum),
        full_rank=min(weight.shape),
    )
    if size is None:
        if metric is None:
            row.note = "stays dense: it never ran on the calibration data"
        elif len(curve.sizes) == 1:
            row.note = "stays dense: no size of the method is smaller"
        else:
            row.note = "stays dense: worth its bytes"
        return None, row
    assert metric is not None
    metric = metric.to(weight.device)
    structure = method.fit(weight, metric, size)
    assert structure.shape == layer.shape and structure.dtype == weight.dtype
    for parameter in structure.parameters():
        parameter.requires_grad_(layer.tensor.requires_grad)
    with torch.no_grad():
        row.error = metric.error(weight.double() - structure.to_dense().double())
    row.relative_error = math.sqrt(row.error / curve.energy) if curve.energy > 0 else 0.0
    row.structure, row.size, row.spec = structure.kind, size, structure.spec()
    row.bytes_after, row.params_after, row.macs_after = structure.nbytes, structure.params, structure.macs
    return structure, row


def _report(
    model: nn.Module,
    recipe: Recipe,
    budget: float,
    unit: str,
    layers: Mapping[str, Layer],
    groups: Mapping[int, list[str]],
    rows: list[LayerRow],
    chosen: allocate.Allocation,
    seconds: dict[str, float],
) -> Report:
    lost = sum(row.error for row in rows)
    for row in rows:
        row.loss_share = row.error / lost if lost > 0 else 0.0
    before, after = sum(r.bytes_before for r in rows), sum(r.bytes_after for r in rows)
    parameters = list(model.parameters())
    whole = sum(p.numel() * p.element_size() for p in parameters)
    count = sum(p.numel() for p in parameters)
    key = {"nbytes": "bytes", "params": "params", "macs": "macs"}[unit]
    spent = sum(getattr(r, f"{key}_after") for r in rows) / max(
        sum(getattr(r, f"{key}_before") for r in rows), 1
    )
    report = Report(
        recipe=recipe.to_json(),
        budget=float(budget),
        reached=spent,
        unit=unit,
        layers=rows,
        skipped=[
            SkippedRow(name=name, shape=tuple(p.shape), bytes=p.numel() * p.element_size(), reason=reason)
            for name, p, reason in left_dense(model, layers)
        ],
        totals={
            "selected_before": before,
            "selected_after": after,
            "model_before": whole,
            "model_after": whole - before + after,
            "params_before": count,
            "params_after": count - sum(r.params_before - r.params_after for r in rows),
            "macs_before": sum(r.macs_before for r in rows),
            "macs_after": sum(r.macs_after for r in rows),
        },
        allocation={
            "allocator": recipe.to_json()["allocate"],
            "cost": chosen.cost,
            "budget": chosen.budget,
            "error": chosen.error,
            "bound": chosen.bound,
            "gap": chosen.gap,
        },
        timings=seconds,
        dtype=str(next(iter(layers.values())).tensor.dtype).removeprefix("torch."),
    )
    if not recipe.metric.additive and recipe.allocate in (allocate.lagrangian, allocate.knapsack):
        report.warnings.append(
            f"the errors of metric {recipe.metric.kind!r} are not in the unit of the loss, yet the allocator added them across "
            "layers; use a two-sided metric (kfac, activation with output='scalar') or uniform sizes"
        )
    for name, members in ((members[-1], members) for members in groups.values() if len(members) > 1):
        others = ", ".join(members[:-1])
        next(row for row in rows if row.name == name).note = f"one matrix, shared with {others}"
    return report


def _sampled(spectrum: Sequence[float]) -> list[float]:
    """At most 128 singular values, evenly spaced by index, the largest one 1."""
    if not spectrum or spectrum[0] <= 0:
        return []
    count = min(128, len(spectrum))
    index = [round(i * (len(spectrum) - 1) / max(count - 1, 1)) for i in range(count)]
    return [math.sqrt(spectrum[i] / spectrum[0]) for i in index]


def _tell(progress: Progress | None, stage: str, done: int, total: int) -> None:
    if progress:
        progress(stage, done, total)


class _timed:
    """Add the wall seconds of a block to `seconds[name]`."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + time.perf_counter() - self.start

