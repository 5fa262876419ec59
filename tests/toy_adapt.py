"""The smallest adaptations: a 2-layer encoder, a 2-layer language model, a few conversations."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from toy_classify import snippets, table

CLASSIFY: dict[str, Any] = {"epochs": 2, "batch_size": 8, "length": 16, "lr": 5e-3, "device": "cpu"}
LANGUAGE: dict[str, Any] = {
    "tokens": 6 * 2 * 16,
    "length": 16,
    "batch_size": 2,
    "held_out": 0.25,
    "validation_tokens": 64,
    "eval_every": 3,
    "save_every": 2,
    "device": "cpu",
}
# As a tokenizer's template: a question, an answer, and an end after each.
TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant ' }}{% endif %}"
)


@contextmanager
def quiet() -> Any:
    yield lambda *_: None


def encoder(folder: Path, **sizes: Any) -> str:
    """The path of a pretrained encoder without a head, in the words of `snippets`."""
    from transformers import BertConfig, BertModel

    from rankfold.models.vocabulary import train_wordpiece

    tokenizer = train_wordpiece([text for text, _ in snippets()], size=200, max_length=32)
    options = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "initializer_range": 0.1,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    BertModel(BertConfig(**(options | sizes))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def examples(home: Path) -> tuple[str, str]:
    """(train.csv, test.csv)."""
    return table(home / "train.csv", snippets()), table(home / "test.csv", snippets(20, seed=1))


def language_model(home: Path, make: Any, tokenizer: Any, name: str = "lm", **options: Any) -> str:
    """The path of a causal language model."""
    make(**options).save_pretrained(home / name)
    tokenizer.save_pretrained(home / name)
    return str(home / name)


def text(path: Path, count: int = 40) -> str:
    """The path of a .jsonl file of documents of a few words, in an order that can be learned."""
    words, rows = "the city of water and the house of light".split(), []
    for at in range(count):
        rows.append(" ".join(words[(at + step) % len(words)] for step in range(30 + at)))
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(path)


def chats(path: Path, count: int = 24) -> str:
    """Conversations of two questions each, whose answers are one word of the question."""
    words = "city river music book stone water light world".split()
    rows = []
    for at in range(count):
        one, two = words[at % 8], words[(3 * at + at // 8) % 8]
        turns = [("user", f"the {one} of {two}"), ("assistant", one), ("user", "and"), ("assistant", two)]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(model: str, out: Path, recipe: str = "lora", **more: Any) -> tuple[dict[str, Any], Path]:
    """`adapt` without a word, rank 2 where nothing else is said."""
    from rankfold.adapt import adapt

    said = more.pop("said", [])
    say = more.pop("say", said.append)
    options = more.pop("options", {} if recipe in ("full", "probe") else {"rank": 2})
    return adapt(model, str(out), recipe=recipe, options=options, progress=quiet, say=say, **more)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {key: t for path in sorted(folder.glob("*.safetensors")) for key, t in load_file(path).items()}


def same(one: Path, two: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit."""
    first, second = tensors(one), tensors(two)
    return set(first) == set(second) and all(torch.equal(first[key], second[key]) for key in first)
