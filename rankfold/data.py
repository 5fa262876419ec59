"""Text for calibration and evaluation, named by one grammar: `NAME[:split][:NxL]`.

NAME is a packaged text (`wikipedia`, `pydoc`, `brown`, `sotu` …), a `.txt` file (one document), a `.jsonl`
file (one a line), or a hub data set id (configuration before the split: `allenai/c4:en/train`). NxL is N
windows of L tokens. Split `test` of a packaged text is its even-numbered documents (0, 2, 4 ...), `train` the
odd-numbered: what a model is calibrated on and what it is judged on never share a document.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfold.data_packaged import SPLITS, TEXTS, fetch, labelled, texts

__all__ = [
    "SPLITS",
    "TEXTS",
    "Spec",
    "Windows",
    "documents",
    "fetch",
    "first_record",
    "labelled",
    "stream",
    "token_windows",
]

_SUFFIXES = (".txt", ".jsonl")
_GRAMMAR = "expected NAME[:split][:NxL], such as wikipedia:test:12x512"
# A hub data set may never end: stop after this many times the tokens that were asked for.
_SURPLUS = 8


@dataclass(frozen=True)
class Spec:
    """A text and how much of it: `sequences` windows of `length` tokens. None is the caller's default."""

    name: str
    split: str | None = None
    sequences: int | None = None
    length: int | None = None

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Read `NAME[:split][:NxL]`. A path may hold ':', as in `C:/a.txt`. ValueError says what is wrong."""
        name, size = text, None
        head, colon, tail = name.rpartition(":")
        if colon and re.fullmatch(r"[-+.\d]*[xX×][-+.\d]*", tail):
            if not (size := re.fullmatch(r"([1-9]\d*)[xX×]([1-9]\d*)", tail)):
                raise ValueError(
                    f"{tail!r} in {text!r} is not N windows of L tokens, both positive; {_GRAMMAR}"
                )
            name = head
        split = None
        head, colon, tail = name.rpartition(":")
        if colon and re.fullmatch(r"\w[\w.+-]*(/\w[\w.+-]*)?", tail) and not tail.endswith(_SUFFIXES):
            name, split = head, tail
        if not name:
            raise ValueError(f"no text is named in {text!r}; {_GRAMMAR}")
        if name in TEXTS and split is not None and split not in SPLITS:
            raise ValueError(f"{name!r} has no split {split!r}: choose {', '.join(SPLITS)}; {_GRAMMAR}")
        if name.endswith(_SUFFIXES) and split is not None:
            raise ValueError(f"the file {name!r} has no splits, but {split!r} was asked for; {_GRAMMAR}")
        if ":" in name and not name.endswith(_SUFFIXES) and not re.match(r"[A-Za-z]:[\\/]", name):
            raise ValueError(f"cannot read {text!r}: {name!r} is neither a text nor a file; {_GRAMMAR}")
        return cls(name, split, int(size[1]) if size else None, int(size[2]) if size else None)

    def __str__(self) -> str:
        size = f"{self.sequences}x{self.length}" if self.sequences else None
        return ":".join(part for part in (self.name, self.split, size) if part)


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows and where they come from. `input_ids`: (N, L) int64; `documents`: how many were read."""

    input_ids: Tensor
    spec: str
    bos: bool
    documents: int

    @property
    def hash(self) -> str:
        """SHA-256 of the token ids (little-endian int64, row by row), in hex: equal data, equal hash."""
        return hashlib.sha256(self.input_ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """What a report says about its data; `tokens` = N * L."""
        sequences, length = self.input_ids.shape
        return {
            "spec": self.spec,
            "hash": self.hash,
            "sequences": sequences,
            "tokens": sequences * length,
            "length": length,
            "bos": self.bos,
            "documents": self.documents,
        }


def first_record(name: str) -> dict[str, Any]:
    """The object on the first line of a .jsonl file; empty where there is no such file or no object on it."""
    path = Path(name)
    if path.suffix != ".jsonl" or not path.is_file():
        return {}
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        first = next((line for line in lines if line.strip()), "")
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def documents(
    spec: str | Spec, *, split: str = "test", tokenizer: Any = None, limit: int | None = None
) -> list[str]:
    """The documents of a text, in order. `split` is for a spec that names none.

    `limit` takes the first so many: give one for a hub data set, which may be larger than memory. Chat
    records ("messages") go through the chat template of `tokenizer`. ValueError for a text that is missing,
    empty or malformed: which line or byte, and the remedy.
    """
    return list(islice(stream(_as_spec(spec), split, tokenizer), limit))


def token_windows(
    source: str | Spec | Iterable[str],
    tokenizer: Any,
    *,
    sequences: int | None = None,
    length: int | None = None,
    split: str = "test",
    bos: bool = False,
    seed: int = 0,
    spread: str = "even",
) -> Windows:
    """N windows of L tokens from a spec, or from any iterable of strings (each a document).

    Documents are tokenized without special tokens (`bos`: the BOS token before each), then concatenated.
    `spread="even"` is the evaluation protocol: the first window starts at token 0, the last ends with the
    text, the others evenly between (12 of 512 by convention). `spread="random"` is for calibration: drawn by
    `seed`, without overlap. Sizes and split in the spec win over `sequences`, `length` and `split`. A hub
    data set is read only until it has given 8 * N * L tokens. ValueError for fewer than N * L tokens.
    """
    if spread not in ("even", "random"):
        raise ValueError(f"spread={spread!r} is neither 'even' nor 'random'")
    if isinstance(source, str | Spec):
        spec = _as_spec(source)
        sequences, length = spec.sequences or sequences, spec.length or length
        named = None if spec.name.endswith(_SUFFIXES) else spec.split or split
        label, found = Spec(spec.name, named, sequences, length), stream(spec, split, tokenizer)
        cut = _SURPLUS if not (spec.name in TEXTS or spec.name.endswith(_SUFFIXES)) else None
    else:
        label, found, cut = Spec("(given texts)", None, sequences, length), iter(source), None
    if not sequences or not length or min(sequences, length) < 1:
        raise ValueError(f"sequences={sequences} and length={length} must be positive: name the size, NxL")
    first = [tokenizer.bos_token_id] if bos else []
    if first == [None]:
        raise ValueError("bos=True, but the tokenizer has no BOS token; use bos=False")
    ids: list[int] = []
    count, needed = 0, sequences * length
    for text in found:
        ids += first + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        count += 1
        if cut and len(ids) >= cut * needed:
            break
    starts = _starts(len(ids), sequences, length, str(label), None if spread == "even" else seed)
    tokens = torch.tensor(ids, dtype=torch.int64)
    return Windows(torch.stack([tokens[start : start + length] for start in starts]), str(label), bos, count)


def _starts(total: int, sequences: int, length: int, label: str, seed: int | None) -> list[int]:
    """Where each window begins: evenly spread (`seed` None) or drawn without overlap."""
    if total < sequences * length:
        fits = (
            f"at most {total // length} windows of {length}"
            if total >= length
            else f"windows of at most {total}"
        )
        raise ValueError(
            f"text {label!r} has {total} tokens, but {sequences} windows of {length} need "
            f"{sequences * length}: ask for {fits}, or give a longer text"
        )
    if seed is None:
        return [i * (total - length) // max(sequences - 1, 1) for i in range(sequences)]
    draw = torch.Generator().manual_seed(seed)
    slots = total // length
    offset = int(torch.randint(total - slots * length + 1, (1,), generator=draw))
    return [offset + length * slot for slot in torch.randperm(slots, generator=draw)[:sequences].tolist()]


def _as_spec(spec: str | Spec) -> Spec:
    return Spec.parse(spec) if isinstance(spec, str) else spec


def stream(spec: Spec, split: str, tokenizer: Any = None) -> Iterator[str]:
    """The documents of a text one by one, without holding a hub data set in memory; see `documents`."""
    split = spec.split or split
    if spec.name in TEXTS:
        if split not in SPLITS:
            raise ValueError(f"{spec.name!r} has no split {split!r}: choose {', '.join(SPLITS)}")
        return iter(texts(spec.name, split))
    if spec.name.endswith(_SUFFIXES):
        return _file(Path(spec.name), tokenizer)
    near = difflib.get_close_matches(spec.name, TEXTS, n=1)
    if near:
        raise ValueError(f"no text {spec.name!r}. Did you mean {near[0]!r}?")
    return _hub(spec.name, split, tokenizer)


def _file(path: Path, tokenizer: Any) -> Iterator[str]:
    try:
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except FileNotFoundError as error:
        raise ValueError(f"no file '{path}'") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"'{path}' is not UTF-8: byte {error.start} is {error.object[error.start]:#04x} "
            f"({error.reason}). Convert it, for example: iconv -f LATIN1 -t UTF-8"
        ) from error
    if not text.strip():
        raise ValueError(f"'{path}' is empty: give a file with text in it")
    if path.suffix == ".txt":
        yield text
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"'{path}', line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
        yield _text(record, where, tokenizer)


def _hub(name: str, split: str, tokenizer: Any) -> Iterator[str]:
    configuration, _, part = split.rpartition("/")
    where = f"data set {name!r}, split {split!r}"
    try:
        import datasets

        records = iter(datasets.load_dataset(name, configuration or None, split=part, streaming=True))
        record: Any = next(records, None)
    except Exception as error:  # the hub, its cache and each file format raise their own kinds
        said = str(error).strip() or type(error).__name__
        raise ValueError(
            f"{where} could not be read ({said}). Check the name and the network (HF_HUB_OFFLINE), name a "
            f"configuration as {name}:CONFIG/split, or use a .txt or .jsonl file or a packaged text "
            f"({', '.join(TEXTS)})"
        ) from error
    if record is None:
        raise ValueError(f"{where} is empty")
    while record is not None:
        yield _text(record, where, tokenizer)
        record = next(records, None)


def _text(record: Any, where: str, tokenizer: Any) -> str:
    """The text of one record: its "text" (or "content"), or its chat "messages" through the chat template."""
    if isinstance(record, dict):
        for field in ("text", "content"):
            if isinstance(record.get(field), str):
                return record[field]
        if isinstance(record.get("messages"), list):
            if tokenizer is None or not tokenizer.chat_template:
                raise ValueError(
                    f'{where}: "messages" need a tokenizer with a chat template; give "text" instead'
                )
            return tokenizer.apply_chat_template(record["messages"], tokenize=False)
    has = sorted(record) if isinstance(record, dict) else type(record).__name__
    raise ValueError(f'{where}: no "text" field that is a string (there is {has})')
