"""From a chosen size to a fitted structure and its row of facts, and from the rows to a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rankfold import allocate
from rankfold.fits import Fits
from rankfold.groups import Stack
from rankfold.layers import Layer, left_dense
from rankfold.method import Curve, DecompositionError, Method
from rankfold.metric import Metric
from rankfold.recipe import Recipe
from rankfold.report import LayerRow, Report, SkippedRow
from rankfold.structure import Structure
from rankfold.structures import Sum


def fit(
    method: Method,
    item: Stack,
    metrics: Mapping[str, Metric],
    size: Any,
    curve: Curve,
    kept: Fits | None = None,
) -> tuple[dict[str, Structure], list[LayerRow]]:
    """The fitted structures by layer (none: all stay dense) and each layer's row of facts; errors are
    measured after the cast, in the layer's own metric.

    What the layers of a group share is counted once, in equal parts: the rows add up to what is stored.
    """
    facts = {"spectrum": _sampled(curve.spectrum), "full_rank": min(item.shape)}
    rows = [row_as_is(name, layer, **facts) for name, layer in item.layers.items()]
    if size is None:
        for row in rows:
            row.note = _why_dense(item, metrics, curve)
        return {}, rows
    weight, metric = item.matrix(), item.metric(metrics)
    assert metric is not None
    try:
        if kept is None:
            structure = method.fit(weight, metric, size)
        else:
            structure = kept.fit(method, weight, metric, size)
    except (ValueError, DecompositionError) as error:
        raise type(error)(f"{item}: {error}") from error
    assert structure.shape == item.shape and structure.dtype == weight.dtype
    parts = item.split(structure)
    shared = _shared(list(parts.values()))
    for place, (row, part) in enumerate(zip(rows, parts.values(), strict=True)):
        layer = item.layers[row.name]
        for parameter in () if method.adds else part.parameters():
            trains = [layer] if id(parameter) not in shared else item.layers.values()
            parameter.requires_grad_(any(one.tensor.requires_grad for one in trains))
        own, matrix = metrics[row.name].to(weight.device), layer.matrix()
        with torch.no_grad():
            row.error = own.error(matrix.double() - part.to_dense().double())
        energy = curve.energy if len(rows) == 1 else own.error(matrix)
        row.relative_error = math.sqrt(row.error / energy) if energy > 0 else 0.0
        if method.fresh:
            row.error, row.relative_error = 0.0, math.nan
            row.note = "starts anew at random; nothing of the weight is kept"
        take_(row, part, size)
        if isinstance(part, Sum) and method.adds:
            params, added = (sum(getattr(term, key) for term in part.added) for key in ("params", "nbytes"))
            row.note = f"adds {params:,} parameters that train ({added:,} bytes) beside the frozen weight"
            if isinstance(size, Mapping):  # ranks of bands; the row's size is all of them together
                row.note += f"; ranks {', '.join(f'{name} {rank}' for name, rank in size.items())}"
                row.size = sum(size.values())
        if shared:
            keys = [key for key, parameter in part.named_parameters() if id(parameter) in shared]
            others = ", ".join(name for name in parts if name != row.name)
            row.note = f"one {' and '.join(keys)} with {others}, counted in equal parts"
            count = sum(parameter.numel() for parameter in shared.values())
            nbytes = sum(parameter.numel() * parameter.element_size() for parameter in shared.values())
            row.params_after -= count - _part(count, place, len(rows))
            row.bytes_after -= nbytes - _part(nbytes, place, len(rows))
    return parts, rows


def row_of(name: str, host: str, shape: tuple[int, int], width: int, **facts: Any) -> LayerRow:
    """The row of a layer that is dense, of `width` bytes an entry; `facts` are other fields of the row."""
    count = shape[0] * shape[1]
    return LayerRow(
        name=name,
        type=name.rpartition(".")[2],
        block=next((int(part) for part in name.split(".") if part.isdigit()), None),
        host=host,
        shape=shape,
        structure="dense",
        bytes_before=count * width,
        bytes_after=count * width,
        params_before=count,
        params_after=count,
        macs_before=count,
        macs_after=count,
        **facts,
    )


def row_as_is(name: str, layer: Layer, **facts: Any) -> LayerRow:
    """The row of a layer as it is, before anything is made of it: dense, or what it holds already."""
    row = row_of(name, layer.host, layer.shape, layer.tensor.element_size(), **facts)
    if (held := layer.held) is not None:
        row.bytes_before, row.params_before, row.macs_before = held.nbytes, held.params, held.macs
        row.bytes_after, row.params_after, row.macs_after = held.nbytes, held.params, held.macs
    return row


def take_(row: LayerRow, structure: Structure, size: Any) -> None:
    """Write into a row what the layer became, and what that costs."""
    row.structure, row.size, row.spec = structure.kind, size, structure.spec()
    row.bytes_after, row.params_after, row.macs_after = structure.nbytes, structure.params, structure.macs


def skipped_of(model: nn.Module, layers: Mapping[str, Layer]) -> list[SkippedRow]:
    """The matrices of a model that are not among `layers`, with the reason."""
    return [
        SkippedRow(name=name, shape=tuple(p.shape), bytes=p.numel() * p.element_size(), reason=reason)
        for name, p, reason in left_dense(model, layers)
    ]


def share_loss_(rows: Sequence[LayerRow]) -> float:
    """Tell each row its share of the summed error, and return the sum."""
    lost = sum(row.error for row in rows)
    for row in rows:
        row.loss_share = row.error / lost if lost > 0 else 0.0
    return lost


def totals_of(rows: Sequence[LayerRow], nbytes: int, params: int) -> dict[str, int]:
    """Sums over the rows, and the whole model, which had `nbytes` and `params` before."""
    sums = {
        f"{key}_{when}": sum(getattr(row, f"{key}_{when}") for row in rows)
        for key in ("bytes", "params", "macs")
        for when in ("before", "after")
    }
    return {
        "selected_before": sums["bytes_before"],
        "selected_after": sums["bytes_after"],
        "model_before": nbytes,
        "model_after": nbytes - sums["bytes_before"] + sums["bytes_after"],
        "params_before": params,
        "params_after": params - sums["params_before"] + sums["params_after"],
        "macs_before": sums["macs_before"],
        "macs_after": sums["macs_after"],
    }


def _why_dense(item: Stack, metrics: Mapping[str, Metric], curve: Curve) -> str:
    idle = [name for name in item.layers if name not in metrics]
    if idle:
        what = "it" if len(item.layers) == 1 else f"{idle[0]} of its group"
        return f"stays dense: {what} never ran on the calibration data"
    if len(curve.sizes) == 1:
        return "stays dense: no size of the method is smaller"
    return "stays dense: worth its bytes"


def _shared(parts: Sequence[Structure]) -> dict[int, nn.Parameter]:
    """The parameters that all parts of a group hold."""
    if len(parts) == 1:
        return {}
    first, *rest = ({id(parameter): parameter for parameter in part.parameters()} for part in parts)
    return {key: parameter for key, parameter in first.items() if all(key in other for other in rest)}


def _part(total: int, place: int, count: int) -> int:
    """The `place`-th of `count` equal parts of an integer; they add up to it."""
    return total // count + (place < total % count)


def report_of(
    model: nn.Module,
    recipe: Recipe,
    budget: float,
    unit: str,
    layers: Mapping[str, Layer],
    ties: Mapping[int, list[str]],
    rows: list[LayerRow],
    chosen: allocate.Allocation,
    seconds: dict[str, float],
) -> Report:
    lost = share_loss_(rows)
    parameters = list(model.parameters())
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
        skipped=skipped_of(model, layers),
        totals=totals_of(
            rows,
            sum(p.numel() * p.element_size() for p in parameters),
            sum(p.numel() for p in parameters),
        ),
        allocation={
            "allocator": recipe.to_json()["allocate"],
            "cost": chosen.cost if not recipe.method.adds else sum(getattr(r, f"{key}_after") for r in rows),
            "budget": chosen.budget,
            "error": chosen.error if recipe.reads_errors else lost,
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
    for name, members in ((members[-1], members) for members in ties.values() if len(members) > 1):
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
