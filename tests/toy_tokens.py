"""Small models with a TokenWara around some of their layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from toy_adapters import stir_

from rankfold.token_wavelet import token_wara_


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)).eval()


def wrapped(model: nn.Module, names: list[str], **options: Any) -> Any:
    token_wara_(model, names, 2, **options)
    return stir_(model)
