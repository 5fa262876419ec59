"""The main job end to end, as the command line runs it: open, calibrate, factorize, evaluate, write, verify,
report.

Everything cheap is checked before anything long begins: recipe, budget, folder, data. The original is
evaluated beside the result without a second copy of its weights: a twin of the module tree that shares every
tensor.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankfold import data as texts
from rankfold import recipes
from rankfold.batches import Batch
from rankfold.calibration_file import load_metrics, save_metrics
from rankfold.checkpoint import check_folder, save, verify, write_report
from rankfold.data_labelled import is_labelled, labelled_batches
from rankfold.evaluate import accuracy, bytes_on_disk, compare, latency, macs_per_token, params, perplexity
from rankfold.factorize import calibrate, check_budget, check_weights, factorize_, tied
from rankfold.layers import select
from rankfold.loading import Opened, open_model
from rankfold.metrics import Progress
from rankfold.provenance import versions, weights_hash
from rankfold.recipe import Recipe
from rankfold.report import FILE_NAME, Report

CALIB, TEST = "wikipedia:train:64x512", "wikipedia:test:12x512"
Bars = Callable[[], AbstractContextManager[Progress]]


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
    groups = tied(net, layers)
    check_budget(chosen, {members[-1]: layers[members[-1]] for members in groups.values()}, budget, unit)
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
            progress=tell,
        )
        report.timings["calibrate"] += took
        report.timings = {**seconds, **report.timings}
        report.model, report.data, report.weights_hash = opened.name, facts, original_hash
        report.versions, report.seed = versions(), seed
        if twin is not None and held_out is not None:
            start = time.perf_counter()
            report.evaluation = _evaluation(opened, twin, held_out, held_facts, tell)
            report.warnings += report.evaluation.pop("warnings", [])
            report.timings["evaluate"] = time.perf_counter() - start
        tell("write", 0, 1)
        start = time.perf_counter()
        save(net, folder, report=report, tokenizer=opened.tokenizer, overwrite=overwrite)
        report.timings["write"] = time.perf_counter() - start
        tell("write", 1, 1)
        if check:
            tell("verify", 0, 1)
            start = time.perf_counter()
            example = next(iter(held_out or batches or []), None)
            verify(net, folder, example if isinstance(example, Mapping) else None)
            report.timings["verify"] = time.perf_counter() - start
            tell("verify", 1, 1)
    _measure_disk(report, folder)
    write_report(report, folder)
    return report, folder


def evaluate(
    model: str,
    against: str | None,
    *,
    data: str | None,
    dtype: str | None,
    device: str | None,
    batch_size: int,
    latency: bool,
    progress: Bars,
) -> dict[str, Any]:
    """Measure one model, or two of them side by side (`against` is the reference). Raises ValueError where
    the two cannot be compared: tokens or dtypes differ."""
    if data is not None:
        texts.Spec.parse(data)
    opened = open_model(model, dtype=dtype, device=device)
    batches, facts = read_batches(opened, data or TEST, batch_size, 0, False, spread="even")
    if against is None:
        with progress() as tell:
            return {"model": model, "data": facts, "measured": _measure(opened, batches, batch_size, tell)}
    other = open_model(against, dtype=dtype, device=device)
    _, other_facts = read_batches(other, data or TEST, batch_size, 0, False, spread="even")
    if (facts or {}).get("hash") != (other_facts or {}).get("hash"):
        raise ValueError(
            f"{model} and {against} tokenize the data differently (token hashes "
            f"{(facts or {}).get('hash', '')[:12]} and "
            f"{(other_facts or {}).get('hash', '')[:12]}), so their perplexities cannot be compared"
        )
    with progress() as tell:
        result = _evaluation(opened, other.model, batches, facts, tell, timed=latency)
    for row, name in (("dense", against), ("compressed", model)):
        if Path(name).is_dir():
            result[row]["bytes_on_disk"] = bytes_on_disk(name)["payload"]
    return {"model": model, "against": against, **result}


def open_recipe(name: str) -> Recipe:
    """A recipe by name, from a recipe's JSON file, or from the report in a compressed folder (to repeat its
    run)."""
    path = Path(name)
    if path.is_dir():
        path = path / FILE_NAME
    if path.suffix == ".json":
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"no recipe at {path}: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        return Recipe.from_json(body.get("recipe", body) if isinstance(body, dict) else body)
    return recipes.get(name)


def read_batches(
    opened: Opened, spec: str, batch_size: int, seed: int, labelled: bool, spread: str = "random"
) -> tuple[list[Batch], dict[str, Any]]:
    """Batches for a model from a SPEC, and the facts of the data. A causal model, and any model calibrated on
    plain text, gets windows of tokens; a classifier that is to be scored or needs labels gets labelled,
    padded examples."""
    if opened.tokenizer is None:
        raise ValueError(
            f"{opened.name} has no tokenizer beside it, so text cannot be read for it; use the Python API"
        )
    parsed = texts.Spec.parse(spec)
    calibrating = spread == "random"
    split = "train" if calibrating else "test"
    if not opened.causal and is_labelled(parsed):
        draw = seed if calibrating else None
        return labelled_batches(parsed, opened.tokenizer, split=split, batch_size=batch_size, seed=draw)
    if labelled:
        raise ValueError(
            f"this recipe needs labels, and {spec!r} has none; calibrate on labelled data, e.g. --calib "
            f"movie:train"
        )
    longest = getattr(opened.model.config, "max_position_embeddings", None) or 512
    length = parsed.length or 512
    if length > longest:
        raise ValueError(
            f"{spec!r} asks for {length} tokens a sequence, the model reads at most {longest}; write "
            f"…:Nx{longest}"
        )
    windows = texts.token_windows(
        parsed, opened.tokenizer, sequences=64, length=length, split=split, seed=seed, spread=spread
    )
    ids = windows.input_ids
    return [{"input_ids": part} for part in ids.split(batch_size)], windows.facts()


def twin_of(model: nn.Module) -> nn.Module:
    """A second module tree over the same tensors: it stays dense, in no extra memory, while the first is
    factorized."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def print_evaluation(result: Mapping[str, Any], console: Any) -> None:
    """A table of what `evaluate` measured."""
    from rich.table import Table

    rows = {name: result[name] for name in ("dense", "compressed", "measured") if name in result}
    names = {"dense": result.get("against", ""), "compressed": result["model"], "measured": result["model"]}
    table = Table(box=None, pad_edge=False)
    for heading in ("", *(names[row] for row in rows)):
        table.add_column(heading, justify="right" if heading else "left")
    for key in dict.fromkeys(key for row in rows.values() for key in row):
        cells = [row.get(key) for row in rows.values()]
        table.add_row(key.replace("_", " "), *(_cell(cell) for cell in cells))
    console.print(table)
    for warning in result.get("warnings", []):
        console.print(f"[yellow]warning:[/yellow] {warning}")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
    )


