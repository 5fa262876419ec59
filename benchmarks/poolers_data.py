"""The texts of poolers.py: three labelled sets, split by document, tokenized once a seed, in batches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from rankfold.data_packaged import groups, labelled
from rankfold.models.vocabulary import train_wordpiece

SETS = {"movie": ("movie", 48), "spam": ("spam", 96), "brown": ("brown_genres", 96)}  # text, tokens
CHARACTERS = 1000  # of a text at most; what is behind them would be cut anyway, after tokenizing it


@dataclass(frozen=True)
class Example:
    ids: list[int]
    label: int


@dataclass(frozen=True)
class Split:
    """Tokenized parts of a set for one seed."""

    train: list[Example]
    valid: list[Example]
    test: list[Example]
    vocabulary: int
    classes: int


@cache
def split(name: str, seed: int, limit: int) -> Split:
    """Tenths of the documents of each class: 7 to train on, 1 to choose by, 2 to test. Whole documents."""
    text, length = SETS[name]
    texts, labels = labelled(text)
    texts = [text[:CHARACTERS] for text in texts]
    documents = groups(text)
    draw = random.Random(seed)
    by_class: dict[int, dict[str, list[int]]] = {}
    for i, (label, document) in enumerate(zip(labels, documents, strict=True)):
        by_class.setdefault(label, {}).setdefault(document, []).append(i)
    parts: tuple[list[int], ...] = ([], [], [])
    for label in sorted(by_class):
        names = sorted(by_class[label])
        draw.shuffle(names)
        cuts = [0, round(0.7 * len(names)), round(0.8 * len(names)), len(names)]
        for part, start, stop in zip(parts, cuts[:-1], cuts[1:], strict=True):
            part += [i for document in names[start:stop] for i in by_class[label][document]]
    draw.shuffle(parts[0])
    train = parts[0][: limit or None]
    tokenizer = train_wordpiece([texts[i] for i in train], 8000)
    tokenizer.model_max_length = length

    def read(rows: list[int]) -> list[Example]:
        ids = tokenizer([texts[i] for i in rows], truncation=True, max_length=length)["input_ids"]
        return [Example(found, labels[i]) for found, i in zip(ids, rows, strict=True)]

    return Split(read(train), read(parts[1]), read(parts[2]), len(tokenizer), len(by_class))


def bag_of_words(parts: Split) -> float:
    """Test accuracy, in percent, of TF-IDF of word pieces and their pairs with logistic regression (C = 10)
    on the same tokens."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    words = TfidfVectorizer(analyzer=_pieces_and_pairs, sublinear_tf=True)
    seen = words.fit_transform([example.ids for example in parts.train])
    model = LogisticRegression(C=10, max_iter=1000).fit(seen, [example.label for example in parts.train])
    found = words.transform([example.ids for example in parts.test])
    return 100 * float(model.score(found, [example.label for example in parts.test]))


def _pieces_and_pairs(ids: list[int]) -> list[str]:
    return [str(i) for i in ids] + [f"{a} {b}" for a, b in pairwise(ids)]


def batches(examples: list[Example], size: int, draw: random.Random | None) -> Iterator[dict[str, Tensor]]:
    """Padded batches of texts of like length, each run of 40 batches shuffled by `draw` before and after."""
    order = list(range(len(examples)))
    run = len(order) if draw is None else 40 * size
    if draw is not None:
        draw.shuffle(order)
    found = []
    for start in range(0, len(order), run):
        part = sorted(order[start : start + run], key=lambda i: len(examples[i].ids))
        found += [part[i : i + size] for i in range(0, len(part), size)]
    if draw is not None:
        draw.shuffle(found)
    for rows in found:
        ids = [torch.tensor(examples[i].ids or [1]) for i in rows]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        lengths = torch.tensor([len(x) for x in ids])
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        yield {
            "input_ids": padded,
            "attention_mask": mask,
            "labels": torch.tensor([examples[i].label for i in rows]),
        }
