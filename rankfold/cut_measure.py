"""The scale of a curve, from one measurement of each layer.

    curve(b)  <-  curve(b) · KL(model ‖ model with this layer cut to b₀) / (curve(b₀) / 2)

A curve of second moments is right for small changes whose effects on the output do not add up over positions:
not before a mean over an image, nor at hard budgets. Its shape is kept, its scale is measured where the
budget will be spent. [the idea of LEMS: one real KL a matrix]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.batches import Batch, as_batches, call
from rankfold.cut_items import Item, try_, trying
from rankfold.method import Curve
from rankfold.metrics import Progress


@torch.no_grad()
def measured(
    model: nn.Module,
    items: list[Item],
    curves: Mapping[str, Curve],
    share: float,
    batches: Any,
    progress: Progress | None = None,
) -> dict[str, Curve]:
    """The curves, each scaled to the KL (nats a row of logits, on the first batch) of cutting that item alone
    to its largest size within `share` of its dense cost. One forward pass an item; the model stays as it was.
    """
    batch = next(as_batches(model, batches)[0])
    scaled = dict(curves)
    with trying(model, items, batch):
        before = _logits(model, batch)
        for done, item in enumerate(items):
            if progress:
                progress("measure", done, len(items))
            name = item.names[-1]
            curve = curves[name]
            pick = max((i for i, c in enumerate(curve.costs[:-1]) if c <= share * item.dense), default=0)
            if len(curve.sizes) == 1 or not curve.errors[pick] > 0:
                continue  # nothing to choose, or nothing to scale
            try_(model, item, pick)
            lost = _divergence(before, _logits(model, batch), batch)
            try_(model, item, -1)
            if 0 < lost < float("inf"):
                scale = 2 * lost / curve.errors[pick]
                errors = tuple(scale * error for error in curve.errors)
                scaled[name] = replace(curve, errors=errors, energy=scale * curve.energy)
    return scaled


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    output = call(model, batch)
    return getattr(output, "logits", output).float().log_softmax(-1)


def _divergence(before: Tensor, after: Tensor, batch: Batch) -> float:
    """Mean KL(before ‖ after) over rows of log-probabilities, without those of padding."""
    rows = (before.exp() * (before - after)).sum(-1)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and mask.shape == rows.shape:
        rows = rows[mask.to(rows.device).bool()]
    return float(rows.mean())
