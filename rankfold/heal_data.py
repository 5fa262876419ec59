"""The text of a healing: every source gives the same share of the windows, a short one again in a new order.

Documents are held out by the hash of their text, among those that train: what a packaged text is judged on
(its even documents) is not touched, neither to train nor to choose the best state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rankfold import data as texts
from rankfold.metrics import Progress
from rankfold.pretrain.data import Plan, Source, parse_sources
from rankfold.pretrain.run import Run
from rankfold.pretrain.tokens import Packed, load_facts, prepare, validation_windows


def plans(
    data: Sequence[str],
    validation: Sequence[str],
    *,
    length: int,
    windows: int,
    held_out: float,
    validation_tokens: int,
) -> list[Plan]:
    """One plan for every source of `data`, of equal need. `validation`: texts to choose the best state on, in
    the place of documents held out. Raises ValueError before anything is read."""
    if not 0 < held_out < 1:
        raise ValueError(f"--held-out {held_out}: the share of documents for validation, above 0 and below 1")
    if validation_tokens < length:
        raise ValueError(f"--validation-tokens {validation_tokens}: at least one window of --length {length}")
    train, held = parse_sources(data, validation)
    single = next((source for source in train if source.single), None)
    if single is not None and not held:
        raise ValueError(
            f"{single} is one document, of which nothing can be held out: give a .jsonl file with a document "
            "a line, or name a text to validate on with --validation"
        )
    need = math.ceil(windows / len(train)) * length
    share = validation_tokens if held else max(length, validation_tokens // len(train))
    return [Plan((_odd(source),), length, need, held_out, held, share) for source in train]


def _odd(source: Source) -> Source:
    """A packaged text by its training documents alone."""
    if not source.parity:
        return source
    return replace(source, spec=replace(source.spec, split="train"), parity=False)


@dataclass(frozen=True)
class Text:
    """What a run reads: training windows in their order, held-out windows (M, L), facts of each source."""

    train: Dataset[dict[str, Tensor]]
    held_out: Tensor
    facts: list[dict[str, Any]]


def read(run: Run, wanted: Sequence[Plan], tokenizer: Any, windows: int, seed: int, tell: Progress) -> Text:
    """The text of a run, tokenized into its folder where that has not been done."""
    parts, held, found = [], [], []
    for place, plan in enumerate(wanted):
        folder = run.data / str(place)
        facts = load_facts(folder) or prepare(folder, plan, tokenizer, tell)
        parts.append(Packed(folder, facts, windows, seed))
        if not plan.validation or not held:
            held.append(validation_windows(folder, facts, plan.most_validation))
        found.append({key: value for key, value in facts.items() if key != "kind"})
    return Text(InTurn(parts, windows), torch.cat(held), found)


class InTurn(Dataset[dict[str, Tensor]]):
    """`count` windows, one of each part in turn: item i depends on the seed and i alone."""

    def __init__(self, parts: Sequence[Packed], count: int) -> None:
        self.parts, self.count = parts, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        place, part = divmod(index, len(self.parts))
        return {"input_ids": self.parts[part][place]["input_ids"]}


def judged_on(data: Sequence[str], tests: Sequence[str]) -> list[texts.Spec]:
    """The texts to judge on: those that were named, else the test documents of the packaged texts that train.
    Raises ValueError."""
    if tests:
        named = [texts.Spec.parse(item) for item in tests]
    else:
        names = dict.fromkeys(texts.Spec.parse(item).name for item in data)
        named = [texts.Spec(name, "test") for name in names if name in texts.TEXTS]
    return [replace(item, sequences=item.sequences or 12, length=item.length or 512) for item in named]
