"""What the tests of optimizer steps share: a factorized language model, its data, and what to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import rankfold

DATA = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(4, 128, (16, 16), generator=torch.Generator().manual_seed(1))
]


def factorized(tiny_llama: Callable[..., Any], **options: Any) -> Any:
    model = tiny_llama(**options).train()
    rankfold.factorize_(model, rankfold.recipes.svd, budget=0.6)
    return model


def trainer(
    model: Any, out: Path, *callbacks: Any, make: dict[str, Any] | None = None, **options: Any
) -> Trainer:
    """A quiet Trainer of four steps over DATA. `options` go to its arguments, `make` to itself."""
    defaults: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
        "dataloader_pin_memory": False,
    }
    given = {"train_dataset": DATA, "callbacks": list(callbacks)} | (make or {})
    return Trainer(model, TrainingArguments(**(defaults | options)), **given)


def same(first: nn.Module, second: nn.Module) -> None:
    mine, theirs = first.state_dict(), second.state_dict()
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


@contextmanager
def gradients_alive(model: nn.Module) -> Iterator[list[int]]:
    """[the most bytes of complete gradients at one time], seen whenever one more is complete."""
    most = [0]

    def look(_: Tensor) -> None:
        held = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        most[0] = max(most[0], held)

    handles = [p.register_post_accumulate_grad_hook(look) for p in model.parameters()]
    yield most
    for handle in handles:
        handle.remove()
