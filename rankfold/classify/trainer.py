"""The Trainer of transformers, told what the training of a classifier needs: whole epochs, the best one kept.

After every epoch it scores the validation texts, keeps the weights if they are the best so far, and writes a
checkpoint. Which epoch is the best, and when patience is out, follow from the log alone, which is in the
checkpoints: a run that goes on decides as one that was never stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer

from rankfold.atomic import writing_file
from rankfold.classify.encode import Batches, Inputs, logits_of
from rankfold.classify.settings import Training
from rankfold.pretrain import trainer as pretraining
from rankfold.pretrain.run import Run, step_of
from rankfold.pretrain.settings import Settings
from rankfold.report_format import percent

BEST = "best.safetensors"
LOSS, ACCURACY, COUNT = "eval_loss", "eval_accuracy", "eval_examples"


class ClassifyTrainer(Trainer):
    """The Trainer with a step for every item of `Batches`, and validation on texts that are encoded already.

    watch       the callback that stops and tells
    validation  (texts or images, labels), or None: then the last epoch is kept
    """

    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        settings: Training,
        train: Batches,
        validation: tuple[Inputs, Tensor] | None,
        watch: Watch,
    ) -> None:
        stated = Settings(
            steps=len(train),
            batch_size=1,  # an item of the data set is a batch
            accumulate=1,
            length=settings.length or 0,  # a record of it; nothing here reads it
            lr=settings.lr,
            warmup=settings.warmup,
            weight_decay=settings.weight_decay,
            clip=settings.clip,
            dtype="float32",
            optimizer="adamw",
            per_layer=False,
            gradient_checkpointing=False,
            eval_every=train.per_epoch,
            save_every=train.per_epoch,
            seed=settings.seed,
            device=settings.device,
        )
        arguments = pretraining.arguments(folder, stated)
        arguments.dataloader_num_workers = settings.workers
        arguments._n_gpu = min(arguments.n_gpu, 1)  # more would each take a whole batch for a row of one
        super().__init__(
            model,
            arguments,
            train_dataset=train,
            eval_dataset=train,  # asked for by eval_strategy; `evaluate` reads `validation`
            data_collator=lambda items: items[0],
            callbacks=[watch],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # a step is one batch: its mean is the loss
        self.folder, self.settings, self.validation = folder, settings, validation
        self.losses: list[Tensor] = []
        watch.trainer = self

    def training_step(self, *options: Any, **more: Any) -> Tensor:
        loss = super().training_step(*options, **more)
        self.losses.append(loss)
        return loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:  # type: ignore[override]
        """Loss and accuracy on the validation texts; the weights are kept if they are the best so far."""
        metrics: dict[str, float] = {}
        assert self.model is not None
        if self.validation is not None:
            data, labels = self.validation
            logits = logits_of(self.model, data, 2 * self._rows())
            metrics[LOSS] = float(F.cross_entropy(logits.double(), labels))
            metrics[ACCURACY] = float((logits.argmax(-1) == labels).double().mean())
            metrics[COUNT] = len(labels)
        self.log(metrics)
        seen = evaluations(self.state.log_history)
        if self.validation is None or (seen and best(seen, self.settings.best) == len(seen) - 1):
            keep(self.model, self.folder)
        if self.validation is not None and exhausted(seen, self.settings):
            self.control.should_training_stop = True
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _rows(self) -> int:
        train: Any = self.train_dataset
        return train.batch_size


class Watch(pretraining.Watch):
    """Progress, the end on request, a stop where the loss is not a number; all of them pre-training's."""

    def __init__(self, tell: Any, say: Any, per_epoch: int) -> None:
        super().__init__(tell, say, per_layer=False)
        self.per_epoch = per_epoch

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """No accounting of memory here."""

    def _diverged(self, step: int, what: str) -> None:
        raise ValueError(
            f"the training diverged: {what} at step {step} (epoch {(step - 1) // self.per_epoch + 1}). Lower "
            "--lr, and begin anew with --restart"
        )

    def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        epoch = round(state.global_step / self.per_epoch)
        steps = [item[pretraining.LOSS] for item in state.log_history if pretraining.LOSS in item]
        mean = sum(steps[-self.per_epoch :]) / max(len(steps[-self.per_epoch :]), 1)
        found = more["metrics"]
        words = f"epoch {epoch}: training loss {mean:.4f}"
        if ACCURACY in found:
            words += f", validation loss {found[LOSS]:.4f}, accuracy {percent(found[ACCURACY])}"
        self.say(words)


