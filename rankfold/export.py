"""Train once, deploy at any rank: a trained folder cut to a budget, evaluated, written, verified.

What was trained is the reference here: a report says how far the cut model is from it, in perplexity and in
nats per token, and what the ranks of every layer became.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankfold import data as texts
from rankfold.checkpoint import check_folder
from rankfold.cut import Cut, cut_
from rankfold.factorize import check_weights
from rankfold.hosts import hosts
from rankfold.inputs import read_batches
from rankfold.journey import evaluate_into, twin_of, write
from rankfold.judge import Bars
from rankfold.loading import Opened, open_model
from rankfold.manifest import recipe_of
from rankfold.outcome import row_of, take_, totals_of
from rankfold.provenance import versions, weights_hash
from rankfold.report import Report, SkippedRow


def export(
    model: str,
    out: str,
    *,
    budget: float,
    unit: str = "nbytes",
    order: str = "prefix",
    calib: str | None = None,
    data: str | None = None,
    batch_size: int = 4,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
    check: bool = True,
    overwrite: bool = False,
    progress: Bars,
) -> tuple[Report, Path]:
    """Cut MODEL and write OUT. Raises ValueError for bad arguments, and as `cut_` does.

    calib  training text: the ranks are then chosen by what each costs the loss; None: by energy
    data   text to evaluate on, before and after; None: no evaluation
    """
    folder = check_folder(out, overwrite)
    for spec in (calib, data):
        if spec is not None:
            texts.Spec.parse(spec)
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    opened = open_model(model, dtype=dtype, device=device)
    seconds["load"] = time.perf_counter() - began
    net = opened.model
    check_weights(net)
    batches, facts = read_batches(opened, calib, batch_size, seed, False) if calib else (None, None)
    held, held_facts = read_batches(opened, data, 4, 0, False, spread="even") if data else (None, None)
    before, was = weights_hash(net), {name: _structure(host) for name, host in hosts(net).items()}
    parameters = sum(p.numel() for p in net.parameters())
    size = sum(p.numel() * p.element_size() for p in net.parameters())
    twin = twin_of(net) if held is not None else None
    with progress() as tell:
        began = time.perf_counter()
        done = cut_(net, budget=budget, batches=batches, unit=unit, order=order, seed=seed, progress=tell)
        seconds["cut"] = time.perf_counter() - began
        report = _report(opened, done, was, parameters, size, budget, order, calib is not None)
        report.data, report.seed, report.weights_hash = facts, seed, before
        report.timings, report.versions = seconds, versions()
        if twin is not None and held is not None:
            found = evaluate_into(report, opened, twin, held, held_facts, tell)
            found["data"] = {**(held_facts or {}), "before": "the model as trained, uncut"}
            found["dense"]["bytes_on_disk"] = size
        example = next(iter(held or batches or []), None)
        write(net, folder, report, opened.reader, example, check=check, overwrite=overwrite, tell=tell)
    return report, folder


def _structure(host: Any) -> dict[str, Any]:
    weight = host.weight
    return {
        "rank": getattr(weight, "rank", None),
        "kind": weight.kind,
        "shape": tuple(weight.shape),
        "nbytes": weight.nbytes,
        "params": weight.params,
        "host": type(host).__name__,
    }


def _report(
    opened: Opened,
    done: Cut,
    was: Mapping[str, Mapping[str, Any]],
    parameters: int,
    size: int,
    budget: float,
    order: str,
    calibrated: bool,
) -> Report:
    """Rows of the layers that were cut: from ordinary ones, which the budget counts from, to what they are.
    Their notes say what they were in the trained model."""
    net, rows = opened.model, []
    now = hosts(net)
    for name, rank in done.ranks.items():
        old = was[name]
        width = next(p.element_size() for p in net.get_submodule(name).parameters())
        row = row_of(name, old["host"], old["shape"], width)
        if name in now:
            take_(row, now[name].weight, rank)
        row.note = f"trained at rank {old['rank']}" if rank is not None else "ordinary, which is smaller"
        rows.append(row)
    stored = sum(was[row.name]["nbytes"] for row in rows)
    held = sum(was[row.name]["params"] for row in rows)
    return Report(
        recipe={"name": "export", "order": order, "trained": dict(recipe_of(net) or {})},
        budget=budget,
        reached=done.kept,
        unit=done.unit,
        model=opened.name,
        layers=rows,
        skipped=[
            SkippedRow(
                name=name, shape=tuple(p.shape), bytes=p.numel() * p.element_size(), reason="not low-rank"
            )
            for name, p in net.named_parameters()
            if p.dim() >= 2 and not any(name.startswith(f"{row.name}.") for row in rows)
        ],
        totals=totals_of(
            rows,
            size - stored + sum(row.bytes_before for row in rows),
            parameters - held + sum(row.params_before for row in rows),
        ),
        allocation={"allocator": "lagrangian" if calibrated else "energy", "error": done.error},
        dtype=str(next(net.parameters()).dtype).removeprefix("torch."),
    )
