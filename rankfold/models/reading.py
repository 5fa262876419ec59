"""What every model here does with its input: a mask, checks that name both numbers, words before padding.

    place[b, t] = where word t of row b stands once the words come first, in their order, and padding last

A row means its words alone. Padding on the left, on the right or between them changes nothing, since every
encoder computes on the row with its words first and puts the results back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def traced() -> bool:
    """Is this call being exported or compiled, where a look at the numbers is not possible?"""
    return torch.compiler.is_exporting() or torch.compiler.is_compiling()


def check_ids(input_ids: Tensor, vocabulary: int) -> None:
    """Raise ValueError for an id outside the vocabulary, with both numbers."""
    if traced() or not input_ids.numel():
        return
    least, most = (int(x) for x in input_ids.aminmax())
    if least < 0 or most >= vocabulary:
        raise ValueError(
            f"token id {least if least < 0 else most} is outside the model's vocabulary of {vocabulary} "
            "entries; the tokenizer belongs to another model"
        )


def check_length(length: int, longest: int | None) -> None:
    """Raise ValueError for a batch that is longer than the encoder can read."""
    if longest is not None and not traced() and length > longest:
        raise ValueError(
            f"the batch has {length} positions and the encoder reads at most {longest}; truncate the texts "
            f"(truncation=True, max_length={longest})"
        )


def word_mask(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None, pad: int | None
) -> Tensor:
    """(batch, length) bool, True at words: the attention mask if there is one, else where an id is not the
    padding's. Raises ValueError without exactly one of ids and embeddings, and for a mask of another shape.
    """
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("give input_ids or inputs_embeds, and not both")
    shape = given.shape[:2]
    if given.dim() != (2 if input_ids is not None else 3):
        raise ValueError(f"the input has shape {tuple(given.shape)}; it must be (batch, length)")
    if attention_mask is not None:
        if attention_mask.shape != shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, the input {tuple(shape)}; they "
                "must agree"
            )
        return attention_mask.to(torch.bool)
    if input_ids is not None and pad is not None:
        return input_ids != pad
    return torch.ones(shape, dtype=torch.bool, device=given.device)


def words_first(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(place, order), both (batch, length) int64 and inverse to each other: `moved(x, order)` has the words
    of each row first, `moved(y, place)` puts results back."""
    words = mask.long()
    before = words.sum(1, keepdim=True)  # padding stands behind all words
    place = torch.where(mask, words.cumsum(1) - 1, before + (1 - words).cumsum(1) - 1)
    here = torch.arange(mask.shape[1], device=mask.device).expand_as(place)
    return place, torch.zeros_like(place).scatter(1, place, here)


def moved(x: Tensor, index: Tensor) -> Tensor:
    """Positions of x (batch, length, features) in the order `index` (batch, length)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def vocabulary_of(embedding: nn.Module) -> int | None:
    """How many ids a table of vectors has, factorized or not; None where it does not say."""
    return getattr(embedding, "num_embeddings", None)


def check_sizes(**sizes: Any) -> None:
    """Raise ValueError for a size that is no positive integer."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer")


def check_rates(**rates: Any) -> None:
    """Raise ValueError for a probability of dropping that is not in [0, 1)."""
    for name, value in rates.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
            raise ValueError(f"{name}={value!r} is a probability of dropping, in [0, 1)")
