"""How a page of explanations writes words, ratios and their colours."""

from __future__ import annotations

import unicodedata

from torch import Tensor

from rankfold.report_format import number
from rankfold.report_plots import escape

DOUBLINGS = 3  # from uniform to the end of the scale, both ways


def plural(n: int, thing: str) -> str:
    return f"{n:,} {thing}{'' if n == 1 else 's'}"


def times(ratio: float) -> str:
    """A ratio to uniform: `×1.32`."""
    return f"×{number(ratio) if ratio >= 100 else f'{ratio:.2f}' if ratio < 10 else f'{ratio:.1f}'}"


def visible(word: str) -> str:
    """A word as HTML; one that no eye could see, of zero-width characters only, is named by its code."""
    if all(unicodedata.category(c) in ("Cf", "Zs", "Mn") and not unicodedata.combining(c) for c in word):
        codes = " ".join(f"U+{ord(c):04X}" for c in word[:4])
        return f'<span class="unseen">{codes}</span>'
    return shown(word)


def shown(text: str) -> str:
    return escape(text.replace("\r\n", "\n").replace("\r", "\n"))


def short(word: str) -> str:
    """A word as HTML, cut after 40 grapheme clusters."""
    import regex

    clusters = regex.findall(r"\X", word)
    return visible("".join(clusters[:40])) + ("…" if len(clusters) > 40 else "")


def levels(ratios: Tensor) -> list:
    """Ratios as the style takes them: log2(ratio) over the scale, in percent."""
    return (ratios.log2() * (100 / DOUBLINGS)).clamp(-100, 100).round().int().tolist()


def agreed(ratios: Tensor) -> Tensor:
    """(words,) ratio of the head that departs least from 1, where all depart to one side; 1 elsewhere."""
    low, high = ratios.amin(0), ratios.amax(0)
    return low.clamp_min(1) * high.clamp_max(1)
