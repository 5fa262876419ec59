"""Labelled examples by name: `NAME[:split]` of a packaged set, a .csv, .tsv or .jsonl file, a hub data set.

Labels are strings ("positive", "3"); what a checkpoint calls its classes decides their order, else the data.
What is held out for validation is decided by the texts alone: the same ones at every seed, in every order of
the rows, and equal texts (or the chunks of one document) always on one side.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from rankfold import data as texts_
from rankfold.classify.rows import SUFFIXES, Row, file_rows, hub_rows
from rankfold.data_classes import CLASSES, class_names, groups, labelled
from rankfold.data_classes import rows as rows_of


@dataclass(frozen=True)
class Examples:
    """Texts in order, with what is known of them.

    labels  one a text, or None where the data has none
    places  line numbers in a file, row numbers from 1 otherwise
    source  the name that errors and reports use
    names   the classes in an order that the data set itself declares, or None
    unit    what a place is: "line" or "row"
    groups  texts of one group are never parted (chunks of one document), or None
    """

    texts: list[str]
    labels: list[str] | None
    places: list[int]
    source: str
    names: list[str] | None = None
    unit: str = "row"
    groups: list[str] | None = None
    noun: ClassVar[str] = "text"  # what is classified; of images `texts` are digests (adapt/pictures.py)

    def __len__(self) -> int:
        return len(self.texts)

    def at(self, index: int) -> str:
        """How an error names one example."""
        return f"'{self.source}', {self.unit} {self.places[index]}"

    def take(self, rows: Sequence[int]) -> Examples:
        def pick(items: list | None) -> list | None:
            return None if items is None else [items[row] for row in rows]

        return replace(
            self,
            texts=[self.texts[row] for row in rows],
            labels=pick(self.labels),
            places=[self.places[row] for row in rows],
            groups=pick(self.groups),
        )

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of texts and labels in order: equal data, equal hash."""
        digest = hashlib.sha256()
        for text, label in zip(self.texts, self.labels or [""] * len(self), strict=True):
            for part in (text, label):
                blob = part.encode("utf-8", "surrogatepass")
                digest.update(len(blob).to_bytes(8, "little") + blob)
        return digest.hexdigest()


def check_spec(spec: str) -> texts_.Spec:
    """Read `NAME[:split]`, looking at names alone. Raises ValueError for what cannot be one."""
    parsed = texts_.Spec.parse(spec)
    if parsed.sequences:
        raise ValueError(
            f"{spec!r} names a number of windows; examples are read whole and cut at --length tokens: leave "
            f"out ':{parsed.sequences}x{parsed.length}'"
        )
    suffix = Path(parsed.name).suffix
    if suffix in SUFFIXES:
        if parsed.split is not None:
            raise ValueError(f"the file {parsed.name!r} has no splits, but {parsed.split!r} was asked for")
        if not Path(parsed.name).is_file():
            raise ValueError(f"no file '{parsed.name}'")
    elif parsed.name in CLASSES:
        if parsed.split is not None and parsed.split not in texts_.SPLITS:
            raise ValueError(
                f"{parsed.name!r} has no split {parsed.split!r}: choose {', '.join(texts_.SPLITS)}"
            )
    elif Path(parsed.name).exists():
        raise ValueError(f"'{parsed.name}': examples are read from {', '.join(SUFFIXES)} files")
    elif parsed.name in texts_.TEXTS:
        raise ValueError(f"text {parsed.name!r} has no labels; those that do are {', '.join(CLASSES)}")
    elif near := difflib.get_close_matches(parsed.name, CLASSES, n=1):
        raise ValueError(f"no labelled text {parsed.name!r}. Did you mean {near[0]!r}?")
    return parsed


def read(
    spec: str,
    *,
    text_column: str = "text",
    label_column: str = "label",
    labels: bool | None = True,
    empty: bool = False,
) -> Examples:
    """The examples that a SPEC names, in order.

    labels  True: they are needed; False: not read; None: read where there are any
    empty   whether texts without a word in them are let through

    A packaged set without a split is read whole; a hub data set without one is its split "train". Raises
    ValueError for anything that is missing or malformed, with the file and the line.
    """
    parsed = check_spec(spec)
    if Path(parsed.name).suffix in SUFFIXES:
        rows = file_rows(Path(parsed.name), text_column, label_column, labelled=labels)
        found = _collect(rows, parsed.name, "line", None)
    elif parsed.name in CLASSES:
        texts, numbers = labelled(parsed.name)
        names, documents = class_names(parsed.name), groups(parsed.name)
        whole = Examples(
            texts,
            None if labels is False else [names[number] for number in numbers],
            list(range(1, len(texts) + 1)),
            str(parsed),
            names,
            groups=documents if len(set(documents)) < len(texts) else None,
        )
        found = whole.take(rows_of(parsed.name, parsed.split or "all"))
    else:
        lines, names = hub_rows(
            parsed.name, parsed.split or "train", text_column, label_column, labelled=labels
        )
        found = _collect(lines, str(parsed), "row", names)
    if not len(found):
        raise ValueError(f"'{spec}' has no examples in it")
    for index, text in enumerate(found.texts):
        if not empty and not text.strip():
            raise ValueError(f"{found.at(index)}: the text is empty; take the row out, or give it a text")
        if labels and found.labels is not None and not found.labels[index]:
            raise ValueError(f"{found.at(index)}: the label is empty; take the row out, or give it a label")
    return found


