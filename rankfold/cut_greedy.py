"""Greedy cutting: lower the layer that costs the least loss for what it saves, until the budget is met.

    score(layer) = (loss with its next smaller size - loss now) / (cost saved),     the lowest is taken

The loss is that of one mini-batch. Maestro extracts nested models greedily; the exact step is not published,
and this one is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.batches import Batch, call, is_causal
from rankfold.cut_items import Item, try_, trying
from rankfold.metrics import Progress


@torch.no_grad()
def greedy(
    model: nn.Module, items: list[Item], limit: int, batches: Any, progress: Progress | None
) -> tuple[list[int], tuple[float, float]]:
    """The position of each item's size, and the loss before and after. The model is as it was."""
    batch = batches if isinstance(batches, Tensor) else batches[0]
    picks = [len(item.sizes) - 1 for item in items]
    with trying(model, items, batch):
        first = now = _loss(model, batch)
        spent = start = sum(item.costs[-1] for item in items)
        while spent > limit:
            best: tuple[float, int, float, int] | None = None
            for which, item in enumerate(items):
                if picks[which] == 0:
                    continue
                saved = item.costs[picks[which]] - item.costs[picks[which] - 1]
                try_(model, item, picks[which] - 1)
                loss = _loss(model, batch)
                try_(model, item, picks[which])
                score = (loss - now) / saved
                if best is None or score < best[0]:
                    best = (score, which, loss, saved)
            assert best is not None  # the smallest sizes fit: `_check`
            _, which, now, saved = best
            picks[which], spent = picks[which] - 1, spent - saved
            try_(model, items[which], picks[which])
            if progress:
                progress("cut", start - spent, start - limit)
    return picks, (first, now)


def _loss(model: nn.Module, batch: Batch) -> float:
    """The mean loss of a batch with labels; a causal language model's own tokens are its labels."""
    if isinstance(batch, Tensor) and is_causal(model):
        batch = {"input_ids": batch}
    if isinstance(batch, Mapping):
        if "labels" not in batch and is_causal(model):
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            batch = {**batch, "labels": batch["input_ids"].masked_fill(mask == 0, -100)}
        loss = getattr(call(model, batch, labels=True), "loss", None)
    else:
        loss = None
        if isinstance(batch, tuple):
            logits = call(model, batch)
            loss = F.cross_entropy(logits.flatten(0, -2), batch[1].to(logits.device).flatten())
    if loss is None:
        raise ValueError(
            "cut_(method='greedy') scores by the loss: give batches with labels, as pairs (inputs, labels), "
            "or mappings with 'labels' for a model whose output has `.loss`"
        )
    value = float(loss)
    return value if math.isfinite(value) else math.inf
