"""The Trainers of adaptation: those of `classify` and of pre-training, with checkpoints of what trains alone.

A checkpoint holds the trained tensors, the running statistics that move beside them, and the state of the
optimizer: the frozen weights are those of the base, which is opened again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankfold.adapter_manifest import statistics
from rankfold.adapters import trainable
from rankfold.atomic import writing_file
from rankfold.classify.trainer import ClassifyTrainer
from rankfold.classify.trainer import Watch as EpochWatch
from rankfold.pretrain.trainer import PretrainTrainer
from rankfold.pretrain.trainer import Watch as StepWatch
from rankfold.refine_trainer import held_out_losses

TENSORS, BEST = "trained.safetensors", "best.safetensors"


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """{name: tensor} of what training changes: trained parameters, and the statistics of batch norms."""
    buffers = dict(model.named_buffers())
    return {**trainable(model), **{name: buffers[name] for name in statistics(model)}}


def write_state(model: nn.Module, path: Path, step: int) -> None:
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state_of(model).items()}
    with writing_file(path) as beside:
        save_file(tensors, beside, metadata={"step": str(step)})


@torch.no_grad()
def read_state_(model: nn.Module, path: Path) -> int:
    """Load what `write_state` wrote, and return its step. Raises ValueError for other tensors."""
    found, wanted = load_file(path), state_of(model)
    if set(found) != set(wanted):
        odd = sorted(set(found) ^ set(wanted))[:4]
        raise ValueError(f"{path} does not hold what trains here ({odd}); begin anew with --restart")
    for name, tensor in wanted.items():
        tensor.copy_(found[name])
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["step"])


class _Small:
    """For a Trainer: checkpoints without the frozen weights; products in bfloat16 while training, if so
    asked, over weights in their own dtype."""

    autocast = False
    model: Any
    args: Any
    state: Any

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        write_state(self.model, Path(output_dir or self.args.output_dir) / TENSORS, self.state.global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        read_state_(self.model, Path(resume_from_checkpoint) / TENSORS)

    def compute_loss(self, model: Any, inputs: Any, *options: Any, **more: Any) -> Any:
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.autocast):
            return super().compute_loss(model, inputs, *options, **more)  # type: ignore[misc]


class ClassifierTrainer(_Small, ClassifyTrainer):
    """`ClassifyTrainer` with small checkpoints."""

    def __init__(self, *options: Any, autocast: bool) -> None:
        super().__init__(*options)
        self.autocast = autocast


class ClassifierWatch(EpochWatch):
    """The watch of `classify`, which counts the memory of a step as pre-training does."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        StepWatch.on_optimizer_step(self, args, state, control, **more)


class LanguageTrainer(_Small, PretrainTrainer):
    """`PretrainTrainer` with small checkpoints, validated by `score(model)`, a loss in nats per token; the
    state with the lowest goes to `best`."""

    def __init__(
        self, *options: Any, score: Callable[[nn.Module], float], best: Path, autocast: bool, **more: Any
    ) -> None:
        # The Trainer asks for data to evaluate on; `held_out` reads `score`.
        super().__init__(*options, windows=torch.zeros(1, 1, dtype=torch.int64), **more)
        self.score, self.best, self.autocast = score, best, autocast

    def held_out(self) -> float:
        loss = self.score(self.model)  # type: ignore[arg-type]
        if loss < min((seen for _, seen in held_out_losses(self.state.log_history)), default=float("inf")):
            write_state(self.model, self.best, self.state.global_step)  # type: ignore[arg-type]
        return loss

    def take_best_(self) -> int:
        """Load the best state of the run, and return its step."""
        step = int(min((loss, step) for step, loss in held_out_losses(self.state.log_history))[1])
        found = read_state_(self.model, self.best)  # type: ignore[arg-type]
        if found != step:
            raise ValueError(
                f"{self.best} holds step {found}, the best of the run is step {step}: begin anew with "
                "--restart"
            )
        return step
