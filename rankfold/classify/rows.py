"""Rows of a labelled file or data set: (place, text, label or None), each with the place to name in an error.

CSV and TSV are read by the csv module (a header names the columns; quoted fields may hold line breaks), JSONL
is one object a line, and the rows of a hub data set are numbered from 1. Places in files are physical line
numbers, as an editor shows them: of a row that spans lines, the first.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = {".csv": ",", ".tsv": "\t", ".jsonl": ""}  # with what stands between two fields


class Row(NamedTuple):
    """One example: `place` is its line in a file, or its number from 1 in a data set."""

    place: int
    text: str
    label: str | None


def file_rows(path: Path, text_column: str, label_column: str, *, labelled: bool | None) -> Iterator[Row]:
    """The rows of a .csv, .tsv or .jsonl file.

    labelled  True: every row has a label; False: labels are not read; None: they are where there is a column
              of that name (a field of the first object, in JSONL)

    Raises ValueError with the file and the line: bytes that are not UTF-8, a wrong number of fields, a column
    that is not there (and those that are), a text or a label that is no string. Texts may be empty.
    """
    text = _decoded(path)
    if path.suffix == ".jsonl":
        yield from _json_rows(path, text, text_column, label_column, labelled)
    else:
        yield from _csv_rows(path, text, text_column, label_column, labelled)


def _decoded(path: Path) -> str:
    try:
        blob = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"no file '{path}'") from error
    try:
        text = blob.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = blob[: error.start].count(b"\n") + 1
        raise ValueError(
            f"'{path}', line {line}: byte {error.start} is {blob[error.start]:#04x}, which is not UTF-8. "
            "Convert the file, for example: iconv -f LATIN1 -t UTF-8"
        ) from error
    if not text.strip():
        raise ValueError(f"'{path}' is empty: give a file with examples in it")
    return text


def _csv_rows(path: Path, text: str, text_column: str, label_column: str, want: bool | None) -> Iterator[Row]:
    with _long_fields():
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=SUFFIXES[path.suffix], strict=True)
        header: list[str] = []
        while True:
            begins = reader.line_num + 1
            try:
                fields = next(reader, None)
            except csv.Error as error:
                raise ValueError(
                    f"'{path}', line {begins}: {error}. A field with a quote in it is quoted, and its quotes "
                    'are doubled: "He said ""no"""'
                ) from error
            if fields is None:
                return
            if not fields:  # a blank line
                continue
            if not header:
                header = [name.strip() for name in fields]
                place = _column(path, header, text_column, "--text-column")
                known = label_column in header
                mark = (
                    _column(path, header, label_column, "--label-column")
                    if want or (want is None and known)
                    else -1
                )
                continue
            if len(fields) != len(header):
                raise ValueError(
                    f"'{path}', line {begins}: {len(fields)} fields, the header on the first line has "
                    f"{len(header)} ({', '.join(header)}). A field with {SUFFIXES[path.suffix]!r} or a line "
                    "break in it must be quoted"
                )
            yield Row(begins, fields[place], fields[mark].strip() if mark >= 0 else None)


def _column(path: Path, header: list[str], name: str, option: str) -> int:
    if header.count(name) != 1:
        there = "twice or more" if name in header else "not there"
        raise ValueError(
            f"'{path}', line 1: column {name!r} is {there}; its columns are {', '.join(map(repr, header))}. "
            f"Name one with {option} (the first line must name the columns)"
        )
    return header.index(name)


@contextmanager
def _long_fields() -> Iterator[None]:
    """Texts longer than the csv module's 131,072 characters; it has one limit for the whole process."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _json_rows(
    path: Path, text: str, text_column: str, label_column: str, want: bool | None
) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"'{path}', line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: an object was expected, not {type(record).__name__}")
        if want is None:
            want = label_column in record
        yield Row(number, *_fields(record, where, text_column, label_column, want))


def _fields(
    record: dict[str, Any], where: str, text_column: str, label_column: str, want: bool
) -> tuple[str, str | None]:
    for name, option in ((text_column, "--text-column"), (label_column, "--label-column")):
        if name not in record and (want or name == text_column):
            raise ValueError(
                f"{where}: no {name!r}; it has {', '.join(map(repr, record)) or 'nothing'}. Name one with "
                f"{option}"
            )
    text = record[text_column]
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise ValueError(f"{where}: {text_column!r} is {type(text).__name__}, not a string")
    return text, label_of(record[label_column], where, label_column) if want else None


def label_of(value: Any, where: str, column: str) -> str:
    """A label as a string; "" for none. Raises ValueError for what is neither a string nor an integer."""
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)  # a column of integers with a gap in it, as pandas writes it
    if value is None:
        return ""
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise ValueError(f"{where}: {column!r} is {value!r}; a label is a string or an integer")
    return str(value).strip()


def hub_rows(
    name: str, split: str, text_column: str, label_column: str, *, labelled: bool | None
) -> tuple[Iterator[Row], list[str] | None]:
    """The rows of a hub data set, and the names of its classes where it declares them.

    split  of the data set, its configuration before it as in "sst2/validation"

    Raises ValueError where it cannot be read, or lacks a column.
    """
    found, where = hub_set(name, split)
    want = label_column in found.column_names if labelled is None else labelled
    names = hub_names(found, label_column) if want else None

    def rows() -> Iterator[Row]:
        for number, record in enumerate(found, 1):
            at = f"{where}, row {number}"
            text, label = _fields(record, at, text_column, label_column, want)
            yield Row(number, text, label if label is None else named(label, names))

    return rows(), names


def hub_set(name: str, split: str) -> tuple[Any, str]:
    """A hub data set, or a folder that `save_to_disk` wrote, and how errors name it. Raises ValueError where
    it cannot be read."""
    configuration, _, part = split.rpartition("/")
    where = f"data set {name!r}, split {split!r}"
    try:
        import datasets

        if not is_saved_set(Path(name)):
            return datasets.load_dataset(name, configuration or None, split=part), where
        found: Any = datasets.load_from_disk(name)
        if isinstance(found, dict) and part not in found:
            raise ValueError(f"it has the splits {', '.join(found)}")
        return (found[part] if isinstance(found, dict) else found), where
    except Exception as error:  # the hub, its cache and each file format raise their own kinds
        said = str(error).strip() or type(error).__name__
        raise ValueError(
            f"{where} could not be read ({said.splitlines()[0]}). Check the name and the network "
            f"(HF_HUB_OFFLINE), name a configuration as {name}:CONFIG/split, or give a .csv, .tsv or .jsonl "
            "file"
        ) from error


def is_saved_set(path: Path) -> bool:
    """Whether `save_to_disk` of datasets wrote this folder."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def hub_names(found: Any, column: str) -> list[str] | None:
    """The names of the classes, where a column of a hub data set declares them."""
    kind = (found.features or {}).get(column)
    return list(kind.names) if kind is not None and hasattr(kind, "names") else None


def named(label: str, names: Sequence[str] | None) -> str:
    """The name of a class by its number, where the data set declares names; "" for a number that has none."""
    if names is None:
        return label
    return names[int(label)] if label.isdecimal() and int(label) < len(names) else ""
