"""A page of explanations: the texts with the words coloured by what the pooling read, one file.

    colour = log2(ratio) / 3, from -1 (an eighth of uniform or less) over 0 (uniform) to 1 (eight times)

One fixed scale for every text, head and page: what hardly differs from reading all words alike hardly has a
colour, whatever the largest weight of a text is. The page says how far ratios can go at all at its lengths,
and how far they went. Texts come from anywhere: every string is escaped, nothing is loaded, nothing runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rankfold.classify.explain import Explanation
from rankfold.classify.page_article import article, wrong
from rankfold.classify.page_style import CSS, choices
from rankfold.classify.page_words import DOUBLINGS, plural, times
from rankfold.report_format import percent
from rankfold.report_plots import escape
from rankfold.report_style import CSS as REPORT_CSS

_OPEN = 3  # so many texts on a page, and their tables start open


def explain_page(explanations: Sequence[Explanation], *, title: str, facts: Mapping[str, Any]) -> str:
    """The whole document, of the explanations of one model in the order given.

    facts  name: value, shown as a table at the end (model, pooler, data, command, versions)

    With 8 heads a word takes about 100 bytes. Raises ValueError for explanations with different
    numbers of heads.
    """
    counts = sorted({len(one.weights) for one in explanations})
    if len(counts) > 1:
        raise ValueError(f"explanations with {counts[0]} and {counts[-1]} heads are not of one model")
    heads = counts[0] if counts else 0
    parts = [
        _head(explanations, title, heads),
        _legend(explanations),
        _pick(explanations, heads),
        *(article(i, one, len(explanations) <= _OPEN) for i, one in enumerate(explanations, 1)),
        _facts(facts),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{REPORT_CSS}{CSS}{choices(heads)}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _head(explanations: Sequence[Explanation], title: str, heads: int) -> str:
    judged = [one for one in explanations if one.truth is not None and one.label is not None]
    right = sum(one.label == one.truth for one in judged)
    score = f", {right} of {len(judged)} classified as labelled" if judged else ""
    read = f"by {plural(heads, 'head')} of the pooling" if heads else ""
    return (
        f'<header>\n<h1>{escape(title)}</h1>\n<p class="lead">What was read of '
        f"{plural(len(explanations), 'text')} {read}{score}.</p>\n"
        "<p>The colour of a word says how much of it the pooling read: blue more, orange less than if it had "
        "read all words alike. <strong>That is what was read, not why the answer was given</strong>: the "
        "states of words already hold their neighbours, and what is read may still count little. To test a "
        "cause, change the word and predict again.</p>\n</header>"
    )


def _place(ratio: float) -> float:
    """Where a ratio lies on the scale, -1 to 1."""
    if ratio <= 0:
        return -1.0
    return max(-1.0, min(1.0, math.log2(ratio) / DOUBLINGS))


def _span(low: float, high: float, kind: str = "") -> str:
    left, right = (50 + 50 * _place(x) for x in (low, high))
    return f'<div class="span{kind}"><i style="left:{left:.1f}%;width:{max(right - left, 0):.1f}%"></i></div>'


def _legend(explanations: Sequence[Explanation]) -> str:
    """The scale: 1 is uniform, how far ratios can go, how far they go here."""
    shown = [one for one in explanations if one.words]
    if not shown:
        return ""
    ticks = [f"1/{2**i}" for i in range(DOUBLINGS, 0, -1)] + [f"{2**i}" for i in range(DOUBLINGS + 1)]
    labels = [f"≤ {ticks[0]}", *ticks[1:-1], f"≥ {ticks[-1]}"]
    low, high = (
        float(f([getattr(one.ratios, g)() for one in shown])) for f, g in ((min, "min"), (max, "max"))
    )
    rows = [
        '<div class="ramp" aria-hidden="true"></div><div class="ticks">'
        + "".join(f"<span>{tick}</span>" for tick in labels)
        + "</div>"
    ]
    tops = [one.bound * one.length for one in shown if one.bound is not None]
    lengths = _between([one.length for one in shown], lambda n: f"{n:,}")
    if len(tops) == len(shown):
        rows.append(_span(1, max(tops), " may"))
        possible = (
            f"Largest possible ratio: <b>{_between(tops, times)}</b>, at T = {lengths} word pieces. The "
            "pooling bounds its scores, so its weights cannot be sharp."
        )
    else:
        possible = (
            f"Largest possible ratio: T = {lengths}, all of the weight on one word piece; this pooling has "
            "no smaller bound."
        )
    rows.append(_span(low, high))
    rows.append(
        "<p>Ratio to uniform reading; <b>1 = uniform</b>, the weight 1/T a word piece (n/T for a word of n). "
        "The scale is the same for all texts and heads, and on every such page.</p>"
        f'<p><i class="key may"></i>{possible}</p>'
        f'<p><i class="key"></i>Observed, all words of all heads: <b>{times(low)} to {times(high)}</b>.</p>'
    )
    return f'<div class="scale">{"".join(rows)}</div>'


def _between(values: Sequence[Any], write: Any) -> str:
    low, high = write(min(values)), write(max(values))
    return low if low == high else f"{low} to {high}"


def _pick(explanations: Sequence[Explanation], heads: int) -> str:
    """The choice of the head that colours the words, and the filter of what was classified wrongly."""
    items = []
    if heads > 1:
        names = [("m", "mean"), ("a", "all agree"), *((f"h{i}", f"{i + 1}") for i in range(heads))]
        items.append("<span>Head</span>")
        went = _moved(explanations, heads)
        for i, (key, text) in enumerate(names):
            what = f' aria-label="head {text}"' if key[0] == "h" else ""
            what += "" if i else " checked"
            share = f" <small>{percent(went[int(text) - 1], 0)}</small>" if key[0] == "h" else ""
            items.append(f'<label>{text}{share}<input type="radio" name="head" id="c-{key}"{what}></label>')
    errors = sum(wrong(one) for one in explanations)
    if 0 < errors < len(explanations):
        items.append(
            f'<label class="wrong">only the {errors} wrong<input type="checkbox" id="c-wrong"></label>'
        )
    note = (
        '<p class="note">Percent: the part of its weight that a head moved away from uniform reading, the '
        "mean over texts. All agree: coloured only where every head reads a word more than uniform, or every "
        "head reads it less, by the head that departs least.</p>"
    )
    if not items:
        return ""
    bar = f'<div class="pick" role="group" aria-label="What the colours show">{"".join(items)}</div>'
    return bar + (note if heads > 1 else "")


def _moved(explanations: Sequence[Explanation], heads: int) -> list[float]:
    """What each head moved, the mean over the texts that have words."""
    parts = [one.moved(one.weights, one.elsewhere) for one in explanations if one.words]
    return torch.stack(parts).mean(0).tolist() if parts else [0.0] * heads


def _facts(facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td class="left wrap">{escape(value)}</td></tr>'
        for key, value in facts.items()
        if value not in (None, "")
    )
    table = f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'
    return f"<section>\n<h2>About</h2>\n{table}\n</section>" if rows else ""
