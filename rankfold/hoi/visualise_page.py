"""Predicted interactions as one page that can be sent: pictures, what is annotated, scores and confusions.

One file, nothing loaded from anywhere, no script but the one that sorts tables. What a picture shows stands
below it as a table, so that nothing depends on seeing it. Names come from elsewhere: all are escaped.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from rankfold.hoi.annotations import Scene
from rankfold.hoi.classes import ClassTable
from rankfold.hoi.confusion import NOTHING
from rankfold.hoi.evaluation import Predicted, matches
from rankfold.hoi.scores import Scores
from rankfold.hoi.splits import Split
from rankfold.hoi.visualise import draw, pairs_of, phrase
from rankfold.report_format import DASH, percent
from rankfold.report_plots import escape
from rankfold.report_style import CSS as REPORT_CSS
from rankfold.report_style import SCRIPT

SIDES = (520, 640)  # of the longer side of a picture on the page
_CONFUSIONS = 30  # rows of their table

CSS = """
article{border-top:1px solid var(--line);padding:1rem 0 .6rem;min-width:0}
article h2{border:0;margin:0 0 .5rem;padding:0;font-size:1.05rem;overflow-wrap:anywhere}
article h2 small{font-size:.875rem;font-weight:400;color:var(--muted);margin-left:.4rem}
img{display:block;max-width:100%;height:auto;border-radius:.3rem}
.line{display:inline-block;width:2rem;height:0;border-top:3px solid #0072b2}
.line.object{border-top:3px dashed #e69f00}
"""


@dataclass(frozen=True, eq=False)
class Shown:
    """An image, what was predicted in it, and what is annotated, if that is known."""

    image: Image.Image
    predicted: Predicted
    truth: Scene | None = None


def page(
    shown: Iterable[Shown],
    table: ClassTable,
    *,
    title: str,
    facts: Mapping[str, Any] | None = None,
    scores: Scores | None = None,
    split: Split | None = None,
    confused: Counter[tuple[int, int]] | None = None,
    top: int = 10,
    least: float = 0.0,
) -> str:
    """The whole document. Pictures are drawn as by `draw`, and take about 0.1 MB each.

    shown     images in the order of the page; may be a generator, so that one is open at a time
    scores    of the whole evaluation; `confused` what `confusion.confusions` counted
    split     whose unseen interactions are marked
    facts     name: value, shown as a table at the end (model, data, command, versions)
    """
    unseen = frozenset(split.unseen if split else ())
    articles = [_article(i, one, table, unseen, top, least) for i, one in enumerate(shown, 1)]
    parts = [
        _head(title, len(articles), scores),
        _legend() if articles else "",
        *articles,
        _classes(scores, table, unseen) if scores else "",
        _confusions(confused, table) if confused else "",
        _facts(facts or {}),
    ]
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script}'"
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{REPORT_CSS}{CSS}</style>\n</head>\n<body>\n{body}\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _head(title: str, images: int, scores: Scores | None) -> str:
    tiles, notes = "", ""
    if scores:
        for name, value, count in scores.rows():
            detail = f"mAP of {count} interactions" if count else "of unseen and seen"
            tiles += (
                f'<div class="tile"><span class="what">{escape(name)}</span><b>{percent(value, 2)}</b>'
                f"<span>{detail}</span></div>"
            )
        points = "11 points" if scores.points == "11" else "all points"
        notes = f'<p class="note">Average precision of {points}, over {scores.images:,} images. '
        notes += f"{scores.missing} interactions have no annotated pair here and no AP. " * (
            scores.missing > 0
        )
        notes += f"{escape(scores.detector)}</p>"
    lead = f"{images} image{'' if images == 1 else 's'} with the surest interactions." if images else ""
    return (
        f'<header>\n<h1>{escape(title)}</h1>\n<p class="lead">{lead}</p>\n'
        + (f'<div class="tiles">{tiles}</div>\n' if tiles else "")
        + f"{notes}</header>"
    )


def _legend() -> str:
    return (
        '<div class="legend"><span><i class="line"></i>human</span>'
        '<span><i class="line object"></i>object</span>'
        "<span>the number on a line is that of its label and of its rows in the table</span></div>"
    )


def _article(
    number: int, one: Shown, table: ClassTable, unseen: frozenset[int], top: int, least: float
) -> str:
    found = matches(one.predicted, one.truth, table) if one.truth is not None else None
    picture = _figure(one.image, one.predicted, table, "predicted", top, least)
    columns = [picture + _predicted(one.predicted, table, unseen, found, top, least)]
    judged = ""
    if one.truth is not None and found is not None:
        picture = _figure(one.image, one.truth, table, "annotated", max(1, len(one.truth)), least)
        columns.append(picture + _annotated(one.truth, one.predicted, table, unseen, found))
        shown = _surest(one.predicted, top, least)
        true = sum(int(found[row]) >= 0 for row in shown)
        judged = f" <small>{true} of {len(shown)} shown are true</small>"
    return (
        f"<article>\n<h2>{number} {escape(one.predicted.filename)}{judged}</h2>\n"
        f'<div class="pair">{"".join(f"<div>{column}</div>" for column in columns)}</div>\n</article>'
    )


def _figure(
    image: Image.Image, shown: Predicted | Scene, table: ClassTable, what: str, top: int, least: float
) -> str:
    picture = draw(image, shown, table, top=top, least=least, sides=SIDES)
    held = io.BytesIO()
    picture.save(held, "JPEG", quality=88, subsampling=0)
    lines = [line for pair in pairs_of(shown, table, top, least) for line in pair.lines]
    said = escape(f"{what}: {', '.join(lines) or 'nothing'}")
    return (
        f'<figure><img alt="{said}" width="{picture.width}" height="{picture.height}" '
        f'src="data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}">'
        "</figure>"
    )


def _surest(one: Predicted, top: int, least: float) -> list[int]:
    order = one.scores.argsort(descending=True, stable=True)
    return order[one.scores[order] >= least][:top].tolist()


def _name(table: ClassTable, i: int, unseen: frozenset[int]) -> str:
    return escape(phrase(table, i)) + (" <small>unseen</small>" if i in unseen else "")


def _predicted(
    one: Predicted, table: ClassTable, unseen: frozenset[int], found: Tensor | None, top: int, least: float
) -> str:
    numbers: dict[tuple[float, ...], int] = {}
    rows = []
    for row in _surest(one, top, least):
        boxes = (*one.boxes_h[row].tolist(), *one.boxes_o[row].tolist())
        number = numbers.setdefault(boxes, len(numbers) + 1)
        cells = [
            str(number),
            _name(table, int(one.interactions[row]), unseen),
            percent(float(one.scores[row])),
        ]
        if found is not None:
            true = int(found[row]) >= 0
            cells.append(f'<span class="{"good" if true else "bad"}">{"true" if true else "false"}</span>')
        rows.append(cells)
    return _table(
        "predicted", ["#", "interaction", "score", *(["verdict"] if found is not None else [])], rows
    )


def _annotated(scene: Scene, one: Predicted, table: ClassTable, unseen: frozenset[int], found: Tensor) -> str:
    numbers = {pair: i for i, pair in enumerate(dict.fromkeys(map(tuple, _pairs(scene))), 1)}
    at = {int(pair): row for row, pair in enumerate(found.tolist()) if pair >= 0}
    rows = []
    for row, pair in enumerate(_pairs(scene)):
        said = percent(float(one.scores[at[row]])) if row in at else '<span class="bad">missed</span>'
        rows.append([str(numbers[tuple(pair)]), _name(table, int(scene.interactions[row]), unseen), said])
    return _table("annotated", ["#", "interaction", "found with score"], rows)


def _pairs(scene: Scene) -> list[list[float]]:
    both = zip(scene.boxes_h.tolist(), scene.boxes_o.tolist(), strict=True)
    return [[*human, *thing] for human, thing in both]


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], sortable: bool = False) -> str:
    """Cells are markup; the second column is words."""
    left = [
        ' class="left"' if name in ("interaction", "annotated", "taken for", "group") else "" for name in head
    ]
    cells = "".join(
        f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(head, left, strict=True)
    )
    body = "\n".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row, left, strict=True)) + "</tr>"
        for row in rows
    )
    nothing = "" if body else '<p class="note">nothing</p>'
    return (
        f'<div><div class="scroll"><table{" class=sortable" if sortable else ""}><caption>{escape(caption)}'
        f"</caption><thead><tr>{cells}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>{nothing}</div>"
    )


def _classes(scores: Scores, table: ClassTable, unseen: frozenset[int]) -> str:
    rows = []
    values = zip(scores.ap.tolist(), scores.truths.tolist(), scores.found.tolist(), strict=True)
    for i, (ap, truths, found) in enumerate(values):
        groups = [name for name, members in (("rare", table.rare), ("unseen", unseen)) if i in members]
        shown = percent(ap, 2) if truths else DASH
        rows.append(
            [
                escape(table.words(i)),
                shown,
                f"{found:,}",
                f"{truths:,}",
                f"{int(scores.detections[i]):,}",
                ", ".join(groups),
            ]
        )
    head = ("interaction", "AP", "found", "annotated pairs", "predicted", "group")
    held = _table("every interaction; a heading sorts", head, rows, sortable=True)
    opened = " open" if len(rows) <= 40 else ""
    return (
        f'<section>\n<h2>By interaction</h2>\n<details class="print"{opened}>'
        f"<summary>{len(rows)} interactions</summary>{held}</details>\n</section>"
    )


def _confusions(confused: Counter[tuple[int, int]], table: ClassTable) -> str:
    total = confused.total()
    right = sum(count for (i, j), count in confused.items() if i == j)
    missed = sum(count for (_, j), count in confused.items() if j == NOTHING)
    wrong = [(pair, n) for pair, n in confused.most_common() if pair[0] != pair[1] and pair[1] != NOTHING]
    rows = [
        [escape(table.words(i)), escape(table.words(j)), f"{count:,}"]
        for (i, j), count in wrong[:_CONFUSIONS]
    ]
    text = (
        f"Of {total:,} annotated pairs {percent(right / total)} had the right interaction as the surest one "
        f"of their boxes, {percent((total - right - missed) / total)} another one, and of "
        f"{percent(missed / total)} the boxes were not predicted."
    )
    held = _table("the most frequent ones", ("annotated", "taken for", "pairs"), rows)
    return f"<section>\n<h2>What was taken for what</h2>\n<p>{text}</p>\n{held if rows else ''}\n</section>"


def _facts(facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td class="left wrap">{escape(value)}</td></tr>'
        for key, value in facts.items()
        if value not in (None, "")
    )
    held = f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'
    return f"<section>\n<h2>About</h2>\n{held}\n</section>" if rows else ""
