"""A report, or the difference of two, on a terminal.

Every name and text goes through `Text(clean(...))`: markup and escape codes in a layer's name stay text.
"""

from __future__ import annotations

import io
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from rankfold import report_adapters as adapters
from rankfold import report_facts as facts
from rankfold import report_healing as healings
from rankfold import report_training as trainings
from rankfold.report import Report
from rankfold.report_format import DASH, clean, number, percent, seconds, shape, size

_VERDICT = {"better": "green", "worse": "red", "": ""}


def show(item: RenderableType, console: Console | None = None) -> None:
    (console or Console()).print(item)


def plain(item: RenderableType, width: int | None = None) -> str:
    """Without colour, `width` columns (100 by default), no spaces at the ends of lines."""
    console = Console(file=io.StringIO(), width=width or 100, color_system=None, legacy_windows=False)
    console.print(item)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip("\n") + "\n"


def _text(value: Any, style: str = "") -> Text:
    return Text(clean(value), style=style)


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(
        title=Text(title, style="bold"),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
        collapse_padding=True,
    )
    for i, name in enumerate(columns):
        table.add_column(
            name,
            justify="left" if i < left else "right",
            no_wrap=i >= left,
            min_width=18 if i < left and name in ("layer", "type") else None,
            overflow="fold" if i < left else "ellipsis",
        )
    return table


def _size(row: Any) -> str:
    return "dense" if row.dense else f"{clean(row.structure)} {row.size}"


def _head(report: Report) -> Text:
    kept = facts.fraction(facts.total(report, "model", "after"), facts.total(report, "model", "before"))
    sizes = [[size(facts.total(report, k, s)) for s in ("before", "after")] for k in ("selected", "model")]
    unit = facts.unit(report)
    name = Text.assemble(
        (facts.model_name(report), "bold"),
        f" · {facts.recipe_name(report)} · {report.dtype or 'dtype not recorded'}\n",
    )
    if facts.kind(report) == "adapter":
        return Text.assemble(name, f"Whole model: {sizes[1][0]} → {sizes[1][1]}\n{facts.speed(report)[0]}")
    word = "" if facts.kind(report) == "dense" else " kept"
    return Text.assemble(
        name,
        f"Selected layers: {sizes[0][0]} → {sizes[0][1]}, ",
        (f"{percent(report.reached)} of their {unit}{word}", "bold"),
        f" (asked {percent(report.budget)})\n" if facts.kind(report) == "compressed" else "\n",
        f"Whole model: {sizes[1][0]} → {sizes[1][1]}, ",
        (f"{percent(kept)} of the bytes{word}", "bold"),
        f"\n{facts.speed(report)[0]}",
    )


def _training(report: Report) -> Text:
    parts = [Text.assemble((f"{label}: ", "bold"), words) for label, words in trainings.lines(report)]
    if held := trainings.sampled(report):
        said = ", ".join(f"{number(loss)} ({number(step)})" for step, loss in held)
        parts.append(Text.assemble(("Validation loss (step): ", "bold"), said))
    return Text("\n").join([Text("Training", style="bold"), *parts])


def _said(title: str, lines: list[tuple[str, str]]) -> Text:
    said = [Text.assemble((f"{label}: ", "bold"), clean(words)) for label, words in lines]
    return Text("\n").join([Text(title, style="bold"), *said])


def _before_after(report: Report) -> Table:
    title = "Beside the dense model" if report.training else "Before and after"
    table = _table(title, "", *facts.sides(report), "change")
    for line in facts.before_after(report):
        table.add_row(line.label, line.before, line.after, Text(line.change, style=_VERDICT[line.verdict]))
    return table


def _types(report: Report) -> Table:
    table = _table("By type", "type", "layers", "sizes", "before", "after", facts.kept(report), "loss share")
    for label, rows in facts.by_type(report):
        sizes = sorted({row.size for row in rows if isinstance(row.size, int)})
        before, after = sum(r.bytes_before for r in rows), sum(r.bytes_after for r in rows)
        dense = sum(row.dense for row in rows)
        words = [f"{sizes[0]}{DASH}{sizes[-1]}" if len(sizes) > 1 else str(sizes[0])] if sizes else []
        words += [f"{dense} dense"] if dense else []
        share = sum(row.loss_share for row in rows)
        table.add_row(
            _text(label),
            str(len(rows)),
            ", ".join(words) or DASH,
            size(before),
            size(after),
            percent(facts.fraction(after, before)),
            percent(share),
        )
    return table


def _layers(report: Report) -> Table:
    start = facts.prefix(report.layers)
    kinds = {row.structure for row in report.layers if not row.dense}
    kind = kinds.pop() if len(kinds) == 1 else ""  # said once in the title, to leave room for the names
    title = (
        "Layers"
        + (f" as {clean(kind)}" if kind else "")
        + (f"; names begin with {clean(start)}" if start else "")
    )
    table = _table(title, "layer", "shape", "size", "bytes", facts.kept(report), "error", "of loss")
    for row in report.layers:
        cells = (
            shape(row.shape).replace(" ", ""),
            _size(row).removeprefix(f"{kind} ") if kind else _size(row),
            f"{size(row.bytes_before)} → {size(row.bytes_after)}" if not row.dense else size(row.bytes_after),
            percent(row.kept, 0),
            percent(row.relative_error),
            percent(row.loss_share),
        )
        table.add_row(_text(row.name.removeprefix(start)), *(_text(cell) for cell in cells))
    return table


