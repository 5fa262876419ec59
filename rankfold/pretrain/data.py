"""The text of a pre-training run: which documents train, and which validate.

A packaged text trains on its odd documents and validates on the even ones, as everywhere here. Of another
source a document is held out when the hash of its text says so: equal documents are always on one side. A
hub data set is read until the run has what it needs, and no further.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rankfold import data as texts

_MOST = 100_000_000  # characters that a tokenizer is trained on
_CHARACTERS = 5  # to a token, about


@dataclass(frozen=True)
class Source:
    """One text of a run. `streamed`: from the hub, without a known end."""

    spec: texts.Spec
    streamed: bool
    parity: bool  # a packaged text, whose odd documents train and whose even ones validate

    @classmethod
    def parse(cls, text: str, training: bool = True) -> Source:
        """Read a SPEC without a size. Raises ValueError for what cannot be used, before anything is read."""
        spec = texts.Spec.parse(text)
        if spec.sequences:
            raise ValueError(
                f"{text!r} names a number of windows; pre-training reads as much as --tokens or --steps "
                f"need, in windows of --length: leave out ':{spec.sequences}x{spec.length}'"
            )
        packaged, file = spec.name in texts.TEXTS, spec.name.endswith((".txt", ".jsonl"))
        if packaged and training and spec.split == "test":
            raise ValueError(
                f"{text!r} is what models are judged on: train on {spec.name!r} (its odd documents; the even "
                "ones validate)"
            )
        if file and not Path(spec.name).is_file():
            raise ValueError(f"no file '{spec.name}'")
        near = difflib.get_close_matches(spec.name, texts.TEXTS, n=1)
        if near and not packaged and not file:
            raise ValueError(f"no text {spec.name!r}. Did you mean {near[0]!r}?")
        default = "all" if packaged and training else "test" if packaged else "train"
        parity = packaged and training and spec.split in (None, "train")
        split = "all" if parity else spec.split or default
        return cls(replace(spec, split=None if file else split), not (packaged or file), parity)

    def __str__(self) -> str:
        return self.spec.name if self.parity else str(self.spec)

    @property
    def single(self) -> bool:
        """One document, which trains."""
        return self.spec.name.endswith(".txt")

    def documents(self, tokenizer: Any = None) -> Iterator[str]:
        return texts.stream(self.spec, "all", tokenizer)

    def digest(self) -> str | None:
        """Hash of what the source holds now; None for a streamed one, which only its name identifies."""
        if self.streamed:
            return None
        digest = hashlib.blake2b(digest_size=16)
        if self.spec.name in texts.TEXTS:
            for text in texts.TEXTS[self.spec.name]():
                digest.update(text.encode() + b"\0")
        else:
            digest.update(Path(self.spec.name).read_bytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Plan:
    """What is read, and how much of it.

    need             tokens that training consumes: steps x batch x length; fewer are repeated in new order
    held_out         share of the documents of a source that is not packaged, for validation
    validation       sources for validation instead; the others then train whole
    most_validation  tokens of validation at most
    """

    sources: tuple[Source, ...]
    length: int
    need: int
    held_out: float
    validation: tuple[Source, ...] = ()
    most_validation: int = 131_072

    def to_json(self) -> dict[str, Any]:
        """What identifies the text of a run; reads local files."""
        return {
            "text": {str(item): item.digest() for item in self.sources},
            "validation": {str(item): item.digest() for item in self.validation},
            "length": self.length,
            "held_out": self.held_out,
            "validation_tokens": self.most_validation,
        }

    def read(self, tokenizer: Any, enough: Callable[[bool], bool]) -> Iterator[tuple[bool, str]]:
        """(held out, text) of every document, one of each source in turn. `enough(held)` ends the streamed
        sources. Documents that validation holds never train, whatever source they come from."""
        seen: set[bytes] = set()
        for item in self.validation:
            for text in item.documents(tokenizer):
                seen.add(_key(text))
                yield True, text
                if item.streamed and enough(True):
                    break
        split = [item for item in self.sources if item.parity and not self.validation]
        seen |= {_key(text) for item in split for text in itertools.islice(item.documents(), 0, None, 2)}
        streams = [(item, enumerate(item.documents(tokenizer))) for item in self.sources]
        while streams:
            for item, stream in list(streams):
                place, text = (None, "") if item.streamed and enough(False) else next(stream, (None, ""))
                if place is None:
                    streams.remove((item, stream))
                    continue
                key = _key(text)
                if self.validation or item.single:
                    held = False
                elif item.parity:
                    held = place % 2 == 0
                else:
                    held = int.from_bytes(key[:7], "big") < self.held_out * 2**56
                if text.strip() and (held or key not in seen):
                    yield held, text

    def training_text(self, tokenizer: Any = None) -> Iterator[str]:
        """Documents of training alone, as many as a tokenizer learns from: of a streamed source about as
        much as training reads."""
        streamed = any(item.streamed for item in self.sources)
        left = min(_MOST, _CHARACTERS * self.need) if streamed else _MOST
        for held, text in self.read(tokenizer, lambda _: False):
            if not held:
                yield text
                left -= len(text)
            if left <= 0:
                return


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.strip().encode(), digest_size=16).digest()


def parse_sources(specs: Sequence[str], validation: Sequence[str]) -> tuple[tuple[Source, ...], ...]:
    """(training, validation) sources. Raises ValueError before anything is read."""
    if not specs:
        raise ValueError("no text to train on: --data SPEC, such as --data wikipedia or --data my.jsonl")
    train = tuple(Source.parse(item) for item in dict.fromkeys(specs))
    held = tuple(Source.parse(item, training=False) for item in dict.fromkeys(validation))
    if all(item.single for item in train) and not held:
        raise ValueError(
            f"{', '.join(map(str, train))}: a .txt file is one document, and training and validation "
            "share none; name another text with --validation, or write one document a line in a .jsonl file"
        )
    return train, held