def _collect(rows: Iterable[Row], source: str, unit: str, names: list[str] | None) -> Examples:
    found = list(rows)
    labels = [row.label for row in found if row.label is not None]
    return Examples(
        [row.text for row in found],
        labels if len(labels) == len(found) else None,
        [row.place for row in found],
        source,
        names,
        unit,
    )


def classes_of(data: Examples) -> list[str]:
    """The classes of a training set in their order: as the data set declares them, else numbers by value and
    words by the alphabet. Raises ValueError for fewer than two."""
    found = set(data.labels or ())
    if len(found) < 2:
        only = f"all {len(data)} examples are {next(iter(found))!r}" if found else "it has no labels"
        raise ValueError(f"'{data.source}' has one class only ({only}); a classifier needs at least two")
    if data.names is not None and found <= set(data.names):
        return list(data.names)
    try:
        return sorted(found, key=int)
    except ValueError:
        return sorted(found)


def numbers(data: Examples, names: Sequence[str]) -> list[int]:
    """The labels as class numbers. Where no label of the data is among the names, whole numbers below their
    count are taken for class numbers. Raises ValueError for a label that the names do not know: its line, and
    the names."""
    assert data.labels is not None
    place = {name: number for number, name in enumerate(names)}
    if not place.keys() & set(data.labels):
        place = {str(number): number for number in range(len(names))}
    for index, label in enumerate(data.labels):
        if label not in place:
            raise ValueError(
                f"{data.at(index)}: label {label!r} is none of the {len(names)} classes: "
                f"{', '.join(map(repr, names))}"
            )
    return [place[label] for label in data.labels]


def key(text: str) -> bytes:
    """What makes two texts the same one: their words, whatever the case and the space between."""
    return hashlib.blake2b(" ".join(text.lower().split()).encode("utf-8", "replace"), digest_size=16).digest()


def held_out(data: Examples, share: float) -> tuple[Examples, Examples]:
    """(training, validation): a share of every class, by the hash of the texts or of their documents.

    Raises ValueError where the validation would be empty.
    """
    assert data.labels is not None
    names = data.groups or [""] * len(data)
    sets: dict[bytes, list[int]] = defaultdict(list)
    for row, (text, group) in enumerate(zip(data.texts, names, strict=True)):
        sets[key(group or text)].append(row)
    kinds: dict[str, list[bytes]] = defaultdict(list)  # by class: sets of equal texts, in order of their hash
    for mark in sorted(sets):
        kinds[data.labels[sets[mark][0]]].append(mark)
    chosen: set[int] = set()
    for marks in kinds.values():
        want, have = share * sum(len(sets[mark]) for mark in marks), 0
        for mark in marks[:-1]:  # one set at least trains
            if have + len(sets[mark]) / 2 > want:
                break
            chosen.update(sets[mark])
            have += len(sets[mark])
    if not chosen:
        raise ValueError(
            f"--held-out {share:g} of the {len(data)} examples of '{data.source}' is none in any class; "
            "raise it, or name other data with --validation"
        )
    rest = [row for row in range(len(data)) if row not in chosen]
    return data.take(rest), data.take(sorted(chosen))


def balanced(data: Examples, count: int) -> Examples:
    """`count` examples of every class, the first ones by their hash: the same ones at every seed, in every
    order of the rows. Raises ValueError for a class that has fewer."""
    assert data.labels is not None
    if count < 1:
        raise ValueError(f"--per-class {count}: at least 1")
    kinds: dict[str, list[tuple[bytes, int]]] = defaultdict(list)
    for row, (text, label) in enumerate(zip(data.texts, data.labels, strict=True)):
        kinds[label].append((key(text), row))
    for label, found in kinds.items():
        if len(found) < count:
            raise ValueError(f"--per-class {count}: '{data.source}' has {len(found)} of class {label!r}")
    return data.take(sorted(row for found in kinds.values() for _, row in sorted(found)[:count]))


def warnings_of(train: Examples, others: dict[str, Examples]) -> list[str]:
    """What is doubtful in the data, in words: texts on both sides, texts with two labels, rare classes."""
    found = []
    seen: dict[bytes, set[str]] = defaultdict(set)
    for text, label in zip(train.texts, train.labels or [], strict=True):
        seen[key(text)].add(label)
    for name, other in others.items():
        both = sum(key(text) in seen for text in other.texts)
        if both:
            found.append(
                f"{both} of the {len(other)} {other.noun}s of the {name} data are in the training data too: "
                "its figures flatter the model"
            )
    twofold = sum(len(labels) > 1 for labels in seen.values())
    if twofold:
        found.append(f"{twofold} {train.noun}s of the training data occur with different labels")
    counts = Counter(train.labels or ()).most_common()
    (most, high), (least, low) = counts[0], counts[-1]
    if high >= 10 * low or low < 5:
        found.append(
            f"the classes are uneven: {high} examples are {most!r}, {low} are {least!r}; read macro F1 and "
            "the rows of the rare classes, not accuracy"
        )
    return found
