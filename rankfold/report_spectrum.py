"""The spectrum of a layer with the place where it was cut, as one small SVG.

Singular values of the whitened matrix, relative to the largest, on a logarithmic scale against their index.
What is kept is filled; a dotted line marks the break-even rank, from which a low-rank pair is no smaller than
the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rankfold import report_facts as facts
from rankfold.report import LayerRow, Report
from rankfold.report_format import known, percent, shape, size
from rankfold.report_plots import escape, name

_FLOOR = -5.0  # values below 10^-5 of the largest are drawn there
_LEFT, _RIGHT, _TOP, _BOTTOM = 40.0, 312.0, 22.0, 150.0
_POWERS = {0: "1", -1: "0.1", -2: "0.01", -3: "0.001", -4: "10⁻⁴", -5: "10⁻⁵"}


def representatives(report: Report, most: int = 8) -> list[LayerRow]:
    """Of each of the heaviest types the layer with the largest share of the loss that has a spectrum."""
    best = []
    for _, rows in facts.by_type(report):
        drawable = [row for row in rows if len(_finite(row.spectrum)) > 1 and row.full_rank > 1]
        if drawable:
            best.append(max(drawable, key=lambda row: (not row.dense, row.loss_share)))
    return best[:most]


def spectrum(row: LayerRow) -> str:
    """A figure for one layer of `representatives`: title, plot, caption."""
    values = _finite(row.spectrum)
    top = max(values) or 1.0
    logs = [max(_FLOOR, math.log10(value / top)) if value > 0 else _FLOOR for value in values]
    low = min(-1, math.floor(min(logs)))
    step = (row.full_rank - 1) / (len(values) - 1)
    points = [(_x(1 + i * step, row), _TOP + (_BOTTOM - _TOP) * log / low) for i, log in enumerate(logs)]
    cut = row.full_rank if row.dense else row.size if isinstance(row.size, int) else 0
    kept = max(1, sum(1 + i * step <= cut for i in range(len(points))))
    parts = [_area(points[kept - 1 :], "lost"), _area(points[:kept], "kept") if cut else ""]
    for power in range(low, 1):
        y = _TOP + (_BOTTOM - _TOP) * power / low
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 5, y + 4, _POWERS[power], "end"))
    parts.append(f'<polyline class="curve" points="{_path(points)}"/>')
    parts += [
        _text(_LEFT, _BOTTOM + 15, "1", "middle"),
        _text((_LEFT + _RIGHT) / 2, _BOTTOM + 15, "index of the singular value", "middle"),
        _text(_RIGHT, _BOTTOM + 15, str(row.full_rank), "end"),
    ]
    if cut and not row.dense:
        parts.append(_cut(row, cut))
    label = f"Singular values of {row.name}" + (f", cut at {cut} of {row.full_rank}" if cut else "")
    return (
        f"<figure><h3>{name(row.name, 80)}</h3>"
        f'<svg viewBox="0 0 320 170" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
        f"<figcaption>{escape(_caption(row))}</figcaption></figure>"
    )


def _caption(row: LayerRow) -> str:
    if row.dense:
        return f"{shape(row.shape)}; left dense, {size(row.bytes_after)}"
    return (
        f"{shape(row.shape)}; {percent(row.kept, 0)} of {size(row.bytes_before)} kept; "
        f"error {percent(row.relative_error)}; {percent(row.loss_share)} of the loss"
    )


def _cut(row: LayerRow, cut: int) -> str:
    """The cut and its number, and the break-even rank mn / (m + n) of a low-rank pair."""
    at = _x(cut, row)
    anchor = "start" if at < 120 else "end" if at > 240 else "middle"
    parts = [_vertical("mark", at, _TOP - 4), _text(at, _TOP - 9, f"cut at {cut}", anchor, "cut")]
    if row.structure == "low_rank" and len(row.shape) == 2:
        parts.insert(0, _vertical("even", _x(math.prod(row.shape) / max(sum(row.shape), 1), row), _TOP))
    return "".join(parts)


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if known(value) and math.isfinite(value) and value >= 0]


def _x(index: float, row: LayerRow) -> float:
    return _LEFT + (_RIGHT - _LEFT) * (min(max(index, 1), row.full_rank) - 1) / (row.full_rank - 1)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _area(points: Sequence[tuple[float, float]], kind: str) -> str:
    corners = [(points[0][0], _BOTTOM), *points, (points[-1][0], _BOTTOM)]
    return f'<polygon class="{kind}" points="{_path(corners)}"/>'


def _vertical(kind: str, x: float, top: float) -> str:
    return f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{_BOTTOM}"/>'


def _text(x: float, y: float, words: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'
