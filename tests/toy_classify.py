"""The smallest runs of `classify`: forty texts of a few words, whose class one word decides; seconds."""

from __future__ import annotations

import csv
import random
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GOOD, BAD = ("fine", "great", "lovely"), ("bad", "awful", "dull")
FILLER = "the a film plot it was so very".split()
TINY: dict[str, Any] = {
    "vocabulary": 200,
    "width": 8,
    "embedding": 12,
    "dropout": 0.0,
    "word_dropout": 0.0,
    "heads": 2,
}
FAST: dict[str, Any] = {"epochs": 2, "batch_size": 8, "length": 16, "device": "cpu"}


def snippets(count: int = 40, seed: int = 0, names: tuple[str, str] = ("no", "yes")) -> list[tuple[str, str]]:
    """(text, label): no two texts alike."""
    draw, found = random.Random(seed), {}
    while len(found) < count:
        good = len(found) % 2
        words = draw.choices(FILLER, k=draw.randint(1, 4))
        words.insert(draw.randrange(len(words)), draw.choice(GOOD if good else BAD))
        found.setdefault(" ".join(words), names[good])
    return list(found.items())


def table(path: Path, rows: list[tuple[str, str]], header: tuple[str, ...] = ("text", "label")) -> str:
    """The path of a .csv file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


@contextmanager
def quiet() -> Any:
    yield lambda *_: None


def run(folder: Path, out: str = "out", model: str = "lama", **more: Any) -> tuple[dict[str, Any], Path]:
    """`train` on forty snippets, tested on twenty others, with the options of TINY that the model has."""
    from rankfold.classify import Choice, train
    from rankfold.classify.settings import options_of

    sizes = more.pop("options", {key: value for key, value in TINY.items() if key in options_of(model)})
    if model != "lama":
        sizes.pop("heads", None)
    data = more.pop("data", None) or table(folder / "train.csv", snippets())
    more.setdefault("test", table(folder / "test.csv", snippets(20, seed=1)))
    said = more.pop("said", [])
    settings = {**FAST, "progress": quiet, "say": said.append, **more}
    return train(data, str(folder / out), choice=Choice(model=model, **sizes), **settings)
