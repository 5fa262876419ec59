"""Language models small enough to work out by hand, and a tokenizer of digits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Bigram(nn.Module):
    """Logits of the next token that depend on the current one only: row i of `table` (V, V)."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.dropout = nn.Dropout(0.9)  # would change every value, were the model not put in eval mode
        self.batches: list[tuple[int, ...]] = []

    def forward(self, ids: Tensor) -> Tensor:
        self.batches.append(tuple(ids.shape))
        assert not torch.is_grad_enabled()
        return self.dropout(self.table[ids])


TABLE = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, -1.0], [0.5, 0.5, 3.0]])


def llama(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **heads, **ends, **options}))


class Letters:
    eos_token_id = 9

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(letter) for letter in text]}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(map(str, ids))


def chain(*following: int) -> Bigram:
    """A model whose greedy continuation of token i is following[i]."""
    return Bigram(nn.functional.one_hot(torch.tensor(following), 10).float())