def _left(report: Report) -> Table:
    table = _table(facts.left(report), "why", "count", "bytes", "for example")
    table.columns[3].justify, table.columns[3].overflow, table.columns[3].no_wrap = "left", "fold", False
    for reason, rows in facts.left_dense(report):
        weight = sum(getattr(r, "bytes_after", None) or getattr(r, "bytes", 0) for r in rows)
        table.add_row(_text(reason), str(len(rows)), size(weight), _text(rows[0].name))
    return table


def _foot(report: Report) -> Text:
    data = report.data or {}
    total = sum(value for value in report.timings.values() if isinstance(value, int | float))
    times = ", ".join(f"{clean(key)} {seconds(value)}" for key, value in report.timings.items())
    lines = [f"Allocation: {facts.gap(report)}"] if facts.kind(report) == "compressed" else []
    if times:
        lines.append(f"Time: {times} (together {seconds(total)})")
    if data:
        lines.append(
            ("Data: " if report.training else "Calibration data: ")
            + ", ".join(f"{clean(k)} {clean(v)}" for k, v in data.items())
        )
    lines.append(
        f"Seed: {DASH if report.seed is None else report.seed}; weights {clean(report.weights_hash) or DASH}"
    )
    if report.versions:
        lines.append("Versions: " + ", ".join(f"{clean(k)} {clean(v)}" for k, v in report.versions.items()))
    return Text("\n".join(lines))


def render(report: Report, layers: bool = True) -> Group:
    """The whole report; `layers=False` leaves the per-layer table out."""
    parts: list[RenderableType] = [_head(report), Text("")]
    parts += [Text(f"Warning: {text}", style="yellow") for text in facts.alarms(report)]
    if len(parts) > 2:
        parts.append(Text(""))
    if report.training:
        parts += [_training(report), Text("")]
    if report.healing:
        parts += [_said("Healing", healings.lines(report)), Text("")]
    if facts.kind(report) == "adapter":
        parts += [_said("Adapters", adapters.lines(report)), Text("")]
    parts += [_before_after(report), _types(report)]
    if layers and report.layers:
        parts.append(_layers(report))
    if facts.left_dense(report):
        parts.append(_left(report))
    generation = (report.evaluation or {}).get("generation")
    if isinstance(generation, dict):
        for key in ("prompt", "dense", "compressed"):
            parts.append(Text.assemble((f"{key}: ", "bold"), clean(generation.get(key, DASH))))
        parts.append(Text(""))
    return Group(*parts, _foot(report))


def _show(key: str, value: Any) -> str:
    if isinstance(value, str | dict | list) or value is None:
        return DASH if value is None else clean(value)
    if key in facts.METRICS:
        return facts.METRICS[key][1](value)
    return size(value) if key.startswith(("selected", "model")) else number(value)


def render_diff(a: Report, b: Report) -> Group:
    """What differs between `a` (first column) and `b`."""
    found = facts.differences(a, b)
    parts: list[RenderableType] = []
    for title, pairs in (
        ("Settings", found["settings"]),
        ("Totals", found["totals"]),
        ("Dense model", found["metrics"]["dense"]),
        ("Compressed model", found["metrics"]["compressed"]),
    ):
        pairs = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
        if not pairs:
            continue
        table = _table(title, "", "first", "second", "change", left=3 if title == "Settings" else 1)
        for key, (x, y) in pairs.items():
            ratio = facts.fraction(y, x)
            change = DASH if ratio is None else percent(ratio - 1, sign=True)
            table.add_row(clean(key), _text(_show(key, x)), _text(_show(key, y)), change)
        parts.append(table)
    changed = found["layers"]
    if changed:
        old, new = ({row.name: row for row in report.layers} for report in (a, b))
        start = facts.prefix([*old.values(), *new.values()])
        title = f"Layers that changed ({len(changed)})" + (
            f"; names begin with {clean(start)}" if start else ""
        )
        table = _table(title, "layer", "first", "second", "bytes", "error")
        for item in changed:
            x, y = old.get(item["name"]), new.get(item["name"])
            table.add_row(
                _text(item["name"].removeprefix(start)),
                *(_text(_size(row) if row else "not selected") for row in (x, y)),
                " → ".join(size(row.bytes_after) if row else DASH for row in (x, y)),
                " → ".join(percent(row.relative_error) if row else DASH for row in (x, y)),
            )
        parts.append(table)
    same = found["layers_same"]
    parts.append(Text(f"{same} of {same + len(changed)} layers have the same structure and size."))
    return Group(*parts)
