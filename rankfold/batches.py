"""Batches: what a model is run on, and what its output is differentiated against.

A batch is a mapping of keyword arguments ("labels" among them), a tensor, or a pair (inputs, labels). The
gradient of the summed cross-entropy is p - e_y at the logits, so neither the loss nor its graph is formed.
Drawn labels y ~ p give the true Fisher; the batch's own labels give the empirical one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Any] | Tensor | tuple[Any, ...]


def as_batches(model: nn.Module, batches: Iterable[Batch] | None) -> tuple[Iterator[Batch], int | None]:
    """An iterator of batches and their number where known. Raises ValueError for None."""
    if batches is None:
        raise ValueError(
            "this recipe calibrates on data but batches is None; pass batches=… (tensors or dicts of tensors)"
        )
    if isinstance(batches, Tensor):
        key = "input_ids" if hasattr(model, "config") and not batches.is_floating_point() else None
        batches = [{key: part} if key else part for part in batches.split(4)]
    total = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
    return iter(batches), total


def call(model: nn.Module, batch: Batch, *, labels: bool = False) -> Any:
    """The model's output on a batch, on the model's device, without its labels unless asked for or needed."""
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        needs_labels = labels or bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        if not needs_labels:
            arguments.pop("labels", None)
        if "use_cache" in inspect.signature(model.forward).parameters:
            arguments.setdefault("use_cache", False)
        return model(**arguments)
    return model((batch[0] if isinstance(batch, tuple) else batch).to(device))


def differentiate(
    model: nn.Module, output: Any, batch: Batch, labels: str, generator: torch.Generator
) -> None:
    """Back-propagate the summed cross-entropy of sampled or true labels, from its gradient p - e_y, without
    forming the loss."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or not logits.requires_grad:
        raise ValueError(
            "this recipe differentiates the model's output, but the output has no `.logits` that depend on "
            "the selected layers; "
            "use the model with its head (…ForCausalLM, …ForSequenceClassification), or a recipe without "
            "gradients"
        )
    targets = _targets(model, logits, batch) if labels == "data" else _positions(model, logits, batch)
    if targets is None:
        loss = None
        if count_examples(batch) == 1:  # of several, a mean: its gradient is no example's
            loss = getattr(output, "loss", None)
            if loss is None and isinstance(batch, Mapping) and "labels" in batch:
                loss = getattr(call(model, batch, labels=True), "loss", None)
        if loss is None:
            raise ValueError(
                "recipe needs labels: give batches a 'labels' entry of class indices shaped like the logits "
                "without their last dimension, or (for a loss of the model's own) batches of one example "
                "whose output has `.loss`"
            )
        loss.backward()
        return
    with torch.no_grad():
        slope = logits.detach().float().softmax(-1)
        if labels == "sampled":
            index = draw(slope.flatten(0, -2), generator).view(*targets.shape, 1)
        else:
            index = targets.clamp_min(0)[..., None]
        slope.scatter_add_(-1, index, -torch.ones_like(index, dtype=slope.dtype))
        slope *= (targets >= 0)[..., None]
    logits.backward(slope.to(logits.dtype))


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One index a row of probabilities (rows, classes), by inverting the cumulative sum; (rows,) int64.

    One uniform number a row, where `torch.multinomial` draws one a class. Blocks of rows bound the memory.
    """
    uniform = torch.rand(len(probabilities), 1, generator=generator).to(probabilities.device)
    drawn = []
    for part, number in zip(probabilities.split(256), uniform.split(256), strict=True):
        cumulative = part.cumsum(-1)
        drawn.append(torch.searchsorted(cumulative, number * cumulative[:, -1:], right=True).squeeze(-1))
    return torch.cat(drawn).clamp_max(probabilities.shape[-1] - 1)


def _targets(model: nn.Module, logits: Tensor, batch: Batch) -> Tensor | None:
    """True class indices for each row of logits, -100 where there is none; None if the labels are not class
    indices."""
    labels = (
        batch.get("labels") if isinstance(batch, Mapping) else batch[1] if isinstance(batch, tuple) else None
    )
    if is_causal(model) and isinstance(batch, Mapping):
        mask = batch.get("attention_mask")
        if labels is None:
            labels = batch["input_ids"]
            labels = labels if mask is None else labels.masked_fill(mask == 0, -100)
        # The one and only shift: the logits at t predict the token at t + 1.
        labels = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), -100)], 1)
        if isinstance(mask, Tensor) and mask.shape == labels.shape:
            labels = labels.masked_fill(mask == 0, -100)  # padding on the left predicts nothing either
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        return None
    return labels.to(logits.device).long()


def _positions(model: nn.Module, logits: Tensor, batch: Batch) -> Tensor:
    """0 where a label is to be drawn, -100 at padding."""
    positions = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    if isinstance(batch, Mapping):
        for mask in (batch.get("decoder_attention_mask"), batch.get("attention_mask")):
            if isinstance(mask, Tensor) and mask.shape == positions.shape:
                return positions.masked_fill(mask.to(logits.device) == 0, -100)
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and labels.shape == positions.shape:
            return positions.masked_fill(labels.to(logits.device) == -100, -100)
    return positions


def is_causal(model: nn.Module) -> bool:
    """Does the model predict its own next token, so that its inputs are its labels?"""
    generates = getattr(model, "can_generate", None)
    return bool(generates and generates()) and not getattr(
        getattr(model, "config", None), "is_encoder_decoder", False
    )


def one_example(batch: Batch) -> Batch:
    n = count_examples(batch)

    def cut(value: Any) -> Any:
        return value[:1] if isinstance(value, Tensor) and value.dim() and value.shape[0] == n else value

    if isinstance(batch, Mapping):
        return {key: cut(value) for key, value in batch.items()}
    return tuple(cut(v) for v in batch) if isinstance(batch, tuple) else cut(batch)


def count_examples(batch: Batch) -> int:
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple) else [batch]
    return next((len(v) for v in values if isinstance(v, Tensor) and v.dim()), 1)


def count_tokens(batch: Batch) -> tuple[int, dict[torch.Size, Tensor]]:
    """The tokens of a batch (examples, where its input is not integers), and boolean masks of real tokens by
    shape."""
    if not isinstance(batch, Mapping):
        x = batch[0] if isinstance(batch, tuple) else batch
        return (x.shape[0] if x.is_floating_point() else x.numel()), {}
    masks: dict[torch.Size, Tensor] = {}
    for key in ("attention_mask", "decoder_attention_mask"):
        mask = batch.get(key)
        if isinstance(mask, Tensor) and mask.dim() == 2 and not mask.all():
            masks.setdefault(mask.shape, mask.bool())
            masks.setdefault(torch.Size([mask.numel()]), mask.bool().flatten())
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor):
        mask = batch.get("attention_mask")
        return int(mask.sum()) if isinstance(mask, Tensor) else ids.numel(), masks
    return count_examples(batch), masks
