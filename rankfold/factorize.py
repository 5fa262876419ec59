"""The pipeline on one screen: calibrate, ask what each size would cost and lose, spend one budget, factorize,
replace, report.

    factorize_(model, recipes.svd_llm, budget=0.8, batches=ids)

Five locals are the whole state. Nothing in the model changes before everything has been fitted: an error or
an interrupt leaves it as it was.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from rankfold.adapters import check_dense, check_unadapted, check_unmixed, count_, freeze_
from rankfold.batches import Batch
from rankfold.compressed import compressed
from rankfold.fits import Fits
from rankfold.groups import Stack, stacks
from rankfold.layers import Layer, replace_, select
from rankfold.manifest import stamp_
from rankfold.method import Curve, DecompositionError
from rankfold.metric import Metric
from rankfold.metrics import Progress
from rankfold.optimizers import check_unheld
from rankfold.outcome import fit, report_of
from rankfold.recipe import Recipe
from rankfold.report import LayerRow, Report
from rankfold.structure import Structure


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
    keep: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Replace the selected layers of `model` in place by structures that together cost at most `budget`; or,
    with an adapter's recipe, put something that trains beside each and freeze the rest (`rankfold.adapters`).

    budget   fraction of the selected layers' cost that is KEPT, in (0, 1]; biases and other layers are not
             counted. An adapter adds to the model: there the budget stays 1
    batches  calibration data (see `observe`), for recipes that calibrate
    targets, skip, conv  which layers, and how a convolution is read (see `select`)
    unit     what the budget counts: "nbytes", "params" or "macs"
    metrics  the result of an earlier `calibrate`, instead of batches
    keep     a folder for every fit as it is made: run again after an interrupt, it goes on from there and
             ends with the same bytes (`rankfold.fits`); yours to delete
    progress called as (stage, done, total), where total may be None

    Raises ValueError for bad arguments, before any long work begins; DecompositionError where a matrix
    defeats every solver. In both cases the model is unchanged.
    """
    adds = recipe.method.adds
    layers = select(model, targets, skip, conv=conv, more=compressed(model) if adds else None)
    if adds:
        check_unadapted(layers)
        check_unmixed(model, recipe.method.takes)
    if recipe.method.takes:
        check_dense(layers, recipe.name)
    ties = tied(model, layers)
    items = stacks(recipe.groups, layers, ties)
    limit = check_budget(recipe, items, budget, unit)
    check_weights(model)
    if recipe.method.fresh:
        check_untrained(model, recipe, layers)
    if recipe.method.fresh or adds:
        check_unheld({name: layer.tensor for name, layer in layers.items()}, "factorize_")
    seconds = {}
    with _timed(seconds, "calibrate"):
        if metrics is None:
            metrics = calibrate(model, recipe, layers, batches, seed=seed, progress=progress)
        for name in metrics.keys() & layers.keys():
            metrics[name].check(name, layers[name].shape)
    with warnings.catch_warnings(record=True) as caught, _timed(seconds, "decompose"):
        warnings.simplefilter("always")
        curves = {}
        for done, (name, item) in enumerate(items.items()):
            _tell(progress, "measure", done, len(items))
            curves[name] = curve_of(recipe, item, metrics, unit)
        _tell(progress, "measure", len(items), len(items))
        chosen = recipe.allocate(curves, limit)
        kept = None if keep is None else Fits(Path(keep))
        fitted: dict[str, Structure] = {}
        rows: list[LayerRow] = []
        for done, (name, item) in enumerate(items.items()):
            _tell(progress, "factorize", done, len(items))
            size = curves[name].sizes[chosen.index[name]]
            parts, facts = fit(recipe.method.at(name, seed), item, metrics, size, curves[name], kept)
            fitted |= parts
            rows += facts
        _tell(progress, "factorize", len(items), len(items))
    report = report_of(model, recipe, budget, unit, layers, ties, rows, chosen, seconds)
    report.warnings += sorted({str(w.message) for w in caught})
    report.seed = seed
    for name, structure in fitted.items():
        for member in next(members for members in ties.values() if members[-1] == name):
            replace_(model, member, layers[member].wrap(structure))
    if adds:
        count_(report, freeze_(model))
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
    """The recipe's metric of each layer; a layer that never ran has none. Checked: finite and of the layer's
    shape."""
    if recipe.metric.needs_data and batches is None:
        raise ValueError(
            f"recipe {recipe.name!r} calibrates on data ({recipe.metric.kind}) but batches is None"
        )
    metrics = recipe.metric(model, layers, batches, seed=seed, progress=progress)
    for name, metric in metrics.items():
        metric.check(name, layers[name].shape)
    return metrics


