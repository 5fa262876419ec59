"""LAMA: one vector per head from a sequence, by low-rank bilinear attention that costs O(T) and not O(T²).

    u_t = φ(W h_t + b)    f_t = tanh(Σₖ (P c) ∗ (Q u_t))    f_t ← f_t / ‖f_t‖    A = softmax over t of f / τ
    S = A H               (heads, d): each head's weighted mean of the states H (T, d)

Head i scores a word by c · Wᵢ u; with Wᵢ = Pᵢᵀ Qᵢ of rank k that is a sum of k products, and no d x d matrix
is formed. The norm runs over heads, the softmax over words. Scores lie in [-1, 1], so that weights cannot
become sharp: see `LamaPooling.weight_bound`. [LAMA: arXiv 1912.00835]
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.masked import masked_mean, masked_softmax, precise, words
from rankfold.method import Method
from rankfold.metric import Metric
from rankfold.structure import Structure, is_size
from rankfold.structures import LowRank

PHI: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu, "gelu": F.gelu}


class Pooling(nn.Module, ABC):
    """Turns the states of a sequence into one vector, and says what each word weighed.

    width         d, features of a state
    heads         rows of the weights
    out_features  of the pooled vector; heads-major where every head has its own vector

    A subclass gives `pool` and `macs`; one that weighs words by a softmax is an `AttentionPooling`.
    """

    reads_embeddings = False

    def __init__(self, width: int, heads: int, out_features: int) -> None:
        super().__init__()
        for name, value in (("width", width), ("heads", heads)):
            if not is_size(value):
                raise ValueError(f"{name}={value!r} of a pooling must be a positive integer")
        self.width, self.heads, self.out_features = width, heads, out_features

    def forward(
        self, states: Tensor, mask: Tensor | None = None, embeddings: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The pooled vectors (B, out_features) and the weights (B, heads, T), these in float32 at least.

        states      (B, T, width)
        mask        (B, T) of booleans or integers: True or 1 is a word, 0 is padding; None: all are words
        embeddings  (B, T, e) what the encoder read; only a pooling with `reads_embeddings` looks at it

        What stands at padding is never read, not even NaN. A sequence of padding alone gives zeros, vector
        and weights. Raises ValueError for other shapes and for a floating-point mask.
        """
        if states.dim() != 3 or states.shape[-1] != self.width:
            raise ValueError(
                f"states have shape {tuple(states.shape)}; this pooling takes (B, T, {self.width})"
            )
        real = None if mask is None else words(mask, states)
        if real is not None:
            states = states.masked_fill(~real.unsqueeze(-1), 0)
        return self.pool(states, real, embeddings)

    @abstractmethod
    def pool(self, states: Tensor, real: Tensor | None, embeddings: Tensor | None) -> tuple[Tensor, Tensor]:
        """`forward` with checked input: states that are zero at padding, and a boolean mask or None."""

    def attention_params(self) -> int:
        """Parameters that find the weights."""
        return count(self)

    def word_mlp_params(self) -> int:
        """Parameters of a layer that every word passes before it is scored, counted apart."""
        return 0

    @abstractmethod
    def macs(self, length: int) -> int:
        """Multiply-adds of pooling one sequence of `length` words: products of matrices, and means. Functions
        of one element and softmax are left out."""


class AttentionPooling(Pooling):
    """Every head is the mean of the states (B, T, d), weighed by a softmax of its scores; heads-major."""

    @abstractmethod
    def scores(self, states: Tensor, real: Tensor | None, embeddings: Tensor | None) -> Tensor:
        """(B, heads, T): what the softmax over words takes, padding still in it. Arguments: see `pool`."""

    def pool(self, states: Tensor, real: Tensor | None, embeddings: Tensor | None) -> tuple[Tensor, Tensor]:
        weights = masked_softmax(self.scores(states, real, embeddings), real)
        return (weights.to(states.dtype) @ states).flatten(1), weights


