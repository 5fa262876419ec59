"""CLIP's image encoder, frozen, with an adapter before each layer and a token for each human-object pair.

    x = [image; pairs]    for each layer:    image += adapter(image | detections);    x = layer(x)
    grid = proj(norm(patches))    (B, D, h, w)          p = proj(norm(pairs))    (B, M, D)

Pair tokens attend to the image and to each other, and the image to them. Images of a batch differ in pairs:
padding is hidden from attention by an additive mask of 0 and −inf, made from the numbers of pairs.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from rankfold.hoi.bottleneck import AdapterBlock
from rankfold.hoi.config import HolaConfig


class AdaptedVision(nn.Module):
    """The encoder of `config.vision` and its adapters, which are all that is trained. `tower` and
    `projection` are CLIP's; they stay frozen, and in eval mode.

    Raises ValueError for an encoder whose images or patches are not square.
    """

    def __init__(self, config: HolaConfig) -> None:
        super().__init__()
        sizes = cast(CLIPVisionConfig, config.vision)
        self.side, self.patch = square(sizes.image_size, "image_size"), square(sizes.patch_size, "patch_size")
        self.cells, self.width = self.side // self.patch, sizes.hidden_size
        self.isolate = config.isolate_pairs
        self.tower = CLIPVisionModel._from_config(sizes)
        self.projection = nn.Linear(self.width, config.projection_dim, bias=False)
        self.adapters = nn.ModuleList(
            AdapterBlock(
                self.width,
                bottleneck=config.bottleneck,
                heads=config.heads,
                ffn=config.ffn,
                self_attention=False,
                scale=config.scale_init,
                dead=bool(config.dead),
            )
            for _ in range(sizes.num_hidden_layers)
        )
        self.freeze_()

    def freeze_(self) -> AdaptedVision:
        """Train adapters only."""
        self.tower.requires_grad_(False)
        self.projection.requires_grad_(False)
        return self

    def train(self, mode: bool = True) -> AdaptedVision:
        super().train(mode)
        self.tower.eval()
        return self

    def forward(
        self, pixel_values: Tensor, context: Tensor, present: Tensor, tokens: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Features of patches (B, D, h, w) and of pairs (B, M, D), neither of length 1.

        pixel_values  (B, 3, side, side)
        context       (B, n, bottleneck) of detections, and `present` (B, n) bool: which there are
        tokens        (B, M, width) of pairs, of which image b has `lengths[b]`; what stands at the others
                      changes nothing, and their features mean nothing
        """
        x = self.tower.pre_layrnorm(self.tower.embeddings(pixel_values))
        image = x.shape[1]
        mask = pair_mask(lengths, image, tokens.shape[1], self.isolate, x.dtype)
        pairs = tokens.to(x.dtype)
        for adapter, layer in zip(self.adapters, cast(Any, self.tower.encoder).layers, strict=True):
            x = adapter(x, context, present)
            both = layer(torch.cat([x, pairs], 1), mask)
            x, pairs = both[:, :image], both[:, image:]
        norm = self.tower.post_layernorm
        patches, read = self.projection(norm(x[:, 1:])), self.projection(norm(pairs))
        return patches.mT.unflatten(2, (self.cells, self.cells)), read


def pair_mask(
    lengths: Tensor, image: int, pairs: int, isolate: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor | None:
    """What is added to attention scores, (B, 1, 1 or L, L) of L = image + pairs tokens: 0 where a token may
    be seen, −inf at the pairs beyond `lengths` (B,). `isolate`: a pair is seen by itself only. None without
    pairs."""
    if not pairs:
        return None
    place = torch.arange(image + pairs, device=lengths.device)
    seen = (place < image + lengths.unsqueeze(1))[:, None, None]
    if isolate:  # padding sees itself, since a softmax needs something to see
        seen = ((place < image) | (place == place.unsqueeze(1)))[None, None].expand(len(lengths), 1, -1, -1)
    return torch.zeros(seen.shape, dtype=dtype, device=lengths.device).masked_fill(~seen, -torch.inf)


def square(size: Any, name: str) -> int:
    """One number for both sides, which may be given as two. Raises ValueError for two that differ."""
    both = [size] * 2 if isinstance(size, int) else list(size)
    if len(set(both)) != 1:
        raise ValueError(f"{name}={size} of the image encoder is not square; regions need one side")
    return int(both[0])


__all__ = ["AdaptedVision", "pair_mask", "square"]
