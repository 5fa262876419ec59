"""The main job end to end, as the command line runs it: open, calibrate, factorize, evaluate, write, verify,
report.

Everything cheap is checked before anything long begins: recipe, budget, folder, data. The original is
evaluated beside the result without a second copy of its weights: a twin of the module tree that shares every
tensor.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from rankfold import data as texts
from rankfold.calibration_file import load_metrics, save_metrics
from rankfold.checkpoint import check_folder, save, verify, write_report
from rankfold.evaluate import bytes_on_disk
from rankfold.factorize import calibrate, check_budget, check_weights, factorize_, tied
from rankfold.groups import stacks
from rankfold.inputs import CALIB, TEST, open_recipe, read_batches
from rankfold.judge import Bars, side_by_side
from rankfold.layers import select
from rankfold.loading import Opened, open_model
from rankfold.methods import Dictionary
from rankfold.metrics import Progress
from rankfold.provenance import versions, weights_hash
from rankfold.recipe import Recipe
from rankfold.report import Report
from rankfold.sparse_code import how_applied


def compress(
    model: str,
    out: str,
    *,
    recipe: str,
    budget: float,
    unit: str,
    calib: str | None,
    targets: Sequence[str] | None,
    skip: Sequence[str],
    metrics_file: str | None,
    keep: str | None,
    storage: str | None,
    batch_size: int,
    seed: int,
    dtype: str | None,
    device: str | None,
    data: str | None,
    evaluate: bool,
    check: bool,
    overwrite: bool,
    progress: Bars,
) -> tuple[Report, Path]:
    """Run the whole job and return the report and the folder written. Raises ValueError for bad arguments,
    early."""
    chosen = open_recipe(recipe)
    if storage is not None:
        chosen = stored_as(chosen, storage)
    folder = check_folder(out, overwrite)
    for spec in (calib, data):
        if spec is not None:
            texts.Spec.parse(spec)
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    opened = open_model(model, dtype=dtype, device=device)
    seconds["load"] = time.perf_counter() - start
    net = opened.model
    layers = select(net, targets, skip)
    check_budget(chosen, stacks(chosen.groups, layers, tied(net, layers)), budget, unit)
    check_weights(net)

    start = time.perf_counter()
    batches, facts = None, None
    if chosen.metric.needs_data:
        labelled = chosen.metric.kind == "fisher" and not opened.causal
        batches, facts = read_batches(opened, calib or CALIB, batch_size, seed, labelled)
    held_out, held_facts = (
        read_batches(opened, data or TEST, 4, 0, False, spread="even") if evaluate else (None, None)
    )
    seconds["read"] = time.perf_counter() - start

    original_hash = weights_hash(net)
    twin = twin_of(net) if evaluate else None
    with progress() as tell:
        metrics, took = None, 0.0
        if metrics_file is not None and batches is not None:
            key = {
                "weights": original_hash,
                "data": (facts or {}).get("hash"),
                "metric": chosen.to_json()["metric"],
                "seed": seed,
                "layers": list(layers),
            }
            start = time.perf_counter()
            if Path(metrics_file).exists():
                metrics = load_metrics(metrics_file, key)
            else:
                metrics = calibrate(net, chosen, layers, batches, seed=seed, progress=tell)
                save_metrics(metrics, metrics_file, key)
            took = time.perf_counter() - start
        report = factorize_(
            net,
            chosen,
            budget=budget,
            unit=unit,
            batches=batches,
            targets=targets,
            skip=skip,
            metrics=metrics,
            seed=seed,
            keep=keep,
            progress=tell,
        )
        report.timings["calibrate"] += took
        report.timings = {**seconds, **report.timings}
        report.model, report.data, report.weights_hash = opened.name, facts, original_hash
        report.versions, report.seed = versions(), seed
        report.warnings += how_applied(net)
        if twin is not None and held_out is not None:
            found = evaluate_into(report, opened, twin, held_out, held_facts, tell)
            found["dense"]["bytes_on_disk"] = report.totals["model_before"]
        example = next(iter(held_out or batches or []), None)
        write(net, folder, report, opened.reader, example, check=check, overwrite=overwrite, tell=tell)
    return report, folder


def write(
    model: nn.Module,
    folder: Path,
    report: Report,
    tokenizer: Any,
    example: Any,
    *,
    check: bool,
    overwrite: bool,
    tell: Progress,
) -> None:
    """Save a model with its report, reload and compare it bit for bit if `check`, and put the bytes that the
    files hold in the place of what tensors promise.

    example  a batch to compare logits on as well, if it is a mapping of the model's arguments
    """
    tell("write", 0, 1)
    start = time.perf_counter()
    save(model, folder, report=report, tokenizer=tokenizer, overwrite=overwrite)
    report.timings["write"] = time.perf_counter() - start
    tell("write", 1, 1)
    if check:
        tell("verify", 0, 1)
        start = time.perf_counter()
        verify(model, folder, example if isinstance(example, Mapping) else None)
        report.timings["verify"] = time.perf_counter() - start
        tell("verify", 1, 1)
    payload = report.totals["disk_after"] = bytes_on_disk(folder)["payload"]
    if report.evaluation:
        report.evaluation["compressed"]["bytes_on_disk"] = payload
    write_report(report, folder)


def evaluate_into(
    report: Report,
    opened: Opened,
    twin: nn.Module,
    batches: Any,
    facts: Mapping[str, Any] | None,
    tell: Progress,
) -> dict[str, Any]:
    """Evaluate the twin, which is the original, and the opened model; the evaluation, now the report's."""
    start = time.perf_counter()
    found = side_by_side(opened, twin, batches, facts, tell)
    report.warnings += found.pop("warnings", [])
    for row in ("dense", "compressed"):  # the totals have them, and say of which layers
        found[row].pop("bytes", None)
    report.evaluation = found
    report.timings["evaluate"] = time.perf_counter() - start
    return found


def stored_as(recipe: Recipe, storage: str) -> Recipe:
    """The recipe with the values of its sparse codes stored otherwise, which its budget counts."""
    if not isinstance(recipe.method, Dictionary):
        raise ValueError(
            f"storage={storage!r} is how the values of sparse codes are stored, and recipe {recipe.name!r} "
            "makes none; leave it out, or take a recipe of sparse codes: cospadi, rocket, codes"
        )
    return replace(recipe, method=replace(recipe.method, storage=storage))


def twin_of(model: nn.Module) -> nn.Module:
    """A second module tree over the same tensors: it stays dense, in no extra memory, while the first is
    factorized."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
