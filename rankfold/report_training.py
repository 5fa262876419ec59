"""What a report says of a training: the loss curve, the memory of a step, tokens and time.

The facts are those of `Report.training`; here are the lines that text, page and model card share, and the
plot of the page, drawn by hand like its others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rankfold.report import Report
from rankfold.report_facts import kind
from rankfold.report_format import DASH, count, known, number, percent, size
from rankfold.report_plots import escape

_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 628.0, 14.0, 210.0
_RUNGS = 4
_PARTS = ("weights", "gradients", "optimizer", "indices")


def of(report: Report) -> Mapping[str, Any]:
    """The facts of the training; empty where the report is of a compression."""
    return report.training or {}


def title(report: Report, name: str, recipe: str) -> str:
    """What the report is about, in a line."""
    if of(report):
        return f"{name}, trained from scratch with {recipe}"
    if kind(report) == "adapter":
        return f"{name} with adapters, {recipe}"
    if kind(report) == "dense":
        return f"{name}, made dense"
    return f"{name}, {recipe} at {percent(report.budget, 0)}"


def lines(report: Report) -> list[tuple[str, str]]:
    """(label, words) of everything that is one line."""
    facts = of(report)
    settings, memory = _map(facts, "settings"), _map(facts, "memory")
    params = _map(facts, "params")
    found = [
        (
            "Validation perplexity",
            f"{number(facts.get('perplexity'))} (loss {number(facts.get('loss'))} nats)",
        ),
        (
            "Parameters",
            f"{count(params.get('trained'))}, dense {count(params.get('dense'))}"
            + _share(params.get("trained"), params.get("dense")),
        ),
        (
            "Tokens seen",
            f"{count(facts.get('tokens'))} in {number(facts.get('steps'))} steps of "
            f"{number(facts.get('batch'))} windows of {number(facts.get('length'))}; "
            f"{number(facts.get('epochs'))} epochs",
        ),
        ("Speed", f"{count(facts.get('tokens_per_second'))} tokens/s, training and validation together"),
        (
            "Optimizer",
            f"{settings.get('optimizer', DASH)}, lr {number(settings.get('lr'))}, clip "
            f"{number(settings.get('clip'))}, decay {number(settings.get('weight_decay'))}, "
            f"{settings.get('dtype', DASH)}" + (", per layer" if settings.get("per_layer") else ""),
        ),
    ]
    ours, dense = _map(memory, "training"), _map(memory, "dense")
    if ours:
        parts = ", ".join(f"{part} {size(ours.get(part))}" for part in _PARTS)
        found.append(
            (
                "Memory of a step",
                f"{size(ours.get('total'))} ({parts}); dense would hold {size(dense.get('total'))}"
                + _share(ours.get("total"), dense.get("total"))
                + ". Without activations",
            )
        )
    top = _map(memory, "peak")
    if top:
        said = ", ".join(
            f"{size(top[key])} {words}"
            for key, words in (("device", "on the device"), ("resident", "resident, libraries included"))
            if key in top
        )
        found.append(("Peak, measured", said))
    sessions = facts.get("sessions") or []
    if len(sessions) > 1:
        found.append(("Sessions", "resumed after step " + ", ".join(str(step) for step in sessions[1:])))
    return found


def sampled(report: Report, most: int = 8) -> list[tuple[float, float]]:
    """At most so many (step, loss) of validation, evenly spread, the first and the last among them."""
    held = curve(report, "validation")
    return held if len(held) <= most else [held[i * (len(held) - 1) // (most - 1)] for i in range(most)]


def curve(report: Report, which: str) -> list[tuple[float, float]]:
    """(step, loss) of "train" or "validation", the finite ones."""
    return points_of(of(report).get(which))


def points_of(points: Any) -> list[tuple[float, float]]:
    """The finite ones of [[step, loss], …]."""
    pairs = [(p[0], p[1]) for p in points or () if isinstance(p, list | tuple) and len(p) == 2]
    return [(step, loss) for step, loss in pairs if known(step) and known(loss) and math.isfinite(loss)]


def section(report: Report) -> str:
    """The part of the page: plot and table."""
    return drawn("Training", lines(report), of(report).get("train"), of(report).get("validation"))


def drawn(title: str, lines: Sequence[tuple[str, str]], train: Any, held: Any, *, unit: str = "token") -> str:
    """A section of the page: the losses [[step, loss], …], in nats per `unit`, over the (label, words)."""
    rows = "".join(
        f'<tr><th scope="row">{escape(label)}</th><td class="left wrap">{escape(words)}</td></tr>'
        for label, words in lines
    )
    figure = plot(points_of(train), points_of(held), unit=unit)
    table = f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'
    return f"<section>\n<h2>{title}</h2>\n{figure}\n{table}\n</section>"


def plot(
    train: Sequence[tuple[float, float]], held: Sequence[tuple[float, float]], *, unit: str = "token"
) -> str:
    """Loss in nats per `unit` against steps: training as a line, validation as a line with marks; "" where
    there is neither."""
    points = [*train, *held]
    if len(points) < 2:
        return ""
    last = max(step for step, _ in points)
    values = [loss for _, loss in points]
    low = math.floor(min(values) * 2) / 2
    rung = max(1, math.ceil((max(values) - low) * 2 / _RUNGS)) / 2  # of the scale, in halves
    high = low + _RUNGS * rung

    def place(step: float, loss: float) -> tuple[float, float]:
        return (
            _LEFT + (_RIGHT - _LEFT) * step / max(last, 1),
            _BOTTOM - (_BOTTOM - _TOP) * (loss - low) / (high - low),
        )

    parts = []
    for i in range(_RUNGS + 1):
        value = low + rung * i
        y = place(0, value)[1]
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{value:.3g}", "end"))
    for i in range(3):
        anchor = ("start", "middle", "end")[i]
        parts.append(_text(_LEFT + (_RIGHT - _LEFT) * i / 2, _BOTTOM + 16, f"{last * i / 2:.0f}", anchor))
    parts.append(_line([place(*point) for point in train], "var(--soft)"))
    marks = [place(*point) for point in held]
    parts.append(_line(marks, "var(--accent)"))
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="var(--accent)"/>' for x, y in marks[:60]]
    legend = (
        '<div class="legend"><span><i class="key" style="background:var(--soft)"></i>training</span>'
        '<span><i class="key" style="background:var(--accent)"></i>validation</span></div>'
    )
    return (
        f'<figure>{legend}<svg viewBox="0 0 640 232" role="img" aria-label="Loss against steps" '
        f'style="width:100%;max-width:46rem">{"".join(parts)}</svg>'
        f"<figcaption>Loss in nats per {escape(unit)} against steps of the optimizer. Training: the batch of "
        "a step, or means of several.</figcaption></figure>"
    )


def _line(points: Sequence[tuple[float, float]], colour: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _map(facts: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = facts.get(key)
    return found if isinstance(found, Mapping) else {}


def _share(part: Any, whole: Any) -> str:
    return f" ({percent(part / whole)})" if known(part) and known(whole) and whole else ""
