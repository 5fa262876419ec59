"""Straight-through training in the Trainer of transformers: each verb of the regime at its moment.

    regime = StraightThrough()
    regime.start_(model)                                                  # before the Trainer is made
    Trainer(model, arguments, …, callbacks=[StraightThroughCallback(regime)]).train()

The Trainer's optimizer decays what it decays; with a weight decay, give it one of
`regime.parameter_groups(weight_decay)`.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from rankfold.straight_through import StraightThrough


class StraightThroughCallback(TrainerCallback):
    """Calls the verbs of `regime`, started on the Trainer's model, and tells it the number of steps.

    finish  call `finish_` when training ends, after the Trainer has loaded its best model if it does that;
            `moved` then holds what it returned. False leaves it to the caller

    The penalty is added to the gradients, after they are clipped. The checkpoints of the run hold the
    masters: to resume, start the regime on the same model again, and give the folder to `Trainer.train`.
    """

    def __init__(self, regime: StraightThrough, finish: bool = True) -> None:
        self.regime, self.finish = regime, finish
        self.moved: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.regime.schedule(state.max_steps, state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.regime.before_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.regime.decay_gradients_()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.regime.after_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.finish:
            self.moved = self.regime.finish_()
