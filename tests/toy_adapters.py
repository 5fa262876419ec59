"""Small models to adapt, and a few training steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

IDS = torch.arange(24).view(2, 12)


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


def train(model: nn.Module, steps: int = 2, lr: float = 0.05) -> None:
    """A few steps on the model's own inputs: from the second on, both factors of an adapter move."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(IDS, labels=IDS).loss.backward()
        optimizer.step()
    model.eval()


def conv1d_model() -> Any:
    """A transformer whose layers are transformers' `Conv1D`, with its tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 30, "n_layer": 1, "n_head": 3, "vocab_size": 96, "n_positions": 64}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    return GPT2LMHeadModel(config).eval()


def convolutions() -> nn.Sequential:
    """Images (N, 3, 9, 7) to 5 logits: a strided and a padded convolution of odd sizes, a batch norm."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 9, 3, stride=2, padding=1),
        nn.BatchNorm2d(9),
        nn.ReLU(),
        nn.Conv2d(9, 10, 3, padding="same", padding_mode="reflect", bias=False),
        nn.Flatten(),
        nn.Linear(10 * 5 * 4, 5),
    ).eval()


def images(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 9, 7, generator=torch.Generator().manual_seed(seed))


def stir_(model: nn.Module, amount: float = 0.1) -> nn.Module:
    """Every trainable parameter moved at random, as training would: adapters then do something."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += amount * torch.randn_like(parameter)
    return model
