"""Small models for ordered dropout, and the documented loop."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from rankfold.ordered_dropout import OrderedDropout


def mlp(*widths: int) -> nn.Sequential:
    layers = [layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def train(model: nn.Module, regime: OrderedDropout, steps: int, rate: float = 0.01) -> list[dict[str, int]]:
    """The ranks after every step, of fitting a sum."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    generator, ranks = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        x = torch.randn(16, 8, generator=generator)
        regime.before_step()
        (model(x)[:, 0] - x.sum(1)).square().mean().add(regime.penalty()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        regime.after_step()
        ranks.append(regime.ranks)
    return ranks


class Mixed(nn.Module):
    """An embedding, a convolution, two linear layers; called in another order than registered."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 3)
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.first = nn.Linear(6, 8)
        self.table = nn.Embedding(9, 6)

    def forward(self, index: Tensor) -> Tensor:
        x = self.first(self.table(index))  # (N, 4, 8)
        return self.last(self.conv(x.view(-1, 2, 2, 8)).mean(2)).mean(1)
