"""Labelled text for classifiers: padded batches with "labels", from a packaged text or a `.jsonl` file.

The packaged ones are `movie`, `tweets`, `spam`, `sentiment` and `brown_genres`, with the splits `train` and
`test` (see data_classes). A line of a file is {"text": …, "label": 0, 1, …}.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import torch

from rankfold.batches import Batch
from rankfold.data import Spec, first_record
from rankfold.data_packaged import CLASSES, labelled
from rankfold.data_packaged import rows as rows_of


def is_labelled(spec: Spec) -> bool:
    """Does this text carry class labels?"""
    return spec.name in CLASSES or "label" in first_record(spec.name)


def labelled_batches(
    spec: Spec,
    tokenizer: Any,
    *,
    split: str,
    batch_size: int,
    seed: int | None = None,
    count: int = 512,
) -> tuple[list[Batch], dict[str, Any]]:
    """Padded batches {"input_ids", "attention_mask", "labels"} and the facts of the data.

    `spec.sequences` (or `count`) examples: drawn by `seed`, or spread evenly over the text where seed is None
    (`movie` and many a file are sorted by class); longer ones are cut at `spec.length` (or 128) tokens.
    Raises ValueError for an empty file, a line without text or an integer label (its number is named), a
    split that there is not, and fewer examples than asked for.
    """
    if spec.name in CLASSES:
        part = rows_of(spec.name, spec.split or split)
        all_texts, all_labels = labelled(spec.name)
        texts, labels = [all_texts[i] for i in part], [all_labels[i] for i in part]
    else:
        texts, labels = _file(Path(spec.name))
    wanted = spec.sequences or min(count, len(texts))
    if wanted > len(texts):
        raise ValueError(f"{spec} asks for {wanted} examples, the text has {len(texts)}")
    if seed is None:
        order = [place * len(texts) // wanted for place in range(wanted)]
    else:
        order = list(range(len(texts)))
        random.Random(seed).shuffle(order)
        order = order[:wanted]
    batches: list[Batch] = []
    digest, tokens = hashlib.sha256(), 0
    for start in range(0, wanted, batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer(
            [texts[i] for i in rows],
            truncation=True,
            max_length=spec.length or 128,
            padding=True,
            return_tensors="pt",
            verbose=False,
        )
        tensors = {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": torch.tensor([labels[i] for i in rows]),
        }
        batches.append(tensors)
        tokens += int(batch["attention_mask"].sum())
        for value in tensors.values():
            digest.update(value.contiguous().numpy().astype("<i8").tobytes())
    facts = {
        "spec": str(spec),
        "hash": digest.hexdigest(),
        "sequences": wanted,
        "tokens": tokens,
        "length": spec.length or 128,
        "bos": False,
        "documents": wanted,
    }
    return batches, facts


def _file(path: Path) -> tuple[list[str], list[int]]:
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not UTF-8: byte {error.start}") from error
    texts, labels = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"'{path}', line {number}: not JSON ({error})") from error
        text, label = (record.get("text"), record.get("label")) if isinstance(record, dict) else (None, None)
        if not isinstance(text, str) or not isinstance(label, int) or isinstance(label, bool) or label < 0:
            raise ValueError(
                f'\'{path}\', line {number}: needs "text" (a string) and "label" (a class number)'
            )
        texts.append(text)
        labels.append(label)
    if not texts:
        raise ValueError(f"'{path}' is empty: give a file with examples in it")
    return texts, labels
