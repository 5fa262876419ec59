"""Regimes in the Trainer of transformers: each verb at its moment.

    regime = StraightThrough()
    regime.start_(model)                                                  # before the Trainer is made
    Trainer(model, arguments, …, callbacks=[RegimeCallback(regime)]).train()

The Trainer's optimizer decays what it decays; a regime that would not have that (codes) offers
`parameter_groups`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from rankfold.optimizers import check_optimizer
from rankfold.regime import Regime


class RegimeCallback(TrainerCallback):
    """Calls the verbs of `regime`, started on the Trainer's model, and tells it the number of steps.

    finish  call `finish_` when training ends, after the Trainer has loaded its best model if it does that;
            `facts` then holds what it returned. False leaves it to the caller

    The penalty is added to the gradients, after they are clipped. The checkpoints of the run hold all of a
    regime's state: to resume, start the regime on the same model again, and give the folder to
    `Trainer.train`. Raises ValueError where the Trainer was given an optimizer that was made too early.
    """

    def __init__(self, regime: Regime, finish: bool = True) -> None:
        self.regime, self.finish = regime, finish
        self.facts: Mapping[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = getattr(kwargs.get("optimizer"), "optimizer", kwargs.get("optimizer"))
        if optimizer is not None:
            check_optimizer(self.regime.model, optimizer)
        self.regime.schedule(state.max_steps, state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.regime.before_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.regime.penalty_gradients_()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.regime.after_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.finish:
            self.facts = self.regime.finish_()
