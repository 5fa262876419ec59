"""How many parameters each part of a HOLa model trains.

With `upstream=True` and rank 71 these are the numbers of the public code: 4,024,922 on the smaller image
encoder of the paper and 7,933,530 on the larger, of which a fifth is never used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from rankfold.hoi.model import HolaModel


class Unused(nn.Module):
    """What the public code registers as trainable and never calls: two layers to fuse visual features,
    2D -> D -> D, and features of the action basis (actions, D). Zeros, which change no output."""

    def __init__(self, width: int, actions: int) -> None:
        super().__init__()
        shapes = ((width, 2 * width), (width,), (width, width), (width,))
        self.vis_fuse = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in shapes)
        self.act_basis_feat = nn.Parameter(torch.zeros(actions, width))


def accounting(model: HolaModel) -> dict[str, int]:
    """{part: parameters that require gradients}, in the order of the model; they sum to all there are."""
    language = model.language
    parts: dict[str, list[nn.Module | nn.Parameter | None]] = {
        "decomposition": [language.decomposition],
        "image encoder adapters": [model.vision],
        "text adapters": [language.self_adapter, language.mem_adapter],
        "pair adapters": [model.img_adapter, language.ho_fuse],
        "tokens": [model.tokens],
        "prior": [model.prior_mlp],
        "scales": [model.pair_scale, model.union_scale],
        "unused": [model.unused],
    }
    return {name: sum(map(_trained, held)) for name, held in parts.items()}


def _trained(item: nn.Module | nn.Parameter | None) -> int:
    if item is None:
        return 0
    held = item.parameters() if isinstance(item, nn.Module) else [item]
    return sum(p.numel() for p in held if p.requires_grad)


__all__ = ["Unused", "accounting"]
