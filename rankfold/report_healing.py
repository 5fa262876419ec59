"""What a report says of a healing: how near the original, what it cost. The facts are `Report.healing`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rankfold import report_training as trainings
from rankfold.report import Report
from rankfold.report_format import DASH, count, known, number, percent, seconds, size


def of(report: Report) -> Mapping[str, Any]:
    """The facts of the healing; empty where there was none."""
    return report.healing or {}


def lines(report: Report) -> list[tuple[str, str]]:
    """(label, words) of everything that is one line."""
    facts = of(report)
    if not facts:
        return []
    kl, settings, memory = _map(facts, "kl"), _map(facts, "settings"), _map(facts, "memory")
    if facts.get("kept_step"):
        verdict = f"{number(kl.get('before'))} → {number(kl.get('after'))} nats a token"
    else:
        verdict = f"{number(kl.get('before'))} nats a token was not lowered: the model is as it was given"
    found = [
        ("Healed", f"by distillation from {facts.get('original', DASH)}; structure and bytes as they were"),
        ("Held-out KL", verdict),
        *(
            (
                f"Perplexity, {name}",
                f"{number(row.get('before'))} → {number(row.get('after'))}, dense {number(row.get('dense'))}"
                + _closed(row),
            )
            for name, row in _map(facts, "perplexity").items()
            if isinstance(row, Mapping)
        ),
        (
            "Trained",
            f"{count(facts.get('trained'))} numbers on {count(facts.get('tokens'))} tokens in "
            f"{number(facts.get('steps'))} steps; the state of step {number(facts.get('kept_step'))} is kept",
        ),
        (
            "Optimizer",
            f"{settings.get('optimizer', DASH)}, lr {number(settings.get('lr'))}, clip "
            f"{number(settings.get('clip'))}, {settings.get('dtype', DASH)}",
        ),
        (
            "Speed",
            f"{count(facts.get('tokens_per_second'))} tokens/s, validation included; "
            f"{seconds(facts.get('seconds'))}",
        ),
    ]
    if training := _map(memory, "training"):
        peak = _map(memory, "peak")
        found.append(
            (
                "Memory of a step",
                f"{size(training.get('total'))} without activations and the original; peak "
                f"{size(peak.get('device', peak.get('resident')))}",
            )
        )
    sessions = facts.get("sessions") or []
    if len(sessions) > 1:
        found.append(("Sessions", "resumed after step " + ", ".join(str(step) for step in sessions[1:])))
    return found


def closed(row: Mapping[str, Any]) -> float:
    """The share of the gap in perplexity between the dense model and the one given that healing closed; NaN
    where there is no gap."""
    dense, before, after = (row.get(key) for key in ("dense", "before", "after"))
    if not (known(dense) and known(before) and known(after)) or not dense < before < math.inf:
        return math.nan
    return (before - after) / (before - dense)


def section(report: Report) -> str:
    """The part of the page: plot and table."""
    facts = of(report)
    return trainings.drawn("Healing", lines(report), facts.get("train"), facts.get("held")) if facts else ""


def _closed(row: Mapping[str, Any]) -> str:
    share = closed(row)
    return f": {percent(share)} of the gap closed" if math.isfinite(share) else ""


def _map(facts: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = facts.get(key)
    return found if isinstance(found, Mapping) else {}
