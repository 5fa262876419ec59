"""A model of two layers with a sparse code in it, and the training loop of the docstring."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import rankfold
from rankfold.hosts import hosts
from rankfold.sparse_code import SparseCode
from rankfold.straight_through import StraightThrough


def code(out: int = 12, blocks: int = 2, atoms: int = 6, nonzeros: int = 2, orient: str = "in") -> SparseCode:
    """A random sparse code with blocks of width 4."""
    index = torch.rand(out, blocks, atoms).argsort(-1)[..., :nonzeros]
    return SparseCode.of(
        torch.randn(blocks, atoms, 4), torch.randn(out, blocks, nonzeros), index, orient=orient
    )


def coded(**options: Any) -> nn.Sequential:
    """Two layers, the first one a sparse code (12, 8)."""
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))
    model[0] = rankfold.Layer(model[0]).wrap(code(**options))
    return model


def train(
    model: nn.Module, regime: StraightThrough | None, steps: int, rate: float = 0.05, seed: int = 1
) -> list[float]:
    """Losses of a small regression with AdamW, in the loop that the docstring shows."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 8, generator=draw)
    y = torch.randn(64, 3, generator=draw)
    groups = (
        regime.parameter_groups(0.0)
        if regime
        else [{"params": [p for p in model.parameters() if p.requires_grad]}]
    )
    optimizer, losses = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0), []
    for _ in range(steps):
        if regime:
            regime.before_step()
        loss = F.mse_loss(model(x), y)
        losses.append(float(loss.detach()))
        if regime:
            loss = loss + regime.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if regime:
            regime.after_step()
    return losses


def master(model: nn.Module) -> Any:
    return next(iter(hosts(model).values())).weight


def dense() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3))
