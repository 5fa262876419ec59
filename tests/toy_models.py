"""Small classifiers, and batches for them: ids 1..59, padding 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankfold.models import (
    ClassifierConfig,
    PooledForSequenceClassification,
    RecurrentConfig,
    TransformerConfig,
)

WORDS = 60


def recurrent(**options: Any) -> RecurrentConfig:
    return RecurrentConfig(**{"vocab_size": WORDS, "embedding_size": 12, "hidden_size": 6} | options)


def transformer(**options: Any) -> TransformerConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    return TransformerConfig(**{"vocab_size": WORDS, "max_position_embeddings": 16, "k": 4} | sizes | options)


def classifier(encoder: Any = None, **options: Any) -> PooledForSequenceClassification:
    """In eval mode; a GRU and LAMA of four heads unless told otherwise."""
    heads = {"pooler_options": {"heads": 4}} if options.get("pooler", "lama") == "lama" else {}
    classes = {} if "id2label" in options else {"num_labels": 3}
    config = ClassifierConfig(encoder=encoder or recurrent(), **classes | heads | options)
    return PooledForSequenceClassification(config).eval()


def ragged(*lengths: int, width: int | None = None, left: bool = False) -> tuple[Tensor, Tensor]:
    """Ids and mask (rows, width) of random rows of these lengths, the same words wherever padding stands."""
    width = width or max(lengths)
    draw = torch.Generator().manual_seed(1)
    ids, mask = torch.zeros(2, len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        words = torch.randint(1, WORDS, (20,), generator=draw)[:length]
        place = slice(width - length, width) if left else slice(0, length)
        ids[row, place], mask[row, place] = words, 1
    return ids, mask
