"""The report of a pre-training run: the layers as ever, and under `training` what the training was.

The dense side of every number is worked out from the configuration alone, on a model without weights: nobody
trained it, and nothing here says how well it would have done.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from rankfold.hosts import hosts
from rankfold.layers import Layer, select
from rankfold.outcome import row_of, skipped_of, take_, totals_of
from rankfold.pretrain.memory import dense_accounting, peak
from rankfold.pretrain.model import build
from rankfold.provenance import versions, weights_hash
from rankfold.report import Report

POINTS = 400  # of a loss curve in a report


def report_of(
    net: nn.Module,
    built: Report | None,
    recipe: Mapping[str, Any],
    settings: Any,
    config: Any,
    *,
    facts: Mapping[str, Any],
    train: list[list[float]],
    held: list[list[float]],
    memory: Mapping[str, int],
    sessions: list[int],
    session_steps: int,
    seconds: float,
    name: str,
    warnings: Iterable[str] = (),
    found: Mapping[str, Any] | None = None,
) -> Report:
    """The report of a finished run.

    built    that of `factorize_`, where the recipe is one; else the rows are read off the model
    train, held   [step, loss in nats per token] of training and validation
    sessions  the steps done when each session began; `session_steps` in `seconds` were those of the last one
    found    what a regime's `finish_` returned: {layer: rank}
    """
    dense = build(config, 0, "meta")
    layers = select(dense)
    report = built or rows_of(net, dense, layers, recipe)
    entries = [p.numel() for p in dense.parameters()]
    final = held[-1][1] if held else math.nan
    tokens = settings.windows * settings.length
    per_step = settings.windows // settings.steps
    report.recipe = dict(recipe)
    report.data = {key: value for key, value in facts.items() if key != "kind"}
    report.model, report.seed = name, settings.seed
    report.versions, report.weights_hash = versions(), weights_hash(net)
    report.timings |= {"train": seconds}
    report.warnings += list(warnings)
    report.evaluation = None
    epochs = tokens / max(facts["tokens"] // settings.length * settings.length, 1)
    if epochs > 1.5:
        report.warnings.append(
            f"the text has {facts['tokens']:,} tokens, so the run saw it {epochs:.1f} times; the validation "
            "loss, on documents of its own, says whether that helped"
        )
    report.training = {
        "steps": settings.steps,
        "tokens": tokens,
        "epochs": epochs,
        "batch": per_step,
        "length": settings.length,
        "settings": asdict(settings),
        "perplexity": math.exp(final) if final < 700 else math.inf,
        "loss": final,
        "train": thinned(train),
        "validation": held,
        "params": {"dense": sum(entries), "trained": sum(p.numel() for p in net.parameters())},
        "memory": {
            "training": dict(memory),
            "dense": dense_accounting(entries, settings.optimizer, settings.per_layer),
            "peak": peak(),
        },
        "tokens_per_second": session_steps * per_step * settings.length / seconds if session_steps else None,
        "sessions": sessions,
        "ranks": dict(found or {}),
    }
    return report


def thinned(curve: list[list[float]], points: int = POINTS) -> list[list[float]]:
    """A curve [step, loss] of at most so many points: means of equal parts, each at its last step."""
    if len(curve) <= points:
        return curve
    parts = [curve[i * len(curve) // points : (i + 1) * len(curve) // points] for i in range(points)]
    return [[part[-1][0], sum(loss for _, loss in part) / len(part)] for part in parts]


def rows_of(
    net: nn.Module, dense: nn.Module, layers: Mapping[str, Layer], recipe: Mapping[str, Any]
) -> Report:
    """A report read off a trained model, `dense` being its architecture without weights."""
    held, rows = hosts(net), []
    for name, layer in layers.items():
        row = row_of(name, layer.host, layer.shape, layer.tensor.element_size())
        if name in held:
            structure = held[name].weight
            take_(row, structure, getattr(structure, "rank", None))
        else:
            row.note = "stays dense: nothing smaller was trained"
        rows.append(row)
    entries = list(dense.parameters())
    totals = totals_of(
        rows, sum(p.numel() * p.element_size() for p in entries), sum(p.numel() for p in entries)
    )
    return Report(
        recipe=dict(recipe),
        budget=1.0,
        reached=totals["selected_after"] / max(totals["selected_before"], 1),
        layers=rows,
        skipped=skipped_of(dense, layers),
        totals=totals,
        dtype=str(next(net.parameters()).dtype).removeprefix("torch."),
    )
