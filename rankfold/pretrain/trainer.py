"""The Trainer of transformers, told what a pre-training run needs and no more.

It writes down the loss of every step, stops at the first one that is not a number, validates by the mean
over tokens, seals its checkpoints, and ends at a step's end when asked to. Everything else (devices, mixed
precision, accumulation, several processes, resuming) is its own.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from rankfold.metrics import Progress
from rankfold.pretrain.memory import accounting
from rankfold.pretrain.run import seal

LOSS = "step_loss"  # in the Trainer's log: of one step, its micro-batches and processes together
OPTIMIZERS = {"adamw": "adamw_torch", "adamw_8bit": "adamw_torch_8bit"}


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and did, with a checkpoint: its message says how to go on."""


class PretrainTrainer(Trainer):
    """The Trainer with the losses of micro-batches kept, and validation as the mean over tokens."""

    def __init__(self, *options: Any, windows: Tensor, **more: Any) -> None:
        rows: Any = [{"input_ids": row} for row in windows]
        super().__init__(*options, eval_dataset=rows, **more)
        self.remove_callback(PrinterCallback)
        self.windows = windows
        self.losses: list[Tensor] = []  # of the micro-batches since the last step

    def training_step(self, *options: Any, **more: Any) -> Tensor:
        loss = super().training_step(*options, **more)
        self.losses.append(loss)
        return loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:  # type: ignore[override]
        """What `held_out` finds, into the log."""
        loss = self.held_out()
        metrics = {"eval_loss": loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def held_out(self) -> float:
        """Validation loss in nats per token, over all targets of all windows; the processes share them."""
        return validate(self.model, self.windows, self.args.per_device_eval_batch_size, self.accelerator)


@torch.no_grad()
def validate(model: Any, windows: Tensor, batch_size: int, accelerator: Any = None) -> float:
    """Mean -log p(next token) over the L - 1 targets of every window (N, L): summed over tokens in float64,
    divided once."""
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    place = next(model.parameters()).device
    total = torch.zeros(2, dtype=torch.float64)
    was = model.training
    model.eval()
    for batch in windows[rank::world].split(batch_size):
        ids = batch.to(place)
        logits = model(input_ids=ids).logits[:, :-1].float()
        for row, targets in zip(logits, ids[:, 1:], strict=True):
            nll = F.cross_entropy(row, targets, reduction="none")
            total += torch.tensor([float(nll.double().sum()), len(nll)], dtype=torch.float64)
    model.train(was)
    if world > 1:
        total = accelerator.reduce(total.to(place), "sum").cpu()
    return float(total[0] / total[1])


class Watch(TrainerCallback):
    """Losses into the Trainer's own log, so that they are in its checkpoints; checks; progress; the end on
    request.

    say  is told, in words, what each validation found
    """

    def __init__(self, tell: Progress, say: Callable[[str], None], per_layer: bool) -> None:
        self.tell, self.say, self.per_layer = tell, say, per_layer
        self.trainer: Any = None
        self.stop = False  # asked by a signal
        self.memory: dict[str, int] = {}
        self.last_good: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tell("train", state.global_step, state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if not self.memory:  # the state is there now
            self.memory = accounting(more["model"], more["optimizer"], self.per_layer)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        trainer = self.trainer
        loss = torch.stack([loss.float() for loss in trainer.losses]).sum()
        trainer.losses.clear()
        facts = torch.stack([loss, loss.new_tensor(float(self.stop))])
        if args.world_size > 1:
            facts = trainer.accelerator.reduce(facts, "mean")
        value, stop = facts.tolist()
        if not math.isfinite(value):
            self._diverged(state.global_step, f"the loss is {value}")
        state.log_history.append({"step": state.global_step, LOSS: value})
        if stop:
            control.should_training_stop = control.should_save = True
        if control.should_save:
            bad = next((n for n, p in more["model"].named_parameters() if not p.isfinite().all()), None)
            if bad is not None:
                self._diverged(state.global_step, f"parameter {bad!r} is not finite")
        self.tell("train", state.global_step, state.max_steps)

    def _diverged(self, step: int, what: str) -> None:
        kept = (
            f"The last good checkpoint is {self.last_good}" if self.last_good else "No checkpoint was written"
        )
        raise ValueError(
            f"the training diverged: {what} at step {step}. {kept}. Lower --lr, or clip the "
            "gradients (--clip 1.0), and begin anew with --restart"
        )

    def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        loss = more["metrics"]["eval_loss"]
        last = next(item[LOSS] for item in reversed(state.log_history) if LOSS in item)
        shown = f"{math.exp(loss):.4g}" if loss < 700 else "inf"
        self.say(
            f"step {state.global_step}: training loss {last:.4f}, validation loss {loss:.4f}, "
            f"perplexity {shown}"
        )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()  # each process writes its own random state
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save:
            seal(path)
        self.last_good = str(path)


@contextmanager
def stopping(watch: Watch) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run after the step in progress, with a checkpoint; a second one at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, _: Any) -> None:
        if watch.stop:
            raise KeyboardInterrupt("interrupted before the checkpoint was written; the one before it stands")
        watch.stop = True
        watch.say("stopping after this step, with a checkpoint (again: at once)")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def arguments(folder: Path, settings: Any) -> TrainingArguments:
    """What the Trainer is told. `settings`: see `rankfold.pretrain.Settings`."""
    known = {field.name for field in fields(TrainingArguments)}
    activation = "activation" if "activation_checkpointing" in known else "gradient"  # its older name
    recompute: dict[str, Any] = {
        f"{activation}_checkpointing": settings.gradient_checkpointing,
        f"{activation}_checkpointing_kwargs": {"use_reentrant": False},
    }
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        optim=OPTIMIZERS[settings.optimizer],
        bf16=settings.dtype == "bfloat16",
        **(recompute if settings.gradient_checkpointing else {}),
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        save_strategy="steps",
        save_steps=settings.save_every,
        save_total_limit=2,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        train_sampling_strategy="sequential",  # the data set is in the order of the run
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=settings.device == "cpu",
        seed=settings.seed,
        data_seed=settings.seed,
    )


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def curves(history: list[dict[str, Any]]) -> tuple[list[list[float]], list[list[float]]]:
    """([step, loss] of training, [step, loss] of validation) from a Trainer's log."""
    train = [[item["step"], item[LOSS]] for item in history if LOSS in item]
    held = [[item["step"], item["eval_loss"]] for item in history if "eval_loss" in item]
    return train, held


def train_to_the_end(watch: Watch, found: Path | None, folder: Path) -> None:
    """Let the trainer of `watch` train, from checkpoint `found` on if there is one. Raises `Stopped` where a
    signal ended it before its last step, with a checkpoint in `folder`."""
    trainer = watch.trainer
    if found is not None:
        watch.last_good = str(found)
    with stopping(watch):
        trainer.train(resume_from_checkpoint=str(found) if found else None)
    reached, steps = trainer.state.global_step, trainer.args.max_steps
    if reached < steps:
        raise Stopped(
            f"stopped after step {reached} of {steps}, with a checkpoint in {folder}; the same command goes "
            "on"
        )
