"""The other ways to make one vector of a sequence, to compare LAMA with: one call for all of them.

    mean              S = mean over t of h_t             additive    softmax over t of v · tanh(W h_t + b)
    self_attentive    softmax over t of W₂ tanh(W₁ h_t)  multihead   mean over t of attention(H, H, H)

`pooler(name, width)` makes one by name. All take the same arguments, ignore padding, and say what each word
weighed. [additive: arXiv 1409.0473; self_attentive: Lin et al. 2017, arXiv 1703.03130]
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.attention import MultiheadAttention
from rankfold.masked import masked_mean, masked_softmax, precise
from rankfold.pooling import AttentionPooling, LamaPooling, Pooling, products
from rankfold.structure import is_size


class MeanPooling(Pooling):
    """The mean over words, (B, T, d) to (B, d), without parameters. One head, whose weights are all 1/n."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 1, width)

    def pool(self, states: Tensor, real: Tensor | None, embeddings: Tensor | None) -> tuple[Tensor, Tensor]:
        equal = torch.zeros_like(states[:, None, :, 0])
        return masked_mean(states, real), masked_softmax(equal, real)

    def macs(self, length: int) -> int:
        return length * self.width


class AdditivePooling(AttentionPooling):
    """One head with additive attention, (B, T, d) to (B, d). `hidden` is the size of W's output (None: d)."""

    def __init__(
        self,
        width: int,
        hidden: int | None = None,
    ) -> None:
        super().__init__(width, 1, width)
        hidden = checked_hidden(width if hidden is None else hidden)
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, 1, bias=False)

    def scores(self, states: Tensor, real: Tensor | None, embeddings: Tensor | None) -> Tensor:
        return self.outer(self.inner(states).tanh()).mT

    def macs(self, length: int) -> int:
        return length * (products(self.inner) + products(self.outer) + self.width)


class SelfAttentivePooling(AttentionPooling):
    """Structured self-attention, (B, T, d) to (B, heads·d), heads-major, without biases. [Lin et al. 2017]"""

    def __init__(
        self,
        width: int,
        heads: int = 8,
        hidden: int = 350,
    ) -> None:
        super().__init__(width, heads, heads * width)
        self.inner = nn.Linear(width, checked_hidden(hidden), bias=False)
        self.outer = nn.Linear(hidden, heads, bias=False)

    def scores(self, states: Tensor, real: Tensor | None, embeddings: Tensor | None) -> Tensor:
        return self.outer(self.inner(states).tanh()).mT

    def macs(self, length: int) -> int:
        return length * (products(self.inner) + products(self.outer) + self.heads * self.width)


class MultiheadPooling(Pooling):
    """Multi-head self-attention and the mean of what it gives, (B, T, d) to (B, d).

    The weights are what a word gets in each head, the mean over the words that look. While training with
    `dropout` they are those that dropout left. Its scores are (T, T) for each head.
    """

    def __init__(
        self,
        width: int,
        heads: int = 8,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(width, heads, width)
        self.attention = MultiheadAttention(width, heads, dropout, batch_first=True)

    def pool(self, states: Tensor, real: Tensor | None, embeddings: Tensor | None) -> tuple[Tensor, Tensor]:
        # A row of padding alone sees its zeros, for a softmax over nothing is NaN; the mean leaves them out.
        pad = None if real is None else ~real & real.any(1, keepdim=True)
        out, weights = self.attention(states, states, states, pad, average_attn_weights=False)
        got = masked_mean(precise(weights).transpose(1, 2).flatten(2), real).unflatten(-1, (self.heads, -1))
        return masked_mean(out, real), got

    def macs(self, length: int) -> int:
        a = self.attention
        layers = sum(products(layer) for layer in (a.q_proj, a.k_proj, a.v_proj, a.out_proj))
        return length * (layers + 2 * length * self.width + self.width)


POOLERS: dict[str, type[Pooling]] = {
    "mean": MeanPooling,
    "additive": AdditivePooling,
    "self_attentive": SelfAttentivePooling,
    "multihead": MultiheadPooling,
    "lama": LamaPooling,
}


def pooler(name: str, width: int, **options: Any) -> Pooling:
    """A pooling of states of `width` by its name in POOLERS, with the options of its class.

    Raises ValueError for another name, an option that the class has not, and what the class refuses.
    """
    if name not in POOLERS:
        raise ValueError(f"pooler {name!r} is not one of {', '.join(POOLERS)}")
    known = [option for option in inspect.signature(POOLERS[name]).parameters if option != "width"]
    for option in options:
        if option not in known:
            raise ValueError(
                f"pooler {name!r} has no option {option!r}; it has {', '.join(known) if known else 'none'}"
            )
    return POOLERS[name](width, **options)  # type: ignore[call-arg]


def checked_hidden(hidden: int) -> int:
    if not is_size(hidden):
        raise ValueError(f"hidden={hidden!r} of a pooling must be a positive integer")
    return hidden
