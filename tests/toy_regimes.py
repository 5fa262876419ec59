"""Every form of training that ships, behind one face, and the plain loop of `rankfold.regime`.

`start_` on a model that is in this training already, e.g. opened from a checkpoint, goes on with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rankfold
from rankfold import recipes
from rankfold.hosts import hosts
from rankfold.methods import SVD, Dictionary
from rankfold.ordered_dropout import OrderedDropout
from rankfold.regime import Regime
from rankfold.straight_through import StraightThrough
from rankfold.truncate import Truncate


class Factorized(Regime):
    """No regime, under a regime's verbs: `factorize_` with a fresh recipe, then ordinary training."""

    def __init__(self, recipe: Any) -> None:
        super().__init__()
        self.recipe = recipe

    def start_(self, model: nn.Module, *, steps: int | None = None, skip: Sequence[str] = ()) -> None:
        if not hosts(model):
            rankfold.factorize_(model, self.recipe, skip=skip)
        self._model = model
        self.schedule(steps)

    def finish_(self) -> Mapping[str, Any]:
        self._model = None
        return {}


class Dense(StraightThrough):
    """Straight-through training of sparse codes or of weights, from the dense layers."""

    def start_(self, model: nn.Module, **options: Any) -> None:  # type: ignore[override]
        super().start_(model, **({} if hosts(model) else {"budget": 0.6}), **options)


class All(Truncate):
    """Truncation of the linear layers but a head: by default it takes convolutions."""

    def start_(self, model: nn.Module, **options: Any) -> None:  # type: ignore[override]
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        super().start_(model, targets=[name for name in names if name != "lm_head"], **options)


# Harsh options: something has to happen within six steps of a tiny model.
FORMS: dict[str, Callable[[], Any]] = {
    "sltrain": lambda: Factorized(recipes.sltrain(rank=6, sparsity=0.05, alpha=6.0)),
    "low_rank": lambda: Factorized(recipes.low_rank(rank=6)),
    "maestro": lambda: OrderedDropout(penalty=1e-3, eps=0.2, shrink_every=2, seed=3),
    "maestro_independent": lambda: OrderedDropout(
        penalty=1e-3, sampler="independent", eps=0.2, shrink_every=2
    ),
    "trp": lambda: All(e=0.5, every=2, nuclear=1e-3),
    "codes": lambda: Dense(
        Dictionary(solver="ksvd", width=8, ratio=2.0, sweeps=1), freeze=0.3, decay=1e-3, ramp=0.3
    ),
    "refitted": lambda: Dense(SVD(), reading="weight", freeze=0.3, decay=1e-3, refit=2),
}


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two linear layers, (24, 16) and (16, 24); the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16)).to(dtype).train()


def batches(count: int, rows: int = 8, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """[(x, y)] each (rows, 16)."""
    draw = torch.Generator().manual_seed(2)
    return [(torch.randn(2, rows, 16, generator=draw, dtype=dtype)).unbind() for _ in range(count)]  # type: ignore[misc]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def train(
    model: nn.Module,
    regime: Any,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[Sequence[Any]],
    loss: Callable[[nn.Module, Any], Tensor] = loss_of,
    schedule: Any = None,
) -> list[float]:
    """The loop that `rankfold.regime` documents; a step is a list of micro-batches. Returns their losses."""
    losses = []
    for micro in steps:
        regime.before_step()
        for i, batch in enumerate(micro):
            value = loss(model, batch) / len(micro)
            losses.append(float(value.detach()) * len(micro))
            (value + regime.penalty() if i == 0 else value).backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule:
            schedule.step()
        regime.after_step()
    return losses
