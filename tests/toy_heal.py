"""The smallest healing: a 2-layer model of 128 words whose logits say something, its twin, a text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfold import factorize_, recipes, save
from rankfold.storage import store_values_

RUN: dict[str, Any] = {
    "tokens": 6 * 2 * 16,
    "length": 16,
    "batch_size": 2,
    "lr": 5e-4,
    "held_out": 0.25,
    "validation_tokens": 64,
    "eval_every": 3,
    "save_every": 2,
    "device": "cpu",
}


def sharp(model: Any) -> Any:
    """Random weights large enough that the distributions differ from token to token."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return model


def windows(count: int, seed: int, length: int = 16) -> Tensor:
    """Token ids of a dozen words, so that what is learned from some windows serves others."""
    return torch.randint(4, 16, (count, length), generator=torch.Generator().manual_seed(seed))


def small(
    make: Callable[..., Any], recipe: Any = recipes.rocket, budget: float = 0.6, storage: str = ""
) -> Any:
    """A compressed twin of `sharp(make())`."""
    model = sharp(make())
    factorize_(model, recipe, budget=budget, batches=[{"input_ids": windows(8, 3)}])
    if storage:
        store_values_(model, storage)
    return model


def text(folder: Path, tokenizer: Any) -> str:
    """The path of a .jsonl file of 40 documents in the words of the tokenizer."""
    words, draw = list(tokenizer.get_vocab())[4:], random.Random(0)
    path = folder / "notes.jsonl"
    rows = [" ".join(draw.choices(words, k=30)) for _ in range(40)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(path)


def folders(home: Path, make: Callable[..., Any], tokenizer: Any, **options: Any) -> None:
    """home/big and home/small, with the tokenizer."""
    big = sharp(make())
    big.save_pretrained(home / "big")
    tokenizer.save_pretrained(home / "big")
    save(small(make, **options), home / "small", tokenizer=tokenizer)


@contextmanager
def quiet() -> Any:
    yield lambda *_: None


def run(home: Path, out: str = "out", tokenizer: Any = None, **more: Any) -> tuple[Any, Path]:
    """`heal` of home/small with the options of RUN."""
    from rankfold.heal import heal

    said = more.pop("said", [])
    say = more.pop("say", said.append)
    names = {"model": str(home / "small"), "original": str(home / "big"), "data": [str(home / "notes.jsonl")]}
    options = {**RUN, **names, "progress": quiet, "say": say, **more}
    return heal(options.pop("model"), str(home / out), **options)
