"""How large a classifier is: parameters, those of its attention, multiply-adds a sequence, bytes on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rankfold.classify.build import attention_params
from rankfold.footprint import bytes_on_disk, params


def size_of(model: nn.Module, length: int, folder: Path | None = None) -> dict[str, Any]:
    """The facts of one model; multiply-adds are those of one sequence of `length` tokens, counted as it runs
    (recurrent cells and attention scores included, functions of one element not)."""
    facts: dict[str, Any] = {
        "parameters": params(model),
        "attention_parameters": attention_params(model),
        "embedding_parameters": params(model.get_input_embeddings()),  # type: ignore[operator]
        "macs": macs(model, length),
        "macs_length": length,
    }
    if folder is not None:
        facts["bytes"] = bytes_on_disk(folder)["payload"]
    return facts


def macs(model: nn.Module, length: int) -> int:
    """Multiply-adds of one sequence of `length` tokens in eval mode."""
    place = next(model.parameters()).device
    ids = torch.ones(1, length, dtype=torch.long, device=place)
    was = model.training
    model.eval()
    # The counter hooks into autograd wherever a parameter is an input, so that gradients must be on.
    with torch.enable_grad(), FlopCounterMode(display=False) as counted:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    model.train(was)
    return counted.get_total_flops() // 2
