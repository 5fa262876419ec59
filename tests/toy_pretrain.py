"""The smallest runs of `pretrain`: 38 thousand parameters, a few steps on 40 help topics of Python."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rankfold.data import documents

SIZES = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 256,
}
RUN: dict[str, Any] = {
    "train_bpe": 300,
    "steps": 6,
    "length": 16,
    "batch_size": 2,
    "lr": 3e-3,
    "eval_every": 3,
    "save_every": 2,
    "held_out": 0.2,
    "validation_tokens": 256,
    "device": "cpu",
}
RANKS = {"rank": 4, "alpha": 4.0}


def config(folder: Path, **more: Any) -> str:
    """The path of a config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(SIZES | more))
    return str(path)


def topics(folder: Path) -> str:
    """The path of a .jsonl file: the beginnings of 40 documents."""
    path = folder / "topics.jsonl"
    texts = [text[:600] for text in documents("pydoc:all")[:40]]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@contextmanager
def quiet() -> Any:
    yield lambda *_: None


def run(folder: Path, out: str = "out", recipe: str = "sltrain", **more: Any) -> tuple[Any, Path]:
    """`pretrain` with the options of RUN, and those of the recipe that a test does not name itself."""
    from rankfold.pretrain import pretrain

    options = more.pop("options", RANKS if recipe == "sltrain" else {})
    said = more.pop("said", [])
    say = more.pop("say", said.append)
    more.setdefault("data", [topics(folder)])
    settings = {**RUN, "recipe": recipe, "options": options, "progress": quiet, "say": say, **more}
    return pretrain(settings.pop("model", None) or config(folder), str(folder / out), **settings)
