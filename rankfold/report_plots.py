"""The bars and the heat map of a report page, in plain HTML.

Drawn by hand rather than by a plotting library: text stays text at its own size on a phone, colours follow
the page's theme, and a page of 500 layers stays small. Every function returns markup, all strings escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from rankfold import report_facts as facts
from rankfold.report import LayerRow, Report
from rankfold.report_format import DASH, clean, known, percent, seconds, shape, size

_LOW, _HIGH = (0xE3, 0xEE, 0xFB), (0x12, 0x3F, 0x8C)  # little kept, all kept
_WIDE = 40  # blocks that fit side by side on a desktop
_MOST_BARS = 14


def escape(value: object) -> str:
    """Text from anywhere as HTML text or attribute value."""
    return html.escape(clean(value), quote=True)


def name(dotted: str, most: int = 0) -> str:
    """A layer's name that may break after its dots; beyond `most` characters only its end, whole on hover."""
    if most and len(dotted) > most:
        return f'<span title="{escape(dotted)}">…{name(dotted[-most:])}</span>'
    return escape(dotted).replace(".", ".<wbr>")


def _colour(fraction: float, floor: float) -> tuple[str, str]:
    """Background for a kept fraction in [floor, 1], and the text colour that can be read on it."""
    t = min(1.0, max(0.0, (fraction - floor) / max(1 - floor, 1e-9)))
    rgb = [round(a + (b - a) * t) for a, b in zip(_LOW, _HIGH, strict=True)]
    # Relative luminance (WCAG 2): from 0.18 on, dark ink has the higher contrast, and it is always above 4.5.
    linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#" + "".join(f"{c:02x}" for c in rgb), "#080d16" if light > 0.18 else "#fff"


def bar(label: str, before: float, after: float, most: float, text: str) -> str:
    """A labelled pair of bars, both to the scale of `most`."""
    width = [max(0.0, min(100.0, 100 * x / most)) if most else 0.0 for x in (before, after)]
    return (
        f'<div class="bar"><p><span>{name(label, 80)}</span><span>{escape(text)}</span></p>'
        f'<div class="track"><u style="width:{width[0]:.2f}%"><i style="width:{_inside(width):.2f}%"></i></u>'
        "</div></div>"
    )


def _inside(width: Sequence[float]) -> float:
    return min(100.0, 100 * width[1] / width[0]) if width[0] else 0.0


def bytes_by_type(report: Report) -> str:
    """Bars of the bytes of each group of layers, before and after, and of what was not selected."""
    rows: list[tuple[str, float, float]] = [
        (
            f"{label} ({len(layers)})" if len(layers) > 1 else label,
            sum(r.bytes_before for r in layers),
            sum(r.bytes_after for r in layers),
        )
        for label, layers in facts.by_type(report)
    ]
    if len(rows) > _MOST_BARS:
        rest = rows[_MOST_BARS - 1 :]
        rows = rows[: _MOST_BARS - 1]
        rows.append((f"{len(rest)} other types", sum(r[1] for r in rest), sum(r[2] for r in rest)))
    whole, part = (facts.total(report, key, "before") for key in ("model", "selected"))
    if known(whole) and known(part) and whole > part:
        rows.append(("not selected (embeddings, norms, biases, …)", whole - part, whole - part))
    most = max((before for _, before, _ in rows), default=0)
    bars = (
        bar(
            kind,
            before,
            after,
            most,
            f"{size(before)} → {size(after)}, {percent(facts.fraction(after, before), 0)} kept"
            if before != after
            else f"{size(before)}, unchanged",
        )
        for kind, before, after in rows
    )
    return (
        '<div class="legend"><span><i class="key" style="background:var(--accent)"></i>after</span>'
        '<span><i class="key" style="background:var(--soft)"></i>before</span></div>'
        f'<div class="bars">{"".join(bars)}</div>'
    )