def _evaluation(
    opened: Opened, dense: nn.Module, batches: Sequence[Batch], facts: Any, tell: Progress, timed: bool = True
) -> dict[str, Any]:
    if opened.causal:
        windows = torch.cat([batch["input_ids"] for batch in batches if isinstance(batch, Mapping)])
        result = compare(
            dense,
            opened.model,
            windows,
            opened.tokenizer,
            data=facts,
            timing={} if timed else None,
            progress=lambda done, total: tell("evaluate", done, total),
        )
    else:
        rows = {}
        for done, (name, net) in enumerate((("dense", dense), ("compressed", opened.model))):
            tell("evaluate", done, 2)
            rows[name] = {"params": params(net), **_scored(net, batches)}
        tell("evaluate", 2, 2)
        result = {"data": facts, **rows, "warnings": []}
    for row, net in (("dense", dense), ("compressed", opened.model)):
        result[row].setdefault("bytes", sum(p.numel() * p.element_size() for p in net.parameters()))
    return result


def _measure(opened: Opened, batches: Sequence[Batch], batch_size: int, tell: Progress) -> dict[str, Any]:
    net = opened.model
    row: dict[str, Any] = {
        "params": params(net),
        "bytes": sum(p.numel() * p.element_size() for p in net.parameters()),
    }
    if opened.causal:
        windows = torch.cat([batch["input_ids"] for batch in batches if isinstance(batch, Mapping)])
        row["macs_per_token"] = macs_per_token(net, example=windows[:1])
        row["perplexity"] = perplexity(
            net, windows, batch_size=batch_size, progress=lambda done, total: tell("evaluate", done, total)
        )
        timing = latency({"model": net})["rows"][0]
        row |= {key: timing[key] for key in ("prefill_ms", "decode_ms_per_token", "decode_tokens_per_s")}
    else:
        row |= _scored(net, batches)
    if Path(opened.name).is_dir():
        row["bytes_on_disk"] = bytes_on_disk(opened.name)["payload"]
    return row


def _scored(net: nn.Module, batches: Sequence[Batch]) -> dict[str, Any]:
    labelled = [batch for batch in batches if isinstance(batch, Mapping) and "labels" in batch]
    return accuracy(net, labelled) if labelled else {}


def _measure_disk(report: Report, folder: Path) -> None:
    """Replace what tensors promise by what the files hold."""
    payload = bytes_on_disk(folder)["payload"]
    report.totals["disk_after"] = payload
    if report.evaluation:
        report.evaluation["compressed"]["bytes_on_disk"] = payload
        report.evaluation["dense"]["bytes_on_disk"] = report.totals["model_before"]
