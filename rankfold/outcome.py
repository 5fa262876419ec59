"""From a chosen size to a fitted structure and its row of facts, and from the rows to a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rankfold import allocate
from rankfold.layers import Layer, left_dense
from rankfold.method import Curve, DecompositionError, Method
from rankfold.metric import Metric
from rankfold.recipe import Recipe
from rankfold.report import LayerRow, Report, SkippedRow
from rankfold.structure import Structure


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
    try:
        structure = method.fit(weight, metric, size)
    except (ValueError, DecompositionError) as error:
        raise type(error)(f"layer {name!r}: {error}") from error
    assert structure.shape == layer.shape and structure.dtype == weight.dtype
    for parameter in structure.parameters():
        parameter.requires_grad_(layer.tensor.requires_grad)
    with torch.no_grad():
        row.error = metric.error(weight.double() - structure.to_dense().double())
    row.relative_error = math.sqrt(row.error / curve.energy) if curve.energy > 0 else 0.0
    row.structure, row.size, row.spec = structure.kind, size, structure.spec()
    row.bytes_after, row.params_after, row.macs_after = structure.nbytes, structure.params, structure.macs
    return structure, row


def report_of(
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
            f"the errors of metric {recipe.metric.kind!r} are not in the unit of the loss, yet the "
            f"allocator added them across "
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
