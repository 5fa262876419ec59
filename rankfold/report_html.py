"""A report as one page that an engineer can send to a colleague: one file, nothing loaded from anywhere.

The order is that of the questions: what was done, what it cost and saved, where the bytes went, which layers
pay, what the model says now, what was left alone, how to repeat it. Names and texts in a report come from
elsewhere, so every string is escaped, and a content security policy forbids the page to load anything or to
run any script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from rankfold import report_adapters as adapters
from rankfold import report_facts as facts
from rankfold import report_healing as healings
from rankfold import report_training as trainings
from rankfold.report import Report
from rankfold.report_format import DASH, known, number, percent, shape, size
from rankfold.report_plots import bytes_by_type, escape, heat_map, name, timings
from rankfold.report_spectrum import representatives, spectrum
from rankfold.report_style import CSS, SCRIPT

_LEFT: dict[str, str] = dict.fromkeys(("structure", "note"), ' class="left"')  # headings of columns of words
_OPEN_ROWS = 40  # a longer table of layers starts folded


def page(report: Report) -> str:
    """The whole document. Every section that has no facts is left out or says so."""
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script}'"
    title = trainings.title(report, facts.model_name(report), facts.recipe_name(report))
    sections = (
        _head,
        _warnings,
        _training,
        healings.section,
        adapters.section,
        _summary,
        _ranks,
        _spectra,
        _samples,
        _layers,
        _left,
        _work,
        _origin,
    )
    body = "\n".join(part for section in sections if (part := section(report)))
    version = escape(f"rankfold {report.versions.get('rankfold', '')}".strip())
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n{body}\n"
        f"<footer>Written by {version}. 1 MB = 10⁶ bytes.</footer>\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _section(title: str, *parts: str) -> str:
    return (
        f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(part for part in parts if part) + "\n</section>"
    )


def _tile(what: str, value: str, detail: str, verdict: str = "") -> str:
    kind = {"better": ' class="good"', "worse": ' class="bad"'}.get(verdict, "")
    return (
        f'<div class="tile"><span class="what">{escape(what)}</span><b{kind}>{escape(value)}</b>'
        f"<span>{escape(detail)}</span></div>"
    )


def _count(n: int, thing: str) -> str:
    return f"{n} {thing}{'' if n == 1 else 's'}"


def _head(report: Report) -> str:
    before, after = facts.total(report, "selected", "before"), facts.total(report, "selected", "after")
    what = facts.kind(report)
    asked = what == "compressed"
    tiles = [
        _tile("Adapters", f"on {adapters.places(report)}", f"{adapters.trained(report)} train")
        if what == "adapter"
        else _tile(
            "Selected layers",
            f"{percent(report.reached)} {facts.kept(report)}",
            f"{size(before)} → {size(after)}"
            + (f"; asked: {percent(report.budget)} of their {facts.unit(report)}" if asked else ""),
        )
    ]
    before, after = facts.total(report, "model", "before"), facts.total(report, "model", "after")
    kept = facts.fraction(after, before)
    if kept is not None:
        said = f"{percent(kept)} {facts.kept(report)}"
        tiles.append(_tile("Whole model", said, f"{size(before)} → {size(after)}"))
    if report.training:
        detail = "on documents held out (lower is better)"
        tiles.append(_tile("Validation perplexity", number(report.training.get("perplexity")), detail))
    lines = {line.key: line for line in facts.before_after(report)}
    if found := lines.get("perplexity"):
        kl = lines.get("kl")
        detail = f"{found.change} (lower is better)" + (f"; KL to dense {kl.after} nats/token" if kl else "")
        tiles.append(_tile("Perplexity", f"{found.before} → {found.after}", detail, found.verdict))
    if found := lines.get("accuracy"):
        tiles.append(_tile("Accuracy", f"{found.before} → {found.after}", found.change, found.verdict))
    sentence, verdict = facts.speed(report)
    if found := lines.get("decode_ms_per_token") or lines.get("prefill_ms"):
        tiles.append(_tile(found.label, f"{found.before} → {found.after}", f"{found.change}", found.verdict))
    known_quality = report.evaluation or report.training
    quality = "" if known_quality else " Quality was not measured: there is no evaluation."
    dtype = f" in {report.dtype}" if report.dtype else ""
    small = sum(not row.dense for row in report.layers)
    made = {"adapter": "Adapted", "pretrained": "Trained from scratch"}.get(what, "Compressed")
    lead = (
        f"Made dense{escape(dtype)}: {_count(len(report.layers), 'layer')}."
        if what == "dense"
        else f"{made} with <strong>{escape(facts.recipe_name(report))}</strong>{escape(dtype)}: "
        f"{small} of {_count(len(report.layers), 'selected layer')} "
        f"{'adapted' if what == 'adapter' else 'factorized'}."
    )
    title = escape(facts.model_name(report)).replace("/", "/<wbr>")  # a hub name breaks after its owner
    kind = {"better": ' class="good"', "worse": ' class="bad"'}.get(verdict, "")
    return (
        f'<header>\n<h1>{title}</h1>\n<p class="lead">{lead}</p>\n'
        f'<div class="tiles">{"".join(tiles)}</div>\n'
        f"<p><strong{kind}>{escape(sentence)}</strong>{quality}</p>\n</header>"
    )


def _training(report: Report) -> str:
    return trainings.section(report) if report.training else ""


def _warnings(report: Report) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in facts.alarms(report))
    return (
        f'<div class="warnings" role="note"><strong>Warnings</strong><ul>{items}</ul></div>' if items else ""
    )


def _table(head: Iterable[str], rows: Iterable[str], kind: str = "") -> str:
    cells = "".join(f'<th scope="col"{_LEFT.get(text, "")}>{escape(text)}</th>' for text in head)
    return (
        f'<div class="scroll"><table{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>'
        f"<thead><tr>{cells}</tr></thead>\n<tbody>\n{chr(10).join(rows)}\n</tbody></table></div>"
    )


def _before_after(report: Report) -> str:
    rows = []
    for line in facts.before_after(report):
        kind = {"better": ' class="good"', "worse": ' class="bad"'}.get(line.verdict, "")
        rows.append(
            f'<tr><th scope="row">{escape(line.label)}</th><td>{escape(line.before)}</td>'
            f"<td>{escape(line.after)}</td><td{kind}>{escape(line.change)}</td></tr>"
        )
    head = ("", "dense", "as trained", "change") if report.training else ("", "before", "after", "change")
    data = (report.evaluation or {}).get("data")
    note = (
        f'<p class="note">Evaluated on: {escape(_pairs(data))}.</p>'
        if isinstance(data, Mapping) and data
        else ""
    )
    title = "Beside the dense model" if report.training else "Before and after"
    return _section(title, _table(head, rows, "facts"), note)


def _pairs(data: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in data.items())


def _bytes(report: Report) -> str:
    shown = report.layers and facts.kind(report) in ("compressed", "pretrained")
    return _section("Where the bytes went", bytes_by_type(report)) if shown else ""


def _summary(report: Report) -> str:
    return f'<div class="two">{_before_after(report)}{_bytes(report)}</div>'


def _ranks(report: Report) -> str:
    shown = report.layers and facts.kind(report) in ("compressed", "pretrained")
    return _section("What each layer kept", heat_map(report)) if shown else ""


def _spectra(report: Report) -> str:
    rows = representatives(report)
    if not rows:
        return ""
    legend = (
        '<p class="note">Singular values of the whitened weight, relative to the largest. '
        "Shown is one layer of each type: the one with the largest share of the loss. Filled: kept. "
        "Dotted: the break-even rank, from which "
        "factors are no smaller than the matrix.</p>"
    )
    return _section(
        "Spectra and cuts", legend, f'<div class="small">{"".join(spectrum(row) for row in rows)}</div>'
    )


def _samples(report: Report) -> str:
    found = (report.evaluation or {}).get("generation")
    if not isinstance(found, Mapping):
        return ""
    parts = []
    for side in ("dense", "compressed"):
        rate = found.get(f"repetition_{side}")
        rate = f", repeated 4-grams {percent(rate, 0)}" if known(rate) else ""
        parts.append(f'<div><h3>{side}{rate}</h3><pre dir="auto">{escape(found.get(side, DASH))}</pre></div>')
    prompt = f'<pre dir="auto">{escape(found.get("prompt", DASH))}</pre>'
    return _section(
        "What it says",
        "<h3>prompt</h3>",
        prompt,
        f'<div class="pair" style="margin-top:.8rem">{"".join(parts)}</div>',
    )


def _layers(report: Report) -> str:
    start = facts.prefix(report.layers)
    rows = []
    for row in report.layers:
        numbers = (
            (row.bytes_before, size(row.bytes_before)),
            (row.bytes_after, size(row.bytes_after)),
            (row.kept, percent(row.kept)),
            (row.relative_error, percent(row.relative_error, 2)),
            (row.loss_share, percent(row.loss_share, 2)),
        )
        chosen = DASH if row.dense else f"{row.size}"
        text = escape(chosen)
        rows.append(
            f'<tr><th scope="row">{name(row.name.removeprefix(start))}</th><td>{shape(row.shape)}</td>'
            f'<td class="left">{escape(row.structure)}</td><td data-v="{text}">{text}</td>'
            + "".join(f'<td data-v="{value}">{shown}</td>' for value, shown in numbers)
            + f'<td class="left wrap">{escape(row.note)}</td></tr>'
        )
    if not rows:
        return ""
    head = ("layer", "shape", "structure", "size", "before", "after", facts.kept(report), "error")
    head += ("of loss", "note")
    if not any(row.note for row in report.layers):
        head, rows = head[:-1], [row.replace('<td class="left wrap"></td>', "") for row in rows]
    names = f"Names are relative to <code>{name(start[:-1])}</code>. " if start else ""
    note = (
        f'<p class="note">{names}Error: relative, in the recipe\'s metric, after the cast. Of loss: this '
        "layer's part of the summed error.</p>"
    )
    opened = " open" if len(rows) <= _OPEN_ROWS else ""
    summary = f"<summary>{_count(len(rows), 'layer')}</summary>"
    table = _table(head, rows, "layers sortable")
    return _section("Layer by layer", f'<details class="print"{opened}>{summary}{note}{table}</details>')


def _left(report: Report) -> str:
    parts = []
    for reason, rows in facts.left_dense(report):
        weight = sum(getattr(row, "bytes_after", None) or getattr(row, "bytes", 0) for row in rows)
        names = "<br>".join(f"<code>{name(row.name)}</code> {shape(row.shape)}" for row in rows)
        opened = " open" if len(rows) <= 3 else ""
        head = f"{escape(reason)}: {_count(len(rows), 'tensor')}, {size(weight)}"
        parts.append(f'<details{opened}><summary>{head}</summary><p class="note">{names}</p></details>')
    return _section(facts.left(report), *parts) if parts else ""


def _work(report: Report) -> str:
    """The allocation and the time it all took."""
    a = report.allocation
    cost = f" It spent {number(a.get('cost'))} of {number(a.get('budget'))} {facts.unit(report)}."
    allocation = (
        _section("How good is the allocation?", f"<p>{escape(facts.gap(report) + cost)}</p>")
        if a and facts.kind(report) == "compressed"
        else ""
    )
    return f'<div class="two">{_section("Time", timings(report))}{allocation}</div>'


def _origin(report: Report) -> str:
    rows: list[tuple[str, Any]] = [
        ("seed", report.seed),
        ("weights", report.weights_hash),
        ("dtype", report.dtype),
    ]
    which = "data" if report.training else "calibration data"
    rows += [(f"{which}: {key}", value) for key, value in (report.data or {}).items()]
    rows += list(report.versions.items())
    lines = [
        f'<tr><th scope="row">{escape(key)}</th><td class="left wrap">{escape(value)}</td></tr>'
        for key, value in rows
        if value not in (None, "")
    ]
    recipe = json.dumps(report.to_json()["recipe"], indent=2, ensure_ascii=False)
    table = f'<div class="scroll"><table><tbody>{"".join(lines)}</tbody></table></div>' if lines else ""
    return _section("To repeat it", f'<div class="pair"><div><pre>{escape(recipe)}</pre></div>{table}</div>')
