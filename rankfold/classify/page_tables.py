"""The numbers of one text: the top words of each head, and every word of a short text beside every head.

What a colour shows only to the eye, and a tooltip only to a mouse, stands here as text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankfold.classify.explain import Explanation
from rankfold.classify.page_words import agreed, levels, plural, short, times
from rankfold.report_format import DASH, percent

_GRID = 80  # words of a text that get a row each
_TOP = 6  # words of a head
_NEAR = 1.05  # a ratio below is not worth the name of a top word


def top_words(one: Explanation, ratios: Tensor, opened: bool) -> str:
    """The top words of the mean, of agreement and of each head, with their ratios and weights."""
    several = len(ratios) > 1
    rest = one.length > sum(one.pieces)
    rows = [
        _row(
            "mean" if several else "the head", one, ratios.mean(0), one.weights.mean(0), one.elsewhere.mean()
        )
    ]
    if several:
        rows.append(_row("all agree", one, agreed(ratios), None, None))
        each = enumerate(zip(ratios, one.weights, one.elsewhere, strict=True), 1)
        rows += [_row(f"head {i}", one, *head) for i, head in each]
    head = ["", "moved", *(["elsewhere"] if rest else []), "top words: ratio, weight"]
    cells = "".join(
        f'<th scope="col"{" class=left" if text.startswith("top") else ""}>{text}</th>' for text in head
    )
    note = (
        f"T = {one.length:,} word pieces; the uniform weight of one is {percent(one.uniform, 2)}. Moved: the "
        "part of the weight that does not lie where uniform reading puts it. Top words: from "
        f"{times(_NEAR)} on; one that stands several times, once and at its largest."
    )
    if rest:
        pieces = plural(one.length - sum(one.pieces), "piece")
        note += f" Elsewhere: on {pieces} that are no words of the text."
    return (
        f'<details class="print"{" open" if opened else ""}><summary>Top words of each head</summary>'
        f'<div class="scroll"><table class="heads"><thead><tr>{cells}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + f'\n</tbody></table></div><p class="note">{note}</p></details>'
    )


def _row(
    name: str, one: Explanation, ratios: Tensor, weights: Tensor | None, elsewhere: Tensor | None
) -> str:
    chips: dict[str, str] = {}
    for j in ratios.argsort(descending=True, stable=True).tolist():
        ratio = float(ratios[j])
        if len(chips) == _TOP or ratio < _NEAR:
            break
        word = one.text[slice(*one.words[j])]
        weight = "" if weights is None else f" {percent(float(weights[j]), 2)}"
        chip = f'<span class="chip"><bdi>{short(word)}</bdi> <small>{times(ratio)}{weight}</small></span>'
        chips.setdefault(word.casefold(), chip)
    moved = rest = ""
    if weights is not None and elsewhere is not None:
        moved, rest = percent(float(one.moved(weights, elsewhere))), percent(float(elsewhere))
    columns = f"<td>{moved}</td>" + (f"<td>{rest}</td>" if one.length > sum(one.pieces) else "")
    top = "".join(chips.values()) or DASH
    return f'<tr><th scope="row">{name}</th>{columns}<td class="left">{top}</td></tr>'


def every_word(one: Explanation, ratios: Tensor) -> str:
    """Every word of a short text beside what each head made of it; no more than `_GRID` words, two heads."""
    if len(ratios) < 2 or len(one.words) > _GRID:
        return ""
    names = ("mean", *(str(i + 1) for i in range(len(ratios))))
    columns = torch.cat([ratios.mean(0, keepdim=True), ratios])
    cells = [
        [f'<td><i style="--m:{level}">{ratio:.2f}</i></td>' for level, ratio in zip(a, b, strict=True)]
        for a, b in zip(levels(columns.mT), columns.mT.tolist(), strict=True)
    ]
    rows = (
        f'<tr><th scope="row"><bdi>{short(one.text[a:b])}</bdi></th>{"".join(row)}</tr>'
        for (a, b), row in zip(one.words, cells, strict=True)
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("", *names))
    return (
        "<details><summary>Every word, head by head</summary>"
        f'<div class="scroll"><table class="layers grid"><thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + '\n</tbody></table></div><p class="note">Ratio to uniform.</p></details>'
    )
