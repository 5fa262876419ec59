"""Texts as token ids, in batches of like length; and what a model says about them, in the order of the texts.

A batch is padded to its own longest row. In training the order of an epoch depends on the seed and the epoch
alone: texts are shuffled, then sorted by length within stretches of 50 batches, and the batches shuffled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from rankfold.metrics import Progress

_STRETCH = 50  # batches within which rows are sorted by length
_AT_ONCE = 1024  # texts that the tokenizer is given


class Inputs(Protocol):
    """What a model reads, row by row: texts (`Encoded`), or images (`rankfold.adapt.pixels`)."""

    def __len__(self) -> int: ...

    def length_of(self, row: int) -> int:
        """Tokens of a row: rows of like length share a batch."""
        ...

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """What the model is called with."""
        ...

    def varied(self, rows: Sequence[int], seed: int, epoch: int) -> dict[str, Tensor]:
        """The same as it is trained on in an epoch, with what is changed at random, decided by the arguments
        alone."""
        ...


@dataclass(frozen=True)
class Encoded:
    """Token ids of texts. `cut`: how many were longer than `length` and are cut there; `pad`: what fills."""

    ids: list[list[int]]
    cut: int
    length: int
    pad: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def mean_length(self) -> int:
        return max(1, round(sum(map(len, self.ids)) / max(len(self.ids), 1)))

    def length_of(self, row: int) -> int:
        return len(self.ids[row])

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """input_ids and attention_mask (rows, longest) int64, padded on the right; a text without a token is
        padding alone."""
        wide = max(1, *(len(self.ids[row]) for row in rows))
        ids = torch.full((len(rows), wide), self.pad)
        mask = torch.zeros(len(rows), wide, dtype=torch.long)
        for at, row in enumerate(rows):
            found = self.ids[row]
            ids[at, : len(found)] = torch.tensor(found, dtype=torch.long)
            mask[at, : len(found)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def varied(self, rows: Sequence[int], seed: int, epoch: int) -> dict[str, Tensor]:
        return self.batch(rows)


def by_length(data: Inputs, batch_size: int) -> list[list[int]]:
    """Rows in batches of like length, the longest first, so that memory runs out early if at all."""
    order = sorted(range(len(data)), key=lambda row: -data.length_of(row))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def encode(tokenizer: Any, texts: Sequence[str], length: int) -> Encoded:
    """Tokenize, with the special tokens that the tokenizer adds, and cut at `length` tokens."""
    ids: list[list[int]] = []
    cut = 0
    special = tokenizer.num_special_tokens_to_add()
    for start in range(0, len(texts), _AT_ONCE):
        part = list(texts[start : start + _AT_ONCE])
        whole = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        cut += sum(len(row) + special > length for row in whole)
        ids += tokenizer(part, truncation=True, max_length=length, verbose=False)["input_ids"]
    return Encoded(ids, cut, length, tokenizer.pad_token_id or 0)


class Batches(Dataset[dict[str, Tensor]]):
    """The batches that a run trains on, in its order: item i depends on the seed and i alone."""

    def __init__(self, data: Inputs, labels: Sequence[int], batch_size: int, epochs: int, seed: int) -> None:
        self.data, self.labels = data, torch.tensor(labels)
        self.batch_size, self.epochs, self.seed = batch_size, epochs, seed
        self.per_epoch = -(-len(data) // batch_size)
        self._order: tuple[int, list[list[int]]] = (-1, [])

    def __len__(self) -> int:
        return self.epochs * self.per_epoch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, place = divmod(index, self.per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, self._epoch(epoch)
        rows = self._order[1][place]
        return {**self.data.varied(rows, self.seed, epoch), "labels": self.labels[rows]}

    def _epoch(self, epoch: int) -> list[list[int]]:
        draw = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        order = torch.randperm(len(self.data), generator=draw).tolist()
        batches = []
        for start in range(0, len(order), _STRETCH * self.batch_size):
            part = order[start : start + _STRETCH * self.batch_size]
            part.sort(key=self.data.length_of)
            batches += [part[at : at + self.batch_size] for at in range(0, len(part), self.batch_size)]
        return [batches[at] for at in torch.randperm(len(batches), generator=draw).tolist()]


@torch.no_grad()
def logits_of(
    model: nn.Module, data: Inputs, batch_size: int, *, tell: Progress | None = None, stage: str = "predict"
) -> Tensor:
    """Logits (rows, classes) float32 on the CPU, in the order of the rows; eval mode, given back after."""
    place = next(model.parameters()).device
    was, found, done = model.training, None, 0
    model.eval()
    try:
        for rows in by_length(data, batch_size):
            batch = {key: value.to(place) for key, value in data.batch(rows).items()}
            logits = model(**batch).logits.float().cpu()
            if found is None:
                found = torch.empty(len(data), logits.shape[-1])
            found[rows] = logits
            done += len(rows)
            if tell is not None:
                tell(stage, done, len(data))
    finally:
        model.train(was)
    assert found is not None
    return found