def check_budget(recipe: Recipe, items: Mapping[str, Stack], budget: float, unit: str) -> int:
    """The budget as an amount in `unit`. Raises ValueError if it is no fraction, or below the smallest
    possible size."""
    if not isinstance(budget, int | float) or isinstance(budget, bool) or not 0 < budget <= 1:
        raise ValueError(f"budget={budget!r} is the fraction of {unit} kept, a number above 0 and at most 1")
    if recipe.method.adds and budget != 1:
        raise ValueError(
            f"budget={budget}: recipe {recipe.name!r} puts adapters beside the weights, which stay, so "
            "it adds bytes; how many is said by its options. Leave budget at 1"
        )
    costs = {}
    for name, item in items.items():
        try:
            costs[name] = item.costs(recipe.method, unit)
        except ValueError as error:  # an adapter's one size, which a small layer cannot have
            raise ValueError(f"{item}: {error}") from error
    dense = {name: cost[-1] for name, cost in costs.items()}
    if recipe.method.adds:
        return sum(cost[0] for cost in costs.values())
    total, smallest = sum(dense.values()), sum(min(cost) for cost in costs.values())
    if smallest > budget * total:
        most = sorted(costs, key=lambda name: min(costs[name]), reverse=True)[:3]
        needs = ", ".join(f"{name} alone needs {min(costs[name]) / total:.4f}" for name in most)
        raise ValueError(
            f"budget={budget} is below the smallest possible {math.ceil(smallest / total * 1e4) / 1e4} of "
            f"the selected layers' "
            f"{unit} ({needs}). Raise the budget, or skip those layers"
        )
    return math.floor(budget * total + 1e-9)


def check_weights(model: nn.Module) -> None:
    """Raise ValueError naming the first tensor that is on meta or not finite."""
    buffers = dict(model.named_buffers())
    for name, tensor in (*model.named_parameters(), *buffers.items()):
        if tensor.is_meta:
            raise ValueError(f"tensor {name!r} is on the meta device: load the weights before factorizing")
        # A buffer may hold infinities by design (an additive mask); a weight may not.
        bad = int((tensor.isnan() if name in buffers else ~tensor.isfinite()).sum())
        if tensor.is_floating_point() and bad:
            raise ValueError(
                f"tensor {name!r} of shape {tuple(tensor.shape)} holds {bad} NaN or infinite entries"
            )


def check_untrained(model: nn.Module, recipe: Recipe, layers: Mapping[str, Layer]) -> None:
    """Raise ValueError where a recipe that starts anew would throw away weights that transformers loaded."""
    loaded = [name for name, layer in layers.items() if getattr(layer.tensor, "_is_hf_initialized", False)]
    if loaded:
        raise ValueError(
            f"recipe {recipe.name!r} starts from random numbers and would discard the weights that "
            f"{getattr(model, 'name_or_path', '')!r} was loaded with ({loaded[0]!r}, …). To train from "
            "scratch, build the model from its config (AutoModelForCausalLM.from_config); to keep what it "
            "knows, use a recipe that compresses, such as 'kfac'"
        )


def tied(model: nn.Module, layers: Mapping[str, Layer]) -> dict[int, list[str]]:
    """Names of the layers that share one parameter, embeddings first: the last of each group is fitted, for
    all of them.

    Raises ValueError where a selected layer shares its parameter with a module that is not selected:
    factorizing one side only would add parameters.
    """
    groups: dict[int, list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault(id(layer.owner), []).append(name)
    chosen = {id(layer.module) for layer in layers.values()}
    for name, module in model.named_modules():
        structures = (child for child in module.children() if isinstance(child, Structure))
        for owner in (*module.parameters(recurse=False), *structures):
            if id(owner) in groups and id(module) not in chosen:
                raise ValueError(
                    f"layer {groups[id(owner)][0]!r} shares its weight with {name!r}, which is not "
                    f"selected; add it to "
                    "the targets, or skip both"
                )
    return {key: sorted(names, key=lambda name: not layers[name].lookup) for key, names in groups.items()}


def curve_of(recipe: Recipe, item: Stack, metrics: Mapping[str, Metric], unit: str) -> Curve:
    """The item's curve; only the dense entry where one of its layers has no metric."""
    metric = item.metric(metrics)
    if metric is None:
        return Curve((None,), (item.dense(unit),), (0.0,))
    method = recipe.method
    try:
        curve = method.curve(item.matrix(), metric, unit, errors=recipe.reads_errors)
        return item.priced(curve, method, unit)
    except (ValueError, DecompositionError) as error:
        raise type(error)(f"{item}: {error}") from error


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
