"""Open a model by the name a user gives: a hub id, a folder, a `.gguf` file, or a packaged model.

The class is the one the configuration names, so that a classifier opens with its head; a name without one
opens as a causal language model. Never runs code from a checkpoint.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankfold.gguf import PACKAGED, detach_gguf_, load_gguf, packaged_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Opened:
    """A model in eval mode, its tokenizer (None where it has none), the name it was opened by, and the image
    processor of one that has no tokenizer."""

    model: nn.Module
    tokenizer: Any
    name: str
    processor: Any = None

    @property
    def reader(self) -> Any:
        """What is saved beside the model: its tokenizer, its image processor, or None."""
        return self.processor if self.tokenizer is None else self.tokenizer

    @property
    def causal(self) -> bool:
        from rankfold.batches import is_causal

        return is_causal(self.model)


def open_model(name: str, *, dtype: str | None = None, device: str | None = None) -> Opened:
    """Load `name`. `dtype` None keeps the checkpoint's own (float32 for GGUF, whose weights are dequantized).

    Raises ValueError for an unknown dtype, a model that cannot be found or read, with the remedy.
    """
    import transformers

    import rankfold.hf  # noqa: F401  folders that rankfold wrote load, whether or not autoload is on
    from rankfold.models import MODELS

    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name in PACKAGED or name.endswith(".gguf"):
        path = packaged_model(name) if name in PACKAGED else Path(name)
        if Path(path).suffix == ".gguf":
            model, tokenizer = load_gguf(path, dtype=DTYPES[dtype or "float32"])
            return Opened(model.to(place).eval(), tokenizer, name)
        source = str(path)
    else:
        source = name
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        architecture = (getattr(config, "architectures", None) or [""])[0]
        cls = MODELS.get(architecture) or getattr(transformers, architecture, None)
        cls = cls or transformers.AutoModelForCausalLM
        model: Any = cls.from_pretrained(source, dtype=DTYPES[dtype] if dtype else "auto")
    except OSError as error:
        raise ValueError(
            f"no model {name!r}: not a folder with config.json, not a .gguf file, not packaged "
            f"({', '.join(PACKAGED)}), and the "
            f"hub could not be asked ({str(error).splitlines()[0]})"
        ) from error
    detach_gguf_(model)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError):
        tokenizer = None
    return Opened(
        model.to(place).eval(), tokenizer, name, image_processor(source) if tokenizer is None else None
    )


def image_processor(source: str) -> Any:
    """The image processor of a folder or hub id, without torchvision; None where there is none."""
    import transformers

    try:
        return transformers.AutoImageProcessor.from_pretrained(source, backend="pil")
    except (OSError, ValueError, KeyError, ImportError):
        return None


def one_device(device: str | None, command: str) -> str:
    """ "cpu" or "cuda", by default a GPU where there is one. Raises ValueError for another, for one that is
    not there, and under torchrun, by the name of the command, which uses one process."""
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if place not in ("cpu", "cuda"):
        raise ValueError(f"--device {place!r}: cpu or cuda; CUDA_VISIBLE_DEVICES says which")
    if place == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no CUDA device here")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"rankfold {command} runs in one process; start it without torchrun")
    return place
