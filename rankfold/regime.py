"""What a regime is: verbs that the user's own training loop calls, so that a model ends up small.

    regime.start_(model, steps=1000)            # before the optimizer is made
    for batch in batches:
        regime.before_step()
        (loss(model, batch) + regime.penalty()).backward()
        optimizer.step(); optimizer.zero_grad()
        regime.after_step()
    regime.finish_()                            # small structures; no tensor changes its shape before this

    Law: the model's state dict and the number of steps done are the whole state of a regime.

So a checkpoint of the model is a checkpoint of the regime: `start_` on the same model, load the state dict,
`schedule(steps, step)`, and the run goes on bit for bit. Whatever a regime draws, it draws from its seed and
the step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Regime(ABC):
    """Base of the regimes. A subclass sets `self._model` in `start_`, and to None in `finish_`.

    Under gradient accumulation a step is a step of the optimizer: `before_step` comes before its first
    micro-batch, the penalty is added once, `after_step` follows `optimizer.step`.
    """

    def __init__(self) -> None:
        self.steps: int | None = None
        self.step = 0
        self._model: nn.Module | None = None

    def schedule(self, steps: int | None, step: int = 0) -> None:
        """Say how many steps the training has, and how many of them are done: after resuming."""
        if steps is not None and steps < 1:
            raise ValueError(f"steps={steps} of training must be at least 1")
        if step < 0:
            raise ValueError(f"step={step} is the number of steps done, at least 0")
        self.steps, self.step = steps, step

    @property
    def model(self) -> nn.Module:
        """The model in training. Raises ValueError before `start_` and after `finish_`."""
        if self._model is None:
            raise ValueError(
                "this regime is not in training (never started, or finished): call start_(model)"
            )
        return self._model

    def before_step(self) -> None:
        """Before the forward passes of a step."""
        _ = self.model

    def penalty(self) -> Tensor:
        """What to add to the loss, a scalar; 0 where the regime has none."""
        _ = self.model
        return torch.zeros(())

    @torch.no_grad()
    def penalty_gradients_(self) -> None:
        """Add the gradient of `penalty` to the gradients, for who does not write the loss: after the
        backward pass, before the optimizer's step."""
        _ = self.model

    def after_step(self) -> None:
        """After the optimizer's step."""
        _ = self.model
        self.step += 1

    @abstractmethod
    def finish_(self) -> Mapping[str, Any]:
        """Put the small structures in place and end; returns one fact by layer, as the regime says."""
