"""What a language model is adapted on: windows of text, or conversations; each plan checks names at once, and
reads when there is a tokenizer.

    text   windows of `length` tokens, the loss on all of them (`rankfold.heal_data`)
    chat   a conversation a row, cut at `length`, the loss on the answers alone (`rankfold.adapt.chat`)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from rankfold import data as texts
from rankfold.adapt.chat import (
    Conversations,
    Padded,
    answer_loss,
    check_all_chat,
    check_template,
    conversations,
    digest,
    encode_chat,
    is_chat,
    split,
)
from rankfold.evaluate import perplexity
from rankfold.heal_data import judged_on, plans, read
from rankfold.metrics import Progress
from rankfold.pretrain.run import Run
from rankfold.pretrain.trainer import validate

TOKENS, EPOCHS = 300_000, 3  # where nothing is said


@dataclass
class Material:
    """Data in the order of a run; `score`: nats a token on what is held out; `tests`: perplexity of each."""

    train: Dataset[Any]
    collate: Callable[[Sequence[Any]], dict[str, Tensor]]
    score: Callable[[nn.Module], float]
    tests: dict[str, Callable[[nn.Module], float]]
    facts: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the command line says of data and length."""

    data: tuple[str, ...]
    validation: tuple[str, ...]
    tests: tuple[str, ...]
    held_out: float
    validation_tokens: int
    length: int
    rows: int  # in a step
    epochs: int | None
    steps: int | None
    tokens: int | None

    def plan(self) -> Texts | Chats:
        """Raises ValueError for names that cannot be, before anything is read."""
        given = [name for name in ("epochs", "steps", "tokens") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"how long to train: one of {', '.join(f'--{name}' for name in given)}")
        for name in given:
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: at least 1")
        if not self.data:
            raise ValueError("no text to train on: --data SPEC, such as --data wikipedia or --data my.jsonl")
        chats = [is_chat(spec) for spec in self.data]
        return Chats(self) if any(chats) else Texts(self)


class Texts:
    """Plain text."""

    def __init__(self, wanted: Wanted) -> None:
        if wanted.epochs is not None:
            raise ValueError("--epochs: of labelled examples and conversations; of a text say --tokens")
        self.wanted = wanted
        window = wanted.rows * wanted.length
        tokens = TOKENS if wanted.tokens is None else wanted.tokens
        self.steps = wanted.steps or math.ceil(tokens / max(window, 1))
        self.windows = self.steps * wanted.rows
        self.plans = plans(
            wanted.data,
            wanted.validation,
            length=wanted.length,
            windows=self.windows,
            held_out=wanted.held_out,
            validation_tokens=wanted.validation_tokens,
        )
        self.judged = judged_on(wanted.data, wanted.tests)

    def open_(self, tokenizer: Any, name: str) -> None:
        """Nothing of a text is read before there is a run."""

    def to_json(self) -> dict[str, Any]:
        return {"text": [plan.to_json() for plan in self.plans]}

    def read(self, run: Run, tokenizer: Any, batch_size: int, seed: int, tell: Progress) -> Material:
        text = read(run, self.plans, tokenizer, self.windows, seed, tell)
        judged = {str(spec): texts.token_windows(spec, tokenizer, split="test") for spec in self.judged}

        def test(windows: Tensor) -> Callable[[nn.Module], float]:
            return lambda model: perplexity(model, windows)

        return Material(
            text.train,
            _windows,
            lambda model: validate(model, text.held_out, batch_size),
            {name: test(found.input_ids) for name, found in judged.items()},
            {
                "kind": "text",
                "sources": text.facts,
                "tokens": self.windows * self.wanted.length,
                "held_out_tokens": text.held_out.numel(),
                "tests": {name: found.facts() for name, found in judged.items()},
            },
        )


class Chats:
    """Conversations. `steps` is known once they are read."""

    def __init__(self, wanted: Wanted) -> None:
        if wanted.tokens is not None:
            raise ValueError("--tokens: of texts; of conversations say --epochs or --steps")
        if not 0 < wanted.held_out < 1:
            raise ValueError(f"--held-out {wanted.held_out}: the share for validation, above 0 and below 1")
        check_all_chat((*wanted.data, *wanted.validation, *wanted.tests))
        for spec in (*wanted.data, *wanted.validation, *wanted.tests):
            conversations(spec)
        self.wanted, self.steps, self.warnings = wanted, wanted.steps or 1, []

    def open_(self, tokenizer: Any, name: str) -> None:
        check_template(tokenizer, name)
        wanted = self.wanted
        self.collate = Padded(
            next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
        )
        self.train = self._rows(wanted.data, tokenizer)
        if wanted.validation:
            self.held = self._rows(wanted.validation, tokenizer)
        else:
            self.train, self.held = split(self.train, wanted.held_out)
        self.tests = {spec: self._rows((spec,), tokenizer) for spec in wanted.tests}
        if wanted.steps is None:
            self.steps = math.ceil((wanted.epochs or EPOCHS) * len(self.train) / wanted.rows)

    def _rows(self, specs: Sequence[str], tokenizer: Any) -> list[Any]:
        found = []
        for spec in specs:
            rows, cut, out = encode_chat(spec, tokenizer, self.wanted.length)
            found += rows
            if cut:
                self.warnings.append(
                    f"{cut} conversations of '{spec}' are longer than {self.wanted.length} tokens and were "
                    f"cut there (--length); {out} of them have no answer before that and were left out"
                )
        return found

    def to_json(self) -> dict[str, Any]:
        wanted = self.wanted
        return {
            "chat": digest(wanted.data),
            "validation": digest(wanted.validation),
            "held_out": wanted.held_out,
            "length": wanted.length,
        }

    def read(self, run: Run, tokenizer: Any, batch_size: int, seed: int, tell: Progress) -> Material:
        collate, wanted = self.collate, self.wanted

        def test(rows: list[Any]) -> Callable[[nn.Module], float]:
            return lambda model: math.exp(min(answer_loss(model, rows, collate, batch_size), 700))

        return Material(
            Conversations(self.train, self.steps * wanted.rows, seed),
            collate,
            lambda model: answer_loss(model, self.held, collate, batch_size),
            {name: test(rows) for name, rows in self.tests.items()},
            {
                "kind": "chat",
                "sources": list(wanted.data),
                "conversations": len(self.train),
                "answer_tokens": sum(sum(row.answer) for row in self.train),
                "held_out_conversations": len(self.held),
                "tests": {name: {"conversations": len(rows)} for name, rows in self.tests.items()},
            },
            self.warnings,
        )


def _windows(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}
