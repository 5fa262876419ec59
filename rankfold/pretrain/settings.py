"""How a run trains, checked before anything else happens."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import asdict, dataclass
from typing import Any

from rankfold.pretrain.trainer import OPTIMIZERS

# What may change between two sessions of one run: it changes no loss.
_FREE = ("eval_every", "save_every", "gradient_checkpointing")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a run trains. A step is one of the optimizer: accumulate x processes batches of batch_size windows.

    warmup   share of the steps in which the rate rises from 0; it then falls by a cosine to a tenth of `lr`
    clip     norm that the gradients are clipped to; 0: not
    dtype    "float32", or "bfloat16": weights and optimizer stay float32, products run under autocast
    """

    steps: int
    batch_size: int
    accumulate: int
    length: int
    lr: float
    warmup: float
    weight_decay: float
    clip: float
    dtype: str
    optimizer: str
    per_layer: bool
    gradient_checkpointing: bool
    eval_every: int
    save_every: int
    seed: int
    device: str
    processes: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1")
        for name, low in (("lr", 0.0), ("weight_decay", -1e-9), ("clip", -1e-9)):
            if not low < getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: a finite number above 0")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"--warmup {self.warmup}: the share of the steps, at least 0 and below 1")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"--dtype {self.dtype!r}: float32, or bfloat16 for autocast; in float16 training from "
                "scratch breaks down"
            )
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"--optimizer {self.optimizer!r}: choose one of {', '.join(OPTIMIZERS)}")
        if self.optimizer == "adamw_8bit" and importlib.util.find_spec("torchao") is None:
            raise ValueError(
                '--optimizer adamw_8bit needs torchao, which is not installed: pip install "rankfold[train]"'
            )
        if self.per_layer and self.clip:
            raise ValueError(
                "--per-layer steps before all gradients are there, so that they cannot be clipped by their "
                f"norm: --clip 0 (it is {self.clip:g})"
            )
        if self.per_layer and self.processes > 1:
            raise ValueError(
                f"--per-layer uses a gradient before {self.processes} processes have averaged it"
            )

    @property
    def warmup_steps(self) -> int:
        return round(self.warmup * self.steps)

    def to_json(self) -> dict[str, Any]:
        """What identifies the training: all that changes its losses."""
        return {key: value for key, value in asdict(self).items() if key not in _FREE}

    @property
    def windows(self) -> int:
        """In the whole run."""
        return self.steps * self.batch_size * self.accumulate * self.processes
