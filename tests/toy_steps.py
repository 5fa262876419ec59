"""What the tests of optimizer steps share: a factorized language model, its data, and what to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import rankfold

DATA = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(4, 128, (16, 16), generator=torch.Generator().manual_seed(1))
]


def factorized(tiny_llama: Callable[..., Any], **options: Any) -> Any:
    model = tiny_llama(**options).train()
    rankfold.factorize_(model, rankfold.recipes.svd, budget=0.6)
    return model


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
