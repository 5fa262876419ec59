"""Linformer attention, whose cost grows with the length n and not with its square, and what each form costs.

    k = E (x Wkᵀ)     v = F (x Wvᵀ)     out = softmax(q kᵀ / √dh) v Woᵀ        E, F (k, n): scores are n x k

E and F mix *positions*: they are no weight structures, and they add parameters. A low-rank transformer keeps
the n x n scores and shrinks the matrices instead. Counting a multiply-add as 2, for width d and an ffn of
width f, the two cost the same at the length n* = 2k + 2d + f − 4r − r(d + f)/d; beyond it Linformer is the
cheaper. [arXiv 2006.04768; Low-Rank Transformer: arXiv 1910.13923]
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.attention import SplitProjections
from rankfold.structure import is_size

SHARING = ("none", "headwise", "kv", "layerwise")
INITS = ("xavier", "uniform")


class LinformerAttention(SplitProjections):
    """Self-attention over k mixtures of the positions. Stands where torch's encoder layer has `self_attn`.

        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        layer.self_attn = LinformerAttention(64, 4, max_length=1024, k=64, batch_first=True)

    max_length  n of E and F (k, n), or (heads, k, n); a shorter input uses their first columns
    sharing     "none": E and F for each head; "headwise": one E and one F; "kv": E = F; "layerwise": E = F,
                one for all layers, after `share_positions_(model)`
    project     "after" the projections Wk and Wv, or "before": E (x) Wkᵀ, where the bias is not mixed
    init        of E and F: "xavier", uniform with gain 1/√2, or "uniform" in ±1/√k

    Input (batch, n, d) with `batch_first`, else (n, batch, d), or (n, d). Padded positions are zero before E
    and F mix them. There is no causal form: what E mixes has seen every position. Raises ValueError for
    options out of range, a longer input, another key or value than the query, and an attention mask.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        max_length: int,
        k: int,
        *,
        sharing: str = "headwise",
        project: str = "after",
        init: str = "xavier",
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value, known in (
            ("sharing", sharing, SHARING),
            ("project", project, ("after", "before")),
            ("init", init, INITS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")
        if not is_size(max_length) or not is_size(k) or k > max_length:
            raise ValueError(f"k={k!r} mixtures of at most max_length={max_length!r} positions: 1 <= k <= n")
        if project == "before" and sharing == "none":
            raise ValueError(
                "project='before' mixes the input, which has no heads yet, and sharing='none' has a map for "
                "each head; choose another sharing, or project='after'"
            )
        self.init = init
        super().__init__(
            embed_dim,
            num_heads,
            dropout=dropout,
            bias=bias,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )
        self.max_length, self.k, self.sharing, self.project = max_length, k, sharing, project
        shape = (num_heads, k, max_length) if sharing == "none" else (k, max_length)
        self.E = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if sharing in ("none", "headwise"):
            self.F = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        else:
            self.register_parameter("F", None)
        self.reset_positions()

    @torch.no_grad()
    def reset_positions(self) -> None:
        """Draw E and F anew."""
        for positions in (self.E, self.F):
            for matrix in () if positions is None else positions.view(-1, self.k, self.max_length):
                if self.init == "xavier":
                    nn.init.xavier_uniform_(matrix, gain=1 / math.sqrt(2))
                else:
                    nn.init.uniform_(matrix, -1 / math.sqrt(self.k), 1 / math.sqrt(self.k))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """The output, in the order of `query`, and None in the place of weights: those are over mixtures.

        key_padding_mask  (batch, n), or (n,) without a batch: True, or a float other than 0, is padding
        """
        if key is not query or value is not query:
            raise ValueError("Linformer attention is self-attention: query, key and value are one tensor")
        if is_causal or attn_mask is not None:
            raise ValueError(
                "Linformer attention cannot be causal and takes no attn_mask: its keys are mixtures of all "
                "positions. Use MultiheadAttention for a decoder"
            )
        if need_weights:
            raise ValueError("Linformer attention has no weights over positions; pass need_weights=False")
        (x,) = self.batched(query)
        length = x.shape[1]
        if length > self.max_length:
            raise ValueError(
                f"the input has length {length} and this attention was made for at most max_length="
                f"{self.max_length}; shorten it, or make the attention longer"
            )
        pad = None if key_padding_mask is None else self._padding(key_padding_mask, x)
        q = self.heads(self.q_proj(x))
        k = self._mixed(x, self.k_proj, self.E, pad)
        v = self._mixed(x, self.v_proj, self.E if self.F is None else self.F, pad)
        out = F.scaled_dot_product_attention(q, k, v, None, self.dropout if self.training else 0.0)
        return self.unbatched(self.joined(out), query), None

    def _mixed(self, x: Tensor, layer: nn.Module, positions: Tensor, pad: Tensor | None) -> Tensor:
        """Keys or values (batch, heads, k, dh) from the input (batch, n, d)."""
        y = x if self.project == "before" else layer(x)
        if pad is not None:
            y = y.masked_fill(pad, 0)
        mixing = positions[..., : x.shape[1]]  # (k, n), or (heads, k, n)
        if self.sharing == "none":
            return mixing @ self.heads(y)
        y = mixing @ y
        return self.heads(layer(y) if self.project == "before" else y)

    def _padding(self, mask: Tensor, x: Tensor) -> Tensor:
        mask = mask if mask.dim() == 2 else mask.unsqueeze(0)
        if mask.shape != x.shape[:2]:
            raise ValueError(
                f"key_padding_mask has shape {tuple(mask.shape)}; it must be {tuple(x.shape[:2])}"
            )
        return (mask if mask.dtype == torch.bool else mask != 0).unsqueeze(-1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, max_length={self.max_length}, k={self.k}, sharing={self.sharing!r}"


def share_positions_(model: nn.Module) -> int:
    """Let every `LinformerAttention` of `model` with sharing "layerwise" hold the E of the first; returns how
    many do. (torch's encoder makes copies of one layer, and with them of E.) Raises ValueError where there is
    none, or their sizes differ."""
    layers = [m for m in model.modules() if isinstance(m, LinformerAttention) and m.sharing == "layerwise"]
    if not layers:
        raise ValueError("the model has no LinformerAttention with sharing='layerwise'")
    for layer in layers:
        if layer.E.shape != layers[0].E.shape:
            raise ValueError(
                f"position maps of shapes {tuple(layers[0].E.shape)} and {tuple(layer.E.shape)} cannot be one"
            )
        layer.E = layers[0].E
    return len(layers)


def layer_flops(length: int, width: int, ffn: int, *, rank: int | None = None, k: int | None = None) -> int:
    """FLOPs (a multiply-add is 2) of an encoder layer over one sequence; biases, norms and softmax aside.

        dense  8nd² + 4ndf + 4n²d        rank  16nrd + 4nr(d + f) + 4n²d        k  8nd² + 4ndf + 8nkd

    length, width, ffn  n, d and f
    rank                every projection and both layers of the ffn are low-rank
    k                   Linformer attention; with `rank` too, both. Raises ValueError for sizes below 1.
    """
    _check_sizes(
        length=length, width=width, ffn=ffn, rank=1 if rank is None else rank, k=1 if k is None else k
    )
    matrices = 8 * width * width + 4 * width * ffn
    if rank is not None:
        matrices = 16 * rank * width + 4 * rank * (width + ffn)
    return length * (matrices + (4 * length * width if k is None else 8 * k * width))


def crossover_length(width: int, ffn: int, rank: int, k: int) -> float:
    """n* = 2k + 2d + f − 4r − r(d + f)/d, from which on a Linformer layer takes fewer FLOPs than a low-rank
    one. Raises ValueError for sizes below 1."""
    _check_sizes(width=width, ffn=ffn, rank=rank, k=k)
    return 2 * k + 2 * width + ffn - 4 * rank - rank * (width + ffn) / width


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if not is_size(value):
            raise ValueError(f"{name}={value!r} must be a positive integer")
