"""One text of a page of explanations: the answer, the words in colour, the top words of each head.

A word's colour is set in the style by its numbers, one for the mean over heads, one for where all heads
agree, one for each head. Nothing stands between words that the text has not, and none is isolated from its
neighbours: right-to-left text runs as it would without colours.
"""

from __future__ import annotations

import math

from torch import Tensor

from rankfold.classify.explain import Explanation
from rankfold.classify.page_tables import every_word, top_words
from rankfold.classify.page_words import agreed, levels, shown, times, visible
from rankfold.report_format import known, percent
from rankfold.report_plots import bar, escape

_LONG = 300  # words shown of a longer text; the rest starts folded
_TAIL = 1500  # characters shown of what was not read, if there are more: folded
_CLASSES = 6  # rows of probabilities; the others are summed


def wrong(one: Explanation) -> bool:
    return one.truth is not None and one.label is not None and one.label != one.truth


def article(i: int, one: Explanation, opened: bool) -> str:
    """A text: the answer, the probabilities, the words, and the top words of each head."""
    kind = ' class="wrong"' if wrong(one) else ""
    parts = [_answer(i, one), _chances(one), _cut_note(one)]
    if one.words:
        ratios = one.ratios
        parts += [_text(one, ratios), top_words(one, ratios, opened), every_word(one, ratios)]
    else:
        text = f'<p class="t" dir="auto">{shown(one.text)}</p>' if one.text.strip() else ""
        parts += [f'<p class="note">{escape(one.reason[:1].upper() + one.reason[1:])}.</p>', text]
    return f"<article{kind}>\n" + "\n".join(part for part in parts if part) + "\n</article>"


def _answer(i: int, one: Explanation) -> str:
    if one.label is None:
        answer = "no finite answer"
    else:
        chance = percent(one.probabilities.get(one.label))
        answer = f"<bdi>{escape(one.label)}</bdi> <small>probability {chance}</small>"
    judged = ""
    if one.truth is not None:
        good = one.truth == one.label
        verdict = "✓ as labelled" if good else f"✗ labelled <bdi>{escape(one.truth)}</bdi>"
        judged = f' <small class="{"good" if good else "bad"}">{verdict}</small>'
    return f'<h2><span class="n">{i}</span>{answer}{judged}</h2>'


def _chances(one: Explanation) -> str:
    finite = [(key, p) for key, p in one.probabilities.items() if known(p) and math.isfinite(p)]
    if len(finite) == 2:  # one bar for both, always in the order of the classes
        (first, p), (second, q) = finite
        both = bar(f"{first} {percent(p)}", 1.0, p, 1.0, f"{percent(q)} {second}")
        return f'<div class="bars">{both}</div>'
    ranked = sorted(finite, key=lambda pair: -pair[1])
    rows = [pair for n, pair in enumerate(ranked) if n < _CLASSES or pair[0] == one.truth]
    rest = [pair for pair in ranked if pair not in rows]
    if rest:
        rows.append((f"{len(rest)} other class{'es' if len(rest) > 1 else ''}", sum(p for _, p in rest)))
    bars = "".join(bar(key, 1.0, p, 1.0, percent(p)) for key, p in rows)
    return f'<div class="bars">{bars}</div>' if rows else ""


def _cut_note(one: Explanation) -> str:
    start, end = one.read
    missing = start + len(one.text) - end
    if not missing or not one.words:
        return ""
    return (
        f'<p class="note"><span class="cut">not read</span>{missing:,} of {len(one.text):,} characters: the '
        f"model reads {one.length:,} word pieces. They are grey below.</p>"
    )


def _text(one: Explanation, ratios: Tensor) -> str:
    """The text with its words coloured, folded after `_LONG` words; what was not read is grey."""
    marks = _marks(one, ratios)
    start, end = one.read
    cut = len(marks) if len(marks) <= _LONG * 1.2 else _LONG
    split = one.words[cut - 1][1] if cut < len(marks) else end
    before, after = one.text[:start], one.text[end:]
    first, rest = _run(one, marks, 0, cut, start, split), _run(one, marks, cut, len(marks), split, end)
    if len(before) <= _TAIL:
        first, before = _unread(before) + first, ""
    if len(after) <= _TAIL:
        first, rest = (first, rest + _unread(after)) if rest else (first + _unread(after), "")
        after = ""
    blocks = [
        _folded(f"{len(before):,} characters that were not read", _unread(before)) if before else "",
        f'<p class="t" dir="auto">{first}</p>',
        _folded(f"{len(marks) - cut:,} more words", rest) if rest else "",
        _folded(f"{len(after):,} characters that were not read", _unread(after)) if after else "",
    ]
    return "\n".join(block for block in blocks if block)


def _folded(summary: str, text: str) -> str:
    return f'<details><summary>{summary}</summary><p class="t" dir="auto">{text}</p></details>'


def _unread(text: str) -> str:
    """Text beyond the maximum, grey, with a label where it touches what was read."""
    if not text:
        return ""
    return f'<span class="cut">not read</span><span class="unread">{shown(text)}</span>'


def _run(one: Explanation, marks: list[str], first: int, last: int, start: int, end: int) -> str:
    """Words `first` to `last` with their marks, and all that stands between `start` and `end`."""
    out, at = [], start
    for (a, b), mark in zip(one.words[first:last], marks[first:last], strict=True):
        out.append(f"{shown(one.text[at:a])}<i{mark}>{visible(one.text[a:b])}</i>")
        at = b
    return "".join(out) + shown(one.text[at:end])


def _marks(one: Explanation, ratios: Tensor) -> list[str]:
    """The attributes of each word: its numbers for the style, and in words on hover."""
    rows = {"m": ratios.mean(0)}
    if len(ratios) > 1:
        rows |= {"a": agreed(ratios), **{f"h{i}": row for i, row in enumerate(ratios)}}
    shades = {key: levels(row) for key, row in rows.items()}
    mean, low, high = (x.tolist() for x in (rows["m"], ratios.amin(0), ratios.amax(0)))
    marks = []
    for j in range(len(one.words)):
        style = ";".join(f"--{key}:{row[j]}" for key, row in shades.items() if row[j])
        title = times(mean[j])
        if len(ratios) > 1:
            title = f"mean {title}, heads {times(low[j])} to {times(high[j])}"
        marks.append(f' style="{style}" title="{title}"')
    return marks
