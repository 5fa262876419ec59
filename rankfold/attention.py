"""Attention whose four projections are layers, so that each can be factorized.

    q, k, v = x Wqᵀ, x Wkᵀ, x Wvᵀ        out = softmax(q kᵀ / √dh) v Woᵀ        per head, dh = d / heads

`nn.MultiheadAttention` keeps Wq, Wk and Wv in one bare parameter and reads `out_proj.weight` without calling
it: nothing in it is a layer, and a factorizer leaves it dense. `unpack_attention_` puts `MultiheadAttention`
in its place, the same function from four `nn.Linear`: torch's encoder and decoder layers, self- and
cross-attention, can then be factorized throughout. [Low-Rank Transformer: arXiv 1910.13923]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.layers import replace_
from rankfold.optimizers import check_unheld


class SplitProjections(nn.Module):
    """Base of attentions with layers q_proj, k_proj, v_proj and out_proj, as `self_attn` of torch's layers.

    Torch's encoder layers have a fused path for eval that reads `in_proj_weight`. With `in_proj_bias` None
    they take the ordinary path, which calls the module.
    """

    in_proj_weight = None
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim={embed_dim} must be a positive multiple of num_heads={num_heads}, so that every "
                "head has as many features"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} of attention weights must lie in [0, 1)")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim
        self.dropout, self.batch_first = dropout, batch_first
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)
        self.k_proj = nn.Linear(self.kdim, embed_dim, bias, device, dtype)
        self.v_proj = nn.Linear(self.vdim, embed_dim, bias, device, dtype)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As `nn.MultiheadAttention` draws: q, k and v as one Xavier matrix where their inputs have one
        width, biases zero, and `out_proj` as any linear layer."""
        packed = self.kdim == self.vdim == self.embed_dim
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            bound = math.sqrt(6 / (layer.in_features + (3 if packed else 1) * self.embed_dim))
            layer.weight.uniform_(-bound, bound)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if layer.bias is not None:
                layer.bias.zero_()

    def heads(self, x: Tensor) -> Tensor:
        """(batch, length, d) seen by head: (batch, heads, length, dh)."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def joined(self, x: Tensor) -> Tensor:
        """The output from what the heads found, (batch, heads, length, dh) to (batch, length, d)."""
        return self.out_proj(x.transpose(1, 2).flatten(2))

    def batched(self, *inputs: Tensor) -> list[Tensor]:
        """The inputs as (batch, length, features), whatever order they came in."""
        if any(x.is_nested for x in inputs):
            raise ValueError(
                "this attention takes no nested tensors; pad the sequences and give key_padding_mask"
            )
        if inputs[0].dim() == 2:
            return [x.unsqueeze(0) for x in inputs]
        return list(inputs) if self.batch_first else [x.transpose(0, 1) for x in inputs]

    def unbatched(self, y: Tensor, like: Tensor) -> Tensor:
        """The order of `like` again."""
        if like.dim() == 2:
            return y.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


class MultiheadAttention(SplitProjections):
    """`nn.MultiheadAttention` from four layers: same arguments, same call, same results.

    Inputs are (length, batch, features), or (batch, length, features) with `batch_first`, or without a batch
    (length, features). `bias_k`, `bias_v` and `add_zero_attn` do not exist here. The keys of its state dict
    are `q_proj.weight`, …, `out_proj.bias`. Raises ValueError where `num_heads` does not divide `embed_dim`.
    """

    @classmethod
    def of(cls, packed: nn.MultiheadAttention) -> MultiheadAttention:
        """The same function with its own copy of the weights. Raises ValueError for `bias_k`, `bias_v` and
        `add_zero_attn`."""
        if reason := why_packed(packed):
            raise ValueError(f"this nn.MultiheadAttention cannot be unpacked: {reason}")
        joint, bias = packed.in_proj_weight, packed.in_proj_bias
        if joint is not None:
            three = list(joint.chunk(3))
            parts, trains = three, [joint.requires_grad] * 3
        else:
            parts = [packed.q_proj_weight, packed.k_proj_weight, packed.v_proj_weight]
            trains = [part.requires_grad for part in parts]
        split = cls(
            packed.embed_dim,
            packed.num_heads,
            packed.dropout,
            bias is not None,
            kdim=packed.kdim,
            vdim=packed.vdim,
            batch_first=packed.batch_first,
            device="meta",
        )
        layers = (split.q_proj, split.k_proj, split.v_proj)
        offsets = [None] * 3 if bias is None else bias.chunk(3)
        for layer, weight, offset, grad in zip(layers, parts, offsets, trains, strict=True):
            layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=grad)
            if offset is not None:
                layer.bias = nn.Parameter(offset.detach().clone(), requires_grad=bias.requires_grad)
        for name, parameter in packed.out_proj.named_parameters():
            copy = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            setattr(split.out_proj, name, copy)
        return split.train(packed.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The output, in the order of `query`, and the weights (batch, length, keys) if asked for: the mean
        over heads, or (batch, heads, length, keys).

        key_padding_mask  (batch, keys), or (keys,) without a batch
        attn_mask         (length, keys), or (batch·heads, length, keys)
        Masks are boolean, True where a key is not seen, or floats that are added to the scores. `is_causal`
        is a hint that `attn_mask` is the causal one. Raises ValueError for other masks and for nested
        tensors.
        """
        q, k, v = self.batched(query, key, value)
        q, k, v = (self.heads(x) for x in (self.q_proj(q), self.k_proj(k), self.v_proj(v)))
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask, which is None; give the mask too")
        hinted = is_causal and key_padding_mask is None and not need_weights
        mask = None if hinted else self._mask(q, k, key_padding_mask, attn_mask)
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=hinted)
            return self.unbatched(self.joined(mixed), query), None
        scores = (q * self.head_dim**-0.5) @ k.mT  # (batch, heads, length, keys)
        weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        out = self.unbatched(self.joined(weights @ v), query)
        shown = weights.mean(1) if average_attn_weights else weights
        return out, shown.squeeze(0) if query.dim() == 2 else shown

    def _mask(self, q: Tensor, k: Tensor, padding: Tensor | None, between: Tensor | None) -> Tensor | None:
        """Both masks as one that is added to the scores and broadcasts to (batch, heads, length, keys)."""
        batch, heads, length, _ = q.shape
        keys, mask = k.shape[2], None
        if between is not None:
            if between.shape not in ((length, keys), (batch * heads, length, keys)):
                raise ValueError(
                    f"attn_mask has shape {tuple(between.shape)}; it must be {(length, keys)} or "
                    f"{(batch * heads, length, keys)}, for batch {batch} and {heads} heads"
                )
            mask = additive(between, q.dtype).view(-1, heads if between.dim() == 3 else 1, length, keys)
        if padding is not None:
            padding = padding if padding.dim() == 2 else padding.unsqueeze(0)
            if padding.shape != (batch, keys):
                raise ValueError(
                    f"key_padding_mask has shape {tuple(padding.shape)}; it must be {(batch, keys)}"
                )
            unseen = additive(padding, q.dtype)[:, None, None]
            mask = unseen if mask is None else mask + unseen
        return mask


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is added to scores: -inf where a boolean one is True. Raises ValueError for integers."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    if not mask.is_floating_point():
        raise ValueError(f"a mask is boolean or floating point, not {mask.dtype}")
    return mask.to(dtype)