def heat_map(report: Report) -> str:
    """Kept fraction by block and type; layers outside of blocks as bars. A CSS grid: its columns are the
    types on a phone and on paper, the blocks on a desktop."""
    inside = [row for row in report.layers if row.block is not None]
    blocks = sorted({row.block for row in inside if row.block is not None})
    if len(blocks) < 2:
        return _strips(report.layers)
    label = facts.labels(report.layers)
    types = list(dict.fromkeys(label[row.name] for row in inside))
    cells: dict[tuple[int | None, str], list[LayerRow]] = {}
    for row in inside:
        cells.setdefault((row.block, label[row.name]), []).append(row)
    ranks = all(isinstance(row.size, int) for row in inside if not row.dense)
    floor = min((math.floor(10 * row.kept) / 10 for row in inside), default=0.0)
    floor = min(max(floor, 0.0), 0.9)
    grid = ['<span class="corner">block</span>']
    grid += [f'<span class="head" title="{escape(kind)}"><b>{escape(kind)}</b></span>' for kind in types]
    for block in blocks:
        grid.append(f'<span class="block">{block}</span>')
        grid += [_cell(cells.get((block, kind)), floor, ranks) for kind in types]
    wide = " wide" if len(blocks) <= _WIDE else ""
    low, high = (_colour(x, floor)[0] for x in (0.0, 1.0))
    several = (
        " (median, where a cell holds several layers)" if any(len(c) > 1 for c in cells.values()) else ""
    )
    legend = (
        f'<div class="legend"><span><b>{percent(floor, 0)}</b> <i class="key ramp" '
        f'style="background:linear-gradient(90deg,{low},{high})"></i> 100 % of the bytes kept</span>'
        '<span><i class="key full"></i>left dense</span>'
        f"<span>number = {'rank' if ranks else 'percent of the bytes kept'}"
        f"{several}</span></div>"
    )
    outside = [row for row in report.layers if row.block is None]
    rest = f'<h3 style="margin-top:1rem">Outside of the blocks</h3>{_strips(outside)}' if outside else ""
    heat = f'<div class="heat{wide}" style="--types:{len(types)}">{"".join(grid)}</div>'
    return f'{legend}<div class="scroll">{heat}</div>{rest}'


def _cell(rows: list[LayerRow] | None, floor: float, ranks: bool) -> str:
    if not rows:
        return '<span class="gone"></span>'
    small = [row for row in rows if not row.dense]
    which = rows[0].name if len(rows) == 1 else f"{len(rows)} layers, {rows[0].name} …"
    if not small:
        return f'<span class="full" title="{escape(which)}: dense"><span class="hide">dense</span></span>'
    kept = sum(row.bytes_after for row in rows) / max(sum(row.bytes_before for row in rows), 1)
    back, ink = _colour(kept, floor)
    text = str(sorted(row.size for row in small)[len(small) // 2]) if ranks else f"{100 * kept:.0f}"
    sizes = (
        f"{'rank' if ranks else 'size'} {small[0].size}" if len(small) == 1 else f"{len(small)} compressed"
    )
    title = f"{which}: {sizes}, {percent(kept)} of the bytes kept"
    return f'<span style="background:{back};color:{ink}" title="{escape(title)}">{escape(text)}</span>'


def _strips(rows: Sequence[LayerRow]) -> str:
    """One bar a layer, for models without numbered blocks; the heaviest first."""
    shown = sorted(rows, key=lambda row: -row.bytes_before)[: 3 * _MOST_BARS]
    bars = "".join(
        bar(
            row.name,
            1.0,
            row.kept,
            1.0,
            f"{shape(row.shape)}, "
            + ("dense" if row.dense else f"{row.structure} {row.size}, {percent(row.kept, 0)} kept"),
        )
        for row in shown
    )
    more = (
        f'<p class="note">and {len(rows) - len(shown)} smaller layers, in the table below</p>'
        if len(rows) > len(shown)
        else ""
    )
    return f'<div class="bars">{bars}</div>{more}'


def timings(report: Report) -> str:
    """Bars of the seconds of each step."""
    steps = [
        (key, value)
        for key, value in report.timings.items()
        if known(value) and math.isfinite(value) and value >= 0
    ]
    total = sum(value for _, value in steps)
    if not total:
        return f'<p class="note">{DASH} not recorded</p>'
    bars = (
        bar(k, total, v, total, f"{seconds(v)}, {percent(v / total, 0 if v / total > 0.1 else 1)}")
        for k, v in steps
    )
    return f'<div class="bars">{"".join(bars)}</div>'
