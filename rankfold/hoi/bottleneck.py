"""Adapters with a small decoder layer inside, which may read a context.

    y = x + scale · Up(Dec(relu(Down x), context))          Down: width -> bottleneck, Up = 0 at the start

Dec is a post-norm decoder layer: self-attention, attention to the context, two linear layers, each followed
by a LayerNorm of its sum. Without a context the second attention reads the tokens themselves. `attend=False`
is the layout of the public code: every token is a sequence of its own, so that both attentions are plain
linear maps, out_proj(v_proj(t)), and no token sees another; `attend=True` lets them. [HOLa: arXiv 2507.15542]
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rankfold.attention import MultiheadAttention
from rankfold.structure import is_size


class ContextMLP(nn.Sequential):
    """in_width -> hidden -> hidden -> bottleneck with relu between: what a context passes to be read."""

    def __init__(self, in_width: int, hidden: int = 128, bottleneck: int = 64) -> None:
        super().__init__(
            nn.Linear(in_width, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, bottleneck),
        )


class LoneAttention(nn.Module):
    """Attention in which every token's only key is itself: out_proj(v_proj(x)). The weight of one key is 1
    whatever query and key are, so that it has neither of the two projections."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.xavier_uniform_(self.v_proj.weight)
        nn.init.zeros_(self.v_proj.bias)
        nn.init.zeros_(self.out_proj.bias)


class AdapterBlock(nn.Module):
    """An adapter, see the module.

    width           of the tokens
    context         width of the context before its MLP, `read`; None: there is no MLP
    bottleneck      inner width; heads and ffn: of Dec; hidden: of the MLP
    self_attention  False: Dec has one attention, to a context that comes in the bottleneck's width
    attend          whether tokens of a sequence see each other; see the module
    scale           start of a factor for each channel of what is added; None: no such factor
    dead            also hold what the public code registers and never uses: query and key of an attention
                    to a single token, a third LayerNorm beside one attention, and the MLP of a context that
                    is not read. They change no output and never get a gradient

    At width w, bottleneck 64 and ffn 128, with `dead`, Dec has 50,240 parameters, and 33,600 with one
    attention. Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        width: int,
        context: int | None = None,
        *,
        bottleneck: int = 64,
        heads: int = 2,
        ffn: int = 128,
        hidden: int = 128,
        self_attention: bool = True,
        attend: bool = False,
        scale: float | None = None,
        dead: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"width": width, "bottleneck": bottleneck, "heads": heads, "ffn": ffn, "hidden": hidden}
        for name, value in sizes.items():
            if not is_size(value):
                raise ValueError(f"{name}={value!r} of an adapter must be a positive integer")
        if bottleneck % heads:
            raise ValueError(f"bottleneck={bottleneck} of an adapter must be a multiple of heads={heads}")
        self.width, self.bottleneck, self.attend = width, bottleneck, attend
        reads = context is not None or not self_attention
        # With `dead`, a block that has the MLP of a context may still go without one.
        self.needs_context = not self_attention or (reads and not dead)
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.read = None if context is None else ContextMLP(context, hidden, bottleneck)

        def attention(lone: bool) -> nn.Module:
            if lone and not dead:
                return LoneAttention(bottleneck)
            return MultiheadAttention(bottleneck, heads, batch_first=True)

        self.self_attention = attention(not attend) if self_attention else None
        self.cross_attention = attention(not attend and not reads)
        self.feed_forward = nn.Sequential(nn.Linear(bottleneck, ffn), nn.ReLU(), nn.Linear(ffn, bottleneck))
        norms = 3 if self_attention or dead else 2
        self.norms = nn.ModuleList(nn.LayerNorm(bottleneck) for _ in range(norms))
        self.scale = None if scale is None else nn.Parameter(torch.full((width,), float(scale)))
        self.reset_up_()

    @torch.no_grad()
    def reset_up_(self) -> None:
        """Make the block add nothing, as at the start."""
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        present: Tensor | None = None,
    ) -> Tensor:
        """The adapted tokens (..., L, width), from x (..., L, width).

        context  (..., K, bottleneck), what `read` made of a context; its leading dimensions broadcast with
                 those of x, and L tokens read the same K keys. None: each token, or with `attend` all of
                 them, are what is read
        mask     (..., K) of booleans, False for padding of the context. Where none is True nothing is added
        present  (..., L) of booleans, False for padding of x: never a key to others

        Raises ValueError for a context of another width, and where the block was made for one and gets none.
        """
        if context is None and self.needs_context:
            raise ValueError(f"this adapter reads a context; give one, (..., keys, {self.bottleneck})")
        if context is not None and isinstance(self.cross_attention, LoneAttention):
            raise ValueError("this adapter was made without a context; give its width when it is made")
        if context is not None and context.shape[-1] != self.bottleneck:
            raise ValueError(
                f"a context has width {context.shape[-1]}, this adapter reads {self.bottleneck}; pass it "
                "through `read` first"
            )
        states = start = torch.relu(self.down(x))
        norm = iter(self.norms)
        if self.self_attention is not None:
            states = next(norm)(states + self._among(self.self_attention, states, start, present))
        if context is None:
            found = self._among(self.cross_attention, states, start, present)
        else:
            found = attended(self.cross_attention, states, context, mask)
        states = next(norm)(states + found)
        states = next(norm)(states + self.feed_forward(states))
        added = self.up(states)
        return x + (added if self.scale is None else added * self.scale)

    def _among(self, attention: nn.Module, states: Tensor, keys: Tensor, present: Tensor | None) -> Tensor:
        """What tokens find in each other, or with `attend` off each in itself."""
        if self.attend:
            return attended(attention, states, keys, present)
        out, value = attention.get_submodule("out_proj"), attention.get_submodule("v_proj")
        return out(value(keys))


def attended(attention: nn.Module, states: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """What states (..., L, d) find in keys (..., K, d), (..., L, d): zeros where `mask` (..., K) has no True,
    or K is 0. Leading dimensions broadcast."""
    lead = torch.broadcast_shapes(states.shape[:-2], keys.shape[:-2])
    states = states.expand(*lead, *states.shape[-2:])
    if keys.shape[-2] == 0 or states.numel() == 0:
        return torch.zeros_like(states)
    flat = states.reshape(-1, *states.shape[-2:])
    against = keys.expand(*lead, *keys.shape[-2:]).reshape(-1, *keys.shape[-2:])
    padding = none = None
    if mask is not None:
        padding = ~mask.expand(*lead, keys.shape[-2]).reshape(-1, keys.shape[-2])
        none = padding.all(-1, keepdim=True)
        padding = padding & ~none  # a softmax over no key is NaN
    found, _ = attention(flat, against, against, padding, need_weights=False)
    if none is not None:
        found = found.masked_fill(none.unsqueeze(-1), 0)
    return found.view(states.shape)