class LamaPooling(AttentionPooling):
    """Low-rank multi-head attention pooling, (B, T, d) to (B, heads·d).

    heads            m, at least 2 with `normalise_heads`
    rank_per_head    k of each head's affinity; the paper draws 1
    context          "learned": one vector for all inputs; "mean": of each sequence ("LAMA + ctx")
    context_of       what the mean is of: "states" H, "words" U = φ(H Wᵀ + b), or "embedding", of width d too
    word_mlp         the layer W (d, d), b before the scores; False scores the states themselves
    phi              its activation: "tanh", "relu", "gelu", or a function of a tensor. (The paper does not
                     say which, as far as could be read.)
    normalise_heads  divide f_t by its l2 norm over heads, or by `eps` where it is smaller
    temperature      τ of the softmax over words; below 1 sharper

    P and Q are the layers `context_proj` and `word_proj`, the word MLP is `word_mlp`: ordinary `nn.Linear`,
    which may be factorized. Raises ValueError for options out of range or without effect.
    """

    context: nn.Parameter | None
    word_mlp: nn.Module | None

    def __init__(
        self,
        width: int,
        heads: int = 8,
        *,
        rank_per_head: int = 1,
        context: str = "learned",
        context_of: str = "states",
        word_mlp: bool = True,
        phi: str | Callable[[Tensor], Tensor] = "tanh",
        normalise_heads: bool = True,
        temperature: float = 1.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(width, heads, heads * width)
        if not is_size(rank_per_head) or rank_per_head > width:
            raise ValueError(f"rank_per_head={rank_per_head!r} must lie between 1 and width={width}")
        for name, value, known in (
            ("context", context, ("learned", "mean")),
            ("context_of", context_of, ("states", "words", "embedding")),
            ("phi", "tanh" if callable(phi) else phi, PHI),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")
        if context == "learned" and context_of != "states":
            raise ValueError(f"context_of={context_of!r} says what a mean is of, and context is 'learned'")
        if not word_mlp and phi != "tanh":
            raise ValueError(f"phi={phi!r} is the activation of the word MLP, and word_mlp is False")
        if heads == 1 and normalise_heads:
            raise ValueError(
                "heads=1 with normalise_heads=True: the norm over one head makes every score 1 or -1, and no "
                "gradient is left to learn from; take at least 2 heads, or normalise_heads=False"
            )
        for name, value in (("temperature", temperature), ("eps", eps)):
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name}={value!r} must be a positive, finite number")
        self.rank_per_head, self.context_from, self.context_of = rank_per_head, context, context_of
        self.normalise_heads, self.temperature, self.eps = normalise_heads, float(temperature), float(eps)
        self.reads_embeddings = context_of == "embedding"
        self.phi = PHI[phi] if isinstance(phi, str) else phi
        size = heads * rank_per_head
        self.register_parameter("context", nn.Parameter(torch.empty(width)) if context == "learned" else None)
        self.context_proj = nn.Linear(width, size, bias=False)
        self.word_proj = nn.Linear(width, size, bias=False)
        self.word_mlp = nn.Linear(width, width) if word_mlp else None
        self.reset_context()

    @torch.no_grad()
    def reset_context(self) -> None:
        """Draw a learned context as a layer draws its weight, uniform in ±1/√d. Zero would score nothing."""
        if self.context is not None:
            nn.init.uniform_(self.context, -(self.width**-0.5), self.width**-0.5)

    @classmethod
    def from_bilinear(cls, affinities: Tensor, rank: int, method: Method, **options: Any) -> LamaPooling:
        """The pooling whose heads' affinities are the nearest of `rank` to Wᵢ, exact where Wᵢ has no higher.

        affinities  W (m, d, d): head i scores a word u by c · Wᵢ u
        method      fits each Wᵢ in the identity metric, e.g. `rankfold.SVD()`; it must give `LowRank`
        options     of the constructor. Context and word MLP are drawn anew

        Raises ValueError for other shapes, a rank out of range, and a method that gives something else.
        """
        if affinities.dim() != 3 or affinities.shape[1] != affinities.shape[2]:
            raise ValueError(f"affinities have shape {tuple(affinities.shape)}; they must be (heads, d, d)")
        heads, width, _ = affinities.shape
        made = cls(width, heads, rank_per_head=rank, **options).to(affinities)
        fits = [method.fit(affinity, Metric(), rank) for affinity in affinities.detach()]
        if not all(isinstance(fit, LowRank) for fit in fits):
            raise ValueError(f"{method} gave {type(fits[0]).__name__}; affinities need a method for LowRank")
        lefts, rights = zip(*(fit.factors() for fit in fits), strict=True)
        with torch.no_grad():
            made.context_proj.weight.copy_(torch.cat([left.mT for left in lefts]))
            made.word_proj.weight.copy_(torch.cat(rights))
        return made

    def affinities(self) -> Tensor:
        """Wᵢ = Pᵢᵀ Qᵢ of every head, (m, d, d): `c · Wᵢ u` is the score before tanh."""
        shape = (self.heads, self.rank_per_head, self.width)
        weights: list[Any] = [self.context_proj.weight, self.word_proj.weight]
        p, q = (w.to_dense() if isinstance(w, Structure) else w for w in weights)
        return p.view(shape).mT @ q.view(shape)

    def weight_bound(self, length: int) -> float:
        """The largest weight that a word of `length` can have: e^(2/τ) / (e^(2/τ) + length − 1)."""
        if not is_size(length):
            raise ValueError(f"length={length!r} must be a positive integer")
        return 1 / (1 + (length - 1) * math.exp(-2 / self.temperature))

    def scores(self, states: Tensor, real: Tensor | None, embeddings: Tensor | None) -> Tensor:
        seen = states if self.word_mlp is None else self.phi(self.word_mlp(states))
        if self.context is not None:
            context = self.context.unsqueeze(0)  # (1, d), the same for every sample
        else:
            source = {"states": states, "words": seen, "embedding": embeddings}[self.context_of]
            context = masked_mean(self._fits(source, states), real)  # (B, d)
        pairs = precise(self.context_proj(context)).unsqueeze(1) * precise(self.word_proj(seen))
        f = pairs.unflatten(-1, (self.heads, self.rank_per_head)).sum(-1).tanh()  # (B, T, m)
        if self.normalise_heads:
            f = F.normalize(f, dim=-1, eps=self.eps)  # f / max(‖f‖, eps)
        return f.mT / self.temperature

    def _fits(self, source: Tensor | None, states: Tensor) -> Tensor:
        if source is None:
            raise ValueError("context_of='embedding' needs the embeddings: forward(states, mask, embeddings)")
        if source.shape != states.shape:
            raise ValueError(
                f"embeddings have shape {tuple(source.shape)}; a context of width {self.width} needs "
                f"{tuple(states.shape)}. Take context_of='states' where the widths differ"
            )
        return source

    def attention_params(self) -> int:
        """P, Q and c."""
        learned = 0 if self.context is None else self.context.numel()
        return count(self.context_proj) + count(self.word_proj) + learned

    def word_mlp_params(self) -> int:
        return 0 if self.word_mlp is None else count(self.word_mlp)

    def macs(self, length: int) -> int:
        a_word = products(self.word_proj) + self.heads * self.width
        a_word += 0 if self.word_mlp is None else products(self.word_mlp)
        a_word += self.width if self.context is None else 0  # the mean
        return length * a_word + products(self.context_proj)

    def extra_repr(self) -> str:
        shown = f"width={self.width}, heads={self.heads}, context={self.context_from!r}"
        shown += f", context_of={self.context_of!r}" if self.context is None else ""
        return f"{shown}, normalise_heads={self.normalise_heads}, temperature={self.temperature}"


def diversity_penalty(weights: Tensor) -> Tensor:
    """‖A Aᵀ − I‖² (Frobenius), the mean over samples, of weights A (B, heads, T): heads that look at the same
    words cost. [Lin et al. 2017; nothing that could be read shows it in LAMA]"""
    eye = torch.eye(weights.shape[1], dtype=weights.dtype, device=weights.device)
    return (weights @ weights.mT - eye).square().sum((1, 2)).mean()


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def products(layer: nn.Module) -> int:
    """Multiply-adds of a linear layer on one row, factorized or not."""
    weight: Any = layer.weight
    return weight.macs if isinstance(weight, Structure) else weight.numel()
