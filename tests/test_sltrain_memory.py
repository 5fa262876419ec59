"""A step of SLTrain keeps no dense weight: less memory than plain autograd and than full rank."""

from __future__ import annotations

import torch
from torch import nn
from toy_sltrain import Block, Step, by_autograd_, measured

from rankfold import factorize_, recipes

HIDDEN, INNER, BLOCKS, TOKENS = 96, 256, 4, 64


def step(form: str) -> Step:
    model = nn.Sequential(*[Block(HIDDEN, INNER) for _ in range(BLOCKS)])
    if form != "full rank":
        factorize_(model, recipes.sltrain(rank=0.4))
    if form == "plain autograd":
        by_autograd_(model)
    x = torch.randn(TOKENS, HIDDEN, requires_grad=True)  # as an embedding's output does
    return measured(model, lambda: model(x).square().mean())


def test_the_peak_of_a_step() -> None:
    """In exact bytes: weights, gradients, moments, activations as in a dense model, and one dense matrix."""
    full, naive, ours = (step(form) for form in ("full rank", "plain autograd", "ours"))
    dense = 4 * sum(p.numel() for p in Block(HIDDEN, INNER).parameters()) * BLOCKS
    activations = 4 * TOKENS * BLOCKS * Block.saved(HIDDEN, INNER)
    last = 4 * TOKENS * HIDDEN  # the loss keeps the output
    assert ours.saved == full.saved == activations + last
    assert naive.saved == ours.saved + dense
    assert ours.peak < naive.peak - 0.9 * dense and ours.peak < full.peak
    assert ours.floor < ours.peak <= 1.15 * ours.floor