def evaluations(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [item for item in history if ACCURACY in item]


def best(seen: list[dict[str, float]], by: str) -> int:
    """Which of the evaluations is the best. By loss: the lowest. By accuracy: the last one within a standard
    error √(a(1 - a)/n) of the highest; it stays the best until one that is as good comes, as `keep` needs."""
    if by == "loss":
        return min(range(len(seen)), key=lambda at: seen[at][LOSS])
    top = max(item[ACCURACY] for item in seen)
    error = math.sqrt(top * (1 - top) / seen[-1][COUNT])
    return max(at for at, item in enumerate(seen) if item[ACCURACY] >= top - error)


def exhausted(seen: list[dict[str, float]], settings: Training) -> bool:
    """Whether patience is out: `patience` epochs in a row brought nothing better."""
    return bool(settings.patience and seen) and len(seen) - 1 - best(seen, settings.best) >= settings.patience


def history_of(checkpoint: Path) -> list[dict[str, Any]]:
    """The log that a checkpoint holds."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return state["log_history"]


def train_to_the_best(
    trainer: ClassifyTrainer, watch: pretraining.Watch, run: Run, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], int, float]:
    """Train to the end of all epochs or of patience, from the run's checkpoint on if it has one, and load the
    best weights. Returns the log, the steps done in all, and the seconds of this session. Raises `Stopped`
    where a signal ended it before that."""
    total, settings = trainer.args.max_steps, trainer.settings
    found = run.checkpoint()
    done, history = (step_of(found), history_of(found)) if found else (0, [])
    if found:
        say(f"going on from {found}")
    began = time.perf_counter()
    if done < total and not exhausted(evaluations(history), settings):
        run.note(done)
        with pretraining.stopping(watch):
            trainer.train(resume_from_checkpoint=str(found) if found else None)
        history, done = trainer.state.log_history, trainer.state.global_step
        if watch.stop and done < total and not exhausted(evaluations(history), settings):
            raise pretraining.Stopped(
                f"stopped after step {done} of {total}, with a checkpoint in {run.folder}; the same command "
                "goes on"
            )
    seconds = time.perf_counter() - began
    restore_(cast(nn.Module, trainer.model), run.folder)
    return history, done, seconds


def keep(model: nn.Module, folder: Path) -> None:
    """Write the weights beside the checkpoints, whole or not at all."""
    with writing_file(folder / BEST) as beside:
        save_model(model, str(beside))


def restore_(model: nn.Module, folder: Path) -> None:
    """Load the weights that `keep` wrote."""
    load_model(model, str(folder / BEST), device=str(next(model.parameters()).device))


def epochs_of(history: list[dict[str, Any]], per_epoch: int) -> list[dict[str, float]]:
    """Mean training loss, validation loss and accuracy of every epoch, from a Trainer's log."""
    steps = {item["step"]: item[pretraining.LOSS] for item in history if pretraining.LOSS in item}
    found = {round(item["step"] / per_epoch): item for item in history if ACCURACY in item}
    rows = []
    for epoch in range(1, max(steps, default=0) // per_epoch + 1):
        losses = [steps[s] for s in range((epoch - 1) * per_epoch + 1, epoch * per_epoch + 1) if s in steps]
        row = {"epoch": epoch, "training_loss": float(torch.tensor(losses).mean()) if losses else None}
        if epoch in found:
            row |= {"validation_loss": found[epoch][LOSS], "validation_accuracy": found[epoch][ACCURACY]}
        rows.append(row)
    return rows
