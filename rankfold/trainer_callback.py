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
from rankfold.step_in_backward import StepInBackward, is_stepped


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
        if any(is_stepped(p) for p in self.regime.model.parameters()) and self.regime.penalty().requires_grad:
            raise ValueError(
                f"{type(self.regime).__name__} has a penalty, which is added to the gradients after the "
                "backward pass, and steps in the backward pass leave none. Add regime.penalty() to the loss "
                "in a loop of your own, set the penalty to 0, or step in the ordinary way"
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.regime.penalty_gradients_()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.regime.after_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.finish:
            self.facts = self.regime.finish_()


class StepInBackwardCallback(TrainerCallback):
    """Steps the Trainer's own optimizer inside the backward pass (`StepInBackward`), so that the gradients of
    one layer live at a time: 8-bit or not, with its schedule, its checkpoints and its resuming.

        arguments = TrainingArguments(…, max_grad_norm=0.0, optim="adamw_torch_8bit")
        Trainer(model, arguments, …, callbacks=[StepInBackwardCallback()]).train()

    The Trainer logs the norm of the gradients as 0: none is left. Raises ValueError, when training begins,
    for what such a step cannot have: clipping (`max_grad_norm`), float16, several processes without FSDP2.
    """

    def __init__(self) -> None:
        self._steps: StepInBackward | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.max_grad_norm:
            raise ValueError(
                f"max_grad_norm={args.max_grad_norm} clips by the norm of all gradients, and a step in the "
                "backward pass never has them all: set max_grad_norm=0.0"
            )
        if args.fp16:
            raise ValueError(
                "fp16=True scales the loss, and a step in the backward pass would use gradients that are "
                "still scaled: use bf16=True"
            )
        self.on_train_end(args, state, control)  # of a training that an exception ended
        optimizer = kwargs["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self._steps = StepInBackward(optimizer, args.gradient_accumulation_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._steps is not None:
            self._steps.close()
            self._steps = None