def why_packed(module: nn.MultiheadAttention) -> str | None:
    """Why it cannot be unpacked, or None if it can."""
    if module.bias_k is not None or module.bias_v is not None:
        return "it was made with add_bias_kv=True, an extra key and value"
    if module.add_zero_attn:
        return "it was made with add_zero_attn=True, an extra key and value of zeros"
    return None


def packed_attention(model: nn.Module) -> dict[str, str | None]:
    """{name: why it cannot be unpacked, or None} of each `nn.MultiheadAttention` of a model (exact type: a
    subclass may do anything)."""
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    found: dict[str, str | None] = {}
    for name, module in model.named_modules():
        if type(module) is nn.MultiheadAttention:
            shares = any(len(owners[id(parameter)]) > 1 for parameter in module.parameters())
            reason = "it shares a weight with another module, and would no longer" if shares else None
            found[name] = why_packed(module) or reason
    return found


def unpack_attention_(model: nn.Module, *, skip: Sequence[str] = ()) -> list[str]:
    """Put a `MultiheadAttention` with the same weights where each `nn.MultiheadAttention` of `model` is, but
    for names that match a glob of `skip`; returns their names. Outputs do not change.

    Call it before the optimizer is made; `load_` calls it where the folder has it. In eval mode torch's fused
    path and its nested tensors are off: an `nn.TransformerEncoder` then computes padded positions too, where
    it wrote zeros before. In training, dropout draws other numbers than before.

    Raises ValueError naming the module, before anything is replaced: for `add_bias_kv` and `add_zero_attn`,
    for a weight that another module shares, for a live optimizer that holds one, and where `model` itself is
    the attention (use `MultiheadAttention.of`).
    """
    if type(model) is nn.MultiheadAttention:
        raise ValueError(
            "the model is itself an nn.MultiheadAttention, which cannot be replaced in place; use "
            "MultiheadAttention.of(model)"
        )
    reasons = packed_attention(model)
    names = [name for name in reasons if not any(fnmatchcase(name, glob) for glob in skip)]
    for name in names:
        if reasons[name] is not None:
            raise ValueError(
                f"layer {name!r} cannot be unpacked: {reasons[name]}. Leave it with skip=[{name!r}]"
            )
    found = {name: model.get_submodule(name) for name in names}
    held = {f"{name}.{key}": p for name, module in found.items() for key, p in module.named_parameters()}
    if not all(parameter.is_meta for parameter in held.values()):
        check_unheld(held, "unpack_attention_")
    for name, module in found.items():
        assert isinstance(module, nn.MultiheadAttention)
        replace_(model, name, MultiheadAttention.of(module))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(inside, SplitProjections) for inside in module.modules()
        ):
            module.use_nested_tensor = False
    return names
