"""Fresh weights of the models here: every layer as torch starts it, word vectors from a normal.

transformers draws what a checkpoint lacks after the model was built without memory, so each module must be
able to start again; what was loaded is never drawn over.
"""

from __future__ import annotations

import torch
from torch import nn

from rankfold.linformer import LinformerAttention
from rankfold.pooling import LamaPooling


@torch.no_grad()
def draw_(module: nn.Module, std: float) -> None:
    """Draw the parameters that `module` itself holds: a table of vectors from N(0, std²) with a padding row
    of zeros, any other module by its own rule."""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=std)
        if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
            module.weight[module.padding_idx].zero_()
    elif isinstance(module, LinformerAttention):
        module.reset_positions()
    elif isinstance(module, LamaPooling):
        module.reset_context()
    elif next(module.parameters(recurse=False), None) is not None:
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
