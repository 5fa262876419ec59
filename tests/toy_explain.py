"""Explanations made by hand, for the page: no model is run."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from rankfold.classify.explain import Explanation, words_of


def explained(
    text: str,
    *,
    heads: int = 2,
    ratios: Tensor | None = None,
    read: tuple[int, int] | None = None,
    classes: tuple[str, ...] = ("bad", "good"),
    chances: list[float] | None = None,
    label: str | None = "good",
    truth: str | None = None,
    bound: float | None = None,
    reason: str = "the text is empty",
) -> Explanation:
    """An explanation with the words that space parts, one piece each, and random ratios near 1 unless given.
    (Given ratios need not sum to what weights do: the page only shows them.)"""
    start, end = read or (0, len(text))
    found = [(m.start() + start, m.end() + start) for m in re.finditer(r"\S+", text[start:end])]
    words, _ = words_of(text, found, list(range(len(found))))
    if ratios is None:
        ratios = torch.rand(heads, len(words), generator=torch.Generator().manual_seed(0)) + 0.5
    chances = chances or [0.3] * (len(classes) - 1) + [1 - 0.3 * (len(classes) - 1)]
    return Explanation(
        text=text,
        words=words,
        pieces=(1,) * len(words),
        weights=ratios / max(len(words), 1),
        elsewhere=torch.zeros(len(ratios)),
        read=(start, end),
        length=len(words),
        label=label,
        probabilities=dict(zip(classes, chances, strict=True)),
        truth=truth,
        bound=bound,
        reason="" if words else reason,
    )


def strange(**options: Any) -> list[Explanation]:
    """Texts that could burst a page."""
    texts = [
        "a plain text of some words " * 4,
        "هذا فيلم رائع جدا، with English words inside it, وأنا أحب كل دقيقة منه 😀.\nשלא את second line",
        "👨‍👩‍👧‍👦" * 60 + " 🇫🇷🇩🇪 👍🏽 ﷽ ﷽﷽﷽ 𒐫𒐫𒐫𒐫 Z" + "\u0301\u0327\u0334" * 40,
        "x" * 3000 + " https://example.org/" + "very/long/" * 60,
        "one\r\n\r\n  two\tthree\u00a0four" + "\u00a0" * 200 + "five",
        "中文电影很好看" * 60,
        " ".join(f"word{i}" for i in range(1000)),
        "",
    ]
    long = "supercalifragilistic" * 12
    made = [explained(text, truth="bad" if i else "good", **options) for i, text in enumerate(texts)]
    answer = {"classes": (long, "b", "c"), "label": long, "truth": "b"}
    return [*made, explained("a b " + "c d " * 1000, read=(0, 3), **answer, **options)]
