"""Optimizer steps inside the backward pass: a gradient is used and freed as soon as it is complete.

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with StepInBackward(optimizer):
        for batch in batches:
            loss(model, batch).backward()        # every parameter has made its step when this returns
            optimizer.step()                     # steps what is left: nothing

All gradients, as large as the model, become the gradients of one layer. The optimizer stays what it is: its
state dict, its schedule of learning rates and its Trainer notice nothing, and the steps are the same bit for
bit. [per-layer weight updates: Lv et al., LOMO, 2023; GaLore, 2024; SLTrain, 2024]
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer


class StepInBackward:
    """Makes `optimizer` step each of its parameters as soon as the gradient is there, until `close`.

    optimizer   any that treats each parameter on its own: SGD, Adam, AdamW, Adafactor, 8-bit Adam (torchao,
                bitsandbytes). Keep using it as before, `optimizer.step()` once a step: there it steps what is
                left, which is a parameter that had no part in some micro-batch, or a last group of fewer
                micro-batches than the others
    accumulate  micro-batches to a step. With more than one, all gradients live until the last of them, as
                ever: its backward pass frees them, but the memory that this is for is not saved

    **What cannot be had**, since a gradient is gone before the others are there: clipping by the norm of all
    gradients, which would find none and say nothing; a `GradScaler`; gradients added after the backward pass;
    DistributedDataParallel, which averages gradients too late. FSDP2 (`fully_shard`) works. In the Trainer of
    transformers: `rankfold.trainer_callback.StepInBackwardCallback`, which refuses these.

    Raises ValueError for an optimizer that works on all parameters together, a parameter that another
    StepInBackward steps, and processes that would each train a model of their own. While training, a
    ValueError comes from `backward` or from `optimizer.step` where the loop does not fit `accumulate`.
    """

    def __init__(self, optimizer: Optimizer, accumulate: int = 1) -> None:
        if not isinstance(optimizer, Optimizer):
            raise ValueError(
                f"StepInBackward takes an optimizer of torch; got {type(optimizer).__name__}. "
                "Write StepInBackward(torch.optim.AdamW(model.parameters(), lr=...))"
            )
        if not isinstance(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
            raise ValueError(
                f"StepInBackward(accumulate={accumulate!r}): micro-batches to a step, at least 1"
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("LBFGS works on all gradients at once: it cannot step one parameter at a time")
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        for parameter in trained:
            check_alone(parameter)
            if is_stepped(parameter):
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} is stepped by another StepInBackward: "
                    "close() that one first"
                )
        self.accumulate = accumulate
        # The optimizer holds this, and this and its hooks hold weakly: when it is gone, its steps end.
        self._optimizer = weakref.ref(optimizer)
        self._group = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._seen: dict[Tensor, int] = {}  # gradients since the last step
        self._inside = False
        self._lock = threading.Lock()  # each accelerator runs its hooks in a thread of its own
        hook = _Hook(self)
        self._handles: list[Any] = [p.register_post_accumulate_grad_hook(hook) for p in trained]
        self._handles.append(optimizer.register_step_pre_hook(self._check))
        self._handles.append(optimizer.register_step_post_hook(self._forget))

    def close(self) -> None:
        """Give the optimizer back: from now on it steps in `optimizer.step` alone."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> StepInBackward:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _arrived(self, optimizer: Optimizer, parameter: Tensor) -> None:
        """The gradient of `parameter` is complete for this backward pass."""
        check_alone(parameter)
        seen = self._seen[parameter] = self._seen.get(parameter, 0) + 1
        if seen > self.accumulate:
            raise ValueError(
                f"backward pass {seen} after optimizer.step(), and accumulate={self.accumulate}: the step is "
                "made. Call optimizer.step() once a step, and say StepInBackward(accumulate=...) as "
                "the loop accumulates. (Under reentrant checkpointing a parameter of several blocks counts "
                "as often: use_reentrant=False)"
            )
        if seen == self.accumulate:
            with self._lock:
                self._step(optimizer, parameter)
            parameter.grad = None

    def _step(self, optimizer: Optimizer, parameter: Tensor) -> None:
        groups = optimizer.param_groups
        group = groups[self._group[parameter]]
        alone = {**group, "params": [parameter]}
        optimizer.param_groups, self._inside = [alone], True
        try:
            optimizer.step()
        finally:
            optimizer.param_groups, self._inside = groups, False
        for key, value in alone.items():
            if key != "params" and value is not group.get(key):
                raise ValueError(
                    f"{type(optimizer).__name__} changes {key!r} of its parameter group in every step: it "
                    "works on all parameters together, and cannot step one at a time"
                )

    def _check(self, *_: object) -> None:
        for parameter, seen in {} if self._inside else self._seen.items():
            if seen == self.accumulate and parameter.grad is not None:
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} has a gradient again, after its step in "
                    "the backward pass. Is it DistributedDataParallel (take fully_shard), or a penalty added "
                    "to the gradients afterwards (add it to the loss)?"
                )

    def _forget(self, *_: object) -> None:
        if not self._inside:
            self._seen.clear()


class _Hook:
    def __init__(self, owner: StepInBackward) -> None:
        self._owner = weakref.ref(owner)

    def __call__(self, parameter: Tensor) -> None:
        owner, optimizer = self.alive()
        if owner is not None and optimizer is not None:
            owner._arrived(optimizer, parameter)

    def alive(self) -> tuple[StepInBackward | None, Optimizer | None]:
        owner = self._owner()
        return owner, None if owner is None else owner._optimizer()


def is_stepped(parameter: Tensor) -> bool:
    """Does a StepInBackward step this parameter, so that it has no gradient after the backward pass?"""
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    return any(isinstance(hook, _Hook) and hook.alive()[1] is not None for hook in hooks.values())


def check_alone(parameter: Tensor) -> None:
    """Raise ValueError where several processes train, and `parameter` is not sharded over them (FSDP2)."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        raise ValueError(
            f"{dist.get_world_size()} processes are training, and StepInBackward uses a gradient before "
            "DistributedDataParallel has averaged it over them: each would train a model of its own. Shard "
            "the model with fully_shard (FSDP2), or step in the ordinary way"
        )
