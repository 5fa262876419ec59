"""Conversations: {"messages": [{"role", "content"}, …]} a line, through the tokenizer's chat template.

    text of the first i messages is a prefix of the text of more  ->  what message i added is the i-th turn

Loss falls on the turns of the assistant alone. A template that writes earlier turns otherwise once later ones
follow has no such prefixes, and is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from rankfold.data import first_record

IGNORED = -100


@dataclass(frozen=True)
class Row:
    """Token ids of one conversation, and whether each is of an answer. `key`: a hash of its text."""

    ids: list[int]
    answer: list[bool]
    key: bytes


def is_chat(spec: str) -> bool:
    """Whether SPEC is a .jsonl file whose first line has "messages", and no text."""
    record = first_record(spec)
    return "messages" in record and not any(isinstance(record.get(key), str) for key in ("text", "content"))


def conversations(spec: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """(place, messages) of every line. Raises ValueError, with the line, for what is no conversation with an
    answer in it."""
    found = []
    for number, line in enumerate(Path(spec).read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        where = f"'{spec}', line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON ({error})") from error
        messages = record.get("messages") if isinstance(record, dict) else None
        good = isinstance(messages, list) and all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
        if not good or not messages:
            raise ValueError(
                f'{where}: "messages" must be a list of {{"role": …, "content": …}}, two strings'
            )
        if not any(m["role"] == "assistant" for m in messages):
            raise ValueError(f"{where}: no message is of the assistant, so there is nothing to learn")
        found.append((where, messages))
    if not found:
        raise ValueError(f"'{spec}' has no conversations in it")
    return found


def check_template(tokenizer: Any, name: str) -> None:
    """Raise ValueError where conversations cannot be written as text."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f'the data has chat "messages", and the tokenizer of {name} has no chat template. Give it one '
            "(tokenizer.chat_template = …, tokenizer.save_pretrained(FOLDER)), or write each conversation "
            'as {"text": …}'
        )
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of {name} is a slow one, which does not say where a token begins")


def encode_chat(spec: str, tokenizer: Any, length: int) -> tuple[list[Row], int, int]:
    """(rows, how many were cut at `length` tokens, how many were left out since no answer remained)."""
    rows, cut, out = [], 0, 0
    for where, messages in conversations(spec):
        text, spans = _turns(tokenizer, messages, where)
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        places = found["offset_mapping"]
        answer = [any(a <= low < high <= b for a, b in spans) for low, high in places]
        cut += len(places) > length
        if not any(answer[1:length]):
            out += 1
            continue
        key = hashlib.blake2b(text.encode(), digest_size=16).digest()
        rows.append(Row(found["input_ids"][:length], answer[:length], key))
    if not rows:
        raise ValueError(f"'{spec}': no answer begins within --length {length} tokens; raise it")
    return rows, cut, out


def _turns(tokenizer: Any, messages: Sequence[Any], where: str) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation and the spans (from, to) of its answers."""

    def said(count: int, prompt: bool = False) -> str:
        if not count:
            return ""
        try:
            return tokenizer.apply_chat_template(
                list(messages[:count]), tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # a template raises what it likes
            raise ValueError(f"{where}: the chat template refuses it: {error}") from error

    whole, spans = said(len(messages)), []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        upto, before = said(place + 1), said(place, prompt=True)
        if not upto.startswith(before):
            before = said(place)
        if not (whole.startswith(upto) and upto.startswith(before)):
            raise ValueError(
                f"{where}: the chat template writes earlier turns otherwise once later ones follow, so that "
                "answers cannot be told from the rest; give one question and answer a line"
            )
        spans.append((len(before), len(upto)))
    return whole, spans


def split(rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
    """(training, held out) by the hash of the text: equal conversations on one side, whatever the seed."""
    held = [row for row in rows if int.from_bytes(row.key[:7], "big") < share * 2**56]
    train = [row for row in rows if int.from_bytes(row.key[:7], "big") >= share * 2**56]
    if not held or not train:
        raise ValueError(
            f"--held-out {share:g} of {len(rows)} conversations leaves {len(train)} to train on and "
            f"{len(held)} to validate on; change it, or name a file with --validation"
        )
    return train, held


class Conversations(Dataset[Row]):
    """`count` rows in the order of a run: item i depends on the seed and i alone; each once an epoch."""

    def __init__(self, rows: Sequence[Row], count: int, seed: int) -> None:
        self.rows, self.count, self.seed = rows, count, seed
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Row:
        epoch, place = divmod(index, len(self.rows))
        if self._order[0] != epoch:
            draw = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
            self._order = epoch, torch.randperm(len(self.rows), generator=draw).tolist()
        return self.rows[self._order[1][place]]


@dataclass(frozen=True)
class Padded:
    """A collator: rows padded on the right; labels are the ids of answers, and -100 elsewhere."""

    pad: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        wide = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), wide), self.pad)
        labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        for at, row in enumerate(rows):
            known = torch.tensor(row.ids)
            ids[at, : len(known)], mask[at, : len(known)] = known, 1
            labels[at, : len(known)] = torch.where(torch.tensor(row.answer), known, IGNORED)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def answer_loss(model: Any, rows: Sequence[Row], collate: Padded, batch_size: int) -> float:
    """Mean -log p over the tokens of answers, in nats: summed in float64, divided once."""
    place, was = next(model.parameters()).device, model.training
    total, count = 0.0, 0
    model.eval()
    for start in range(0, len(rows), batch_size):
        batch = {key: t.to(place) for key, t in collate(rows[start : start + batch_size]).items()}
        targets = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        scored = targets != IGNORED
        total += float(F.cross_entropy(logits[scored], targets[scored], reduction="none").double().sum())
        count += int(scored.sum())
    model.train(was)
    return total / count


def digest(specs: Sequence[str]) -> dict[str, str]:
    """{file: hash of its bytes}."""
    return {spec: hashlib.blake2b(Path(spec).read_bytes(), digest_size=16).hexdigest() for spec in specs}


def check_all_chat(specs: Sequence[str]) -> None:
    """Raise ValueError for texts among conversations, and for files that are not there."""
    for spec in specs:
        if not is_chat(spec):
            raise ValueError(
                f"{spec!r} is no .jsonl file of conversations, and others of --data, --validation or --test "
                "are: texts and conversations do not mix in a run"
            )
