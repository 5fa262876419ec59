"""The tokens of a pre-training run on disk, and the windows that it sees, in its order.

    tokens.bin = ids of document 1, EOS, ids of document 2, EOS, …        window j = ids[j L : (j + 1) L]

Written once and whole, so that a run that was killed reads the same tokens again, and any window can be
taken without reading those before it: what step k sees depends on the seed and k alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rankfold.atomic import writing
from rankfold.metrics import Progress
from rankfold.pretrain.data import Plan

FACTS, TRAIN, VALIDATION = "facts.json", "train.bin", "validation.bin"
_AT_ONCE = 64  # documents tokenized in one call


def prepare(folder: Path, plan: Plan, tokenizer: Any, progress: Progress | None = None) -> dict[str, Any]:
    """Tokenize into `folder` (whole or not at all) and return the facts; those that are there, if they are.

    Raises ValueError where there is nothing to train or to validate on, or no room on the disk.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no EOS token to part documents with; use --train-tokenizer SIZE")
    kind = np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4")
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if any(item.streamed for item in plan.sources) and free < plan.need * kind.itemsize:
        raise ValueError(
            f"{folder}: {plan.need:,} tokens need {plan.need * kind.itemsize:,} bytes, the disk has {free:,}"
        )
    # Only a streamed text is read to a number of tokens; the bar ends when all is written.
    total = plan.need + 1 if all(item.streamed for item in plan.sources) else None
    counts = {False: 0, True: 0}  # tokens, by whether they are held out
    documents = {False: 0, True: 0}
    with writing(folder) as beside:
        with open(beside / TRAIN, "wb") as train, open(beside / VALIDATION, "wb") as validation:
            for held, ids in _tokenized(plan, tokenizer, end, counts):
                (validation if held else train).write(np.asarray(ids, kind).tobytes())
                counts[held] += len(ids)
                documents[held] += 1
                if progress is not None:
                    progress("tokenize", counts[False], total)
        if progress is not None:
            progress("tokenize", counts[False], counts[False])
        _check_enough(plan, counts, documents)
        facts = {
            "spec": " + ".join(map(str, plan.sources)),
            "validation_spec": " + ".join(map(str, plan.validation)) or "held out",
            "documents": documents[False],
            "tokens": counts[False],
            "validation_documents": documents[True],
            "validation_tokens": counts[True],
            "length": plan.length,
            "kind": kind.str,
            "hash": _hash(beside),
        }
        (beside / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return facts


def _tokenized(
    plan: Plan, tokenizer: Any, end: int, counts: dict[bool, int]
) -> Iterator[tuple[bool, list[int]]]:
    """(held out, ids with EOS) of each document; `counts` says what there is already."""

    def enough(held: bool) -> bool:
        return counts[held] >= (plan.most_validation if held else plan.need)

    wanted = plan.read(tokenizer, enough)
    while batch := list(itertools.islice(wanted, _AT_ONCE)):
        ids = tokenizer([text for _, text in batch], add_special_tokens=False, verbose=False)["input_ids"]
        for (held, _), one in zip(batch, ids, strict=True):
            yield held, [*one, end]


def _check_enough(plan: Plan, counts: dict[bool, int], documents: dict[bool, int]) -> None:
    names = " + ".join(map(str, plan.sources))
    if counts[False] < plan.length:
        raise ValueError(
            f"text {names!r} has {counts[False]} tokens to train on (in {documents[False]} documents), one "
            f"window of --length has {plan.length}: give more text, or a smaller --length"
        )
    if counts[True] < plan.length:
        raise ValueError(
            f"{documents[True]} documents of {documents[False] + documents[True]} of {names!r} are held out, "
            f"with {counts[True]} tokens; validation needs at least one window of {plan.length}. Raise "
            f"--held-out (it is {plan.held_out:g}), or name a text with --validation"
        )


def load_facts(folder: Path) -> dict[str, Any] | None:
    """The facts of tokens that `prepare` left, None where there are none. Raises ValueError where the files
    are not those that it wrote."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if facts["hash"] != _hash(folder):
        raise ValueError(f"{folder}: the tokens are not those that were written; start anew with --restart")
    return facts


def _hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in (TRAIN, VALIDATION):
        with open(folder / name, "rb") as file:
            while part := file.read(2**24):
                digest.update(part)
        digest.update(b"|")
    return digest.hexdigest()


class Packed(Dataset[dict[str, Tensor]]):
    """The windows that a run trains on, in its order: item i depends on the seed and i alone.

    Every epoch has each window once, in an order of its own. input_ids and labels: (length,) int64.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], count: int, seed: int) -> None:
        length = facts["length"]
        tokens = np.memmap(folder / TRAIN, np.dtype(facts["kind"]), "r")
        self.windows = tokens[: len(tokens) // length * length].reshape(-1, length)
        self.count, self.seed = count, seed
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, place = divmod(index, len(self.windows))
        if self._order[0] != epoch:
            draw = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
            self._order = epoch, torch.randperm(len(self.windows), generator=draw)
        row = self.windows[int(self._order[1][place])]
        ids = torch.from_numpy(row.astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def validation_windows(folder: Path, facts: dict[str, Any], most: int) -> Tensor:
    """Windows (N, length) int64, at most `most` tokens, evenly spread over the validation text."""
    length = facts["length"]
    tokens = np.fromfile(folder / VALIDATION, np.dtype(facts["kind"])).astype(np.int64)
    count = max(1, min(most, len(tokens)) // length)
    starts = [i * (len(tokens) - length) // max(count - 1, 1) for i in range(count)]
    return torch.from_numpy(np.stack([tokens[start : start + length] for start in starts]))
