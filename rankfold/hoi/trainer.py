"""The Trainer of transformers, told what the training of HOLa needs: its loss, its optimizer, its schedule.

AdamW decays every weight, the rate falls to a tenth once, gradients are clipped by the norm of all of them.
What each term of the loss was stands in the log beside the loss, so in the checkpoints too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer
from transformers.trainer_utils import IntervalStrategy

from rankfold.hoi.loader import Batch, Batches
from rankfold.hoi.regime import HolaRegime
from rankfold.hoi.settings import Training
from rankfold.pretrain import trainer as pretraining
from rankfold.pretrain.settings import Settings

FALL = 0.1  # of the rate, after `drop` epochs
PARTS = "parts"  # in the Trainer's log: {term of the loss: as it enters the sum}


class HoiTrainer(Trainer):
    """The Trainer with the loss of `regime`, and a step for every `accumulate` items of `Batches`."""

    def __init__(
        self, model: Any, folder: Path, settings: Training, train: Batches, regime: HolaRegime, watch: Watch
    ) -> None:
        self.settings, self.regime, self.batches = settings, regime, train
        stated = Settings(
            steps=steps_of(train, settings),
            batch_size=1,  # an item of the data set is a batch
            accumulate=settings.accumulate,
            length=1,
            lr=settings.lr,
            warmup=0.0,
            weight_decay=settings.weight_decay,
            clip=settings.clip,
            dtype="float32",
            optimizer="adamw",
            per_layer=False,
            gradient_checkpointing=False,
            eval_every=1,
            save_every=max(1, train.per_epoch // settings.accumulate),
            seed=settings.seed,
            device=settings.device,
        )
        arguments = pretraining.arguments(folder, stated)
        arguments.eval_strategy = IntervalStrategy.NO  # the protocol scores the last epoch, once
        arguments._n_gpu = min(arguments.n_gpu, 1)  # more would each take a whole batch for a row of one
        arguments.dataloader_num_workers = settings.workers
        super().__init__(
            model,
            arguments,
            train_dataset=train,
            data_collator=lambda items: items[0],
            callbacks=[watch],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # micro-batches are averaged
        self.losses: list[Tensor] = []
        self.parts: list[dict[str, Tensor]] = []
        watch.trainer = self

    def create_optimizer(self, *_: Any, **__: Any) -> torch.optim.Optimizer:
        """One group: decay and rate are the same for all that is trained."""
        if self.optimizer is None:
            assert self.model is not None
            trained = [p for p in self.model.parameters() if p.requires_grad]
            chosen = self.settings
            self.optimizer = torch.optim.AdamW(trained, lr=chosen.lr, weight_decay=chosen.weight_decay)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """`lr`, and a tenth of it once `drop` epochs of images have been seen."""
        if self.lr_scheduler is None:
            chosen, per_epoch = self.settings, self.batches.per_epoch

            def factor(step: int) -> float:
                epoch = step * chosen.accumulate // per_epoch
                return FALL if chosen.drop and epoch >= chosen.drop else 1.0

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def compute_loss(self, model: Any, inputs: Batch, *_: Any, **__: Any) -> Any:
        loss, parts = self.regime.loss(model, inputs)
        self.parts.append(parts)
        return loss

    def training_step(self, *options: Any, **more: Any) -> Tensor:
        loss = super().training_step(*options, **more)
        self.losses.append(loss)
        return loss


class Watch(pretraining.Watch):
    """Progress, the end on request, a stop where the loss is not a number: all of them pre-training's. The
    verbs of the regime, and the terms of the loss into the log."""

    def __init__(self, tell: Any, say: Any) -> None:
        super().__init__(tell, say, per_layer=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        super().on_train_begin(args, state, control, **more)
        self.trainer.regime.schedule(state.max_steps, state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.trainer.regime.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """No accounting of memory here."""

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        trainer = self.trainer
        trainer.regime.after_step()
        parts, names = trainer.parts, list(trainer.parts[0])
        values = torch.stack([torch.stack([part[name].float() for name in names]) for part in parts]).mean(0)
        trainer.parts = []
        super().on_step_end(args, state, control, **more)
        state.log_history[-1][PARTS] = dict(zip(names, values.tolist(), strict=True))
        chosen, batches = trainer.settings, trainer.batches
        seen = min(state.global_step * chosen.accumulate, len(batches))
        before = (state.global_step - 1) * chosen.accumulate
        if seen // batches.per_epoch > before // batches.per_epoch:
            self.say(told(seen // batches.per_epoch, state.log_history, batches.per_epoch, chosen.accumulate))

    def _diverged(self, step: int, what: str) -> None:
        epoch = (step - 1) * self.trainer.settings.accumulate // self.trainer.batches.per_epoch + 1
        raise ValueError(
            f"the training diverged: {what} at step {step} (epoch {epoch}). Lower --lr, and begin anew with "
            "--restart"
        )


def steps_of(train: Batches, settings: Training) -> int:
    """Steps of the optimizer in the whole run."""
    return -(-len(train) // settings.accumulate)


def told(epoch: int, history: list[dict[str, Any]], per_epoch: int, accumulate: int) -> str:
    """What an epoch's losses were, in words."""
    rows = [item for item in history if PARTS in item][-max(1, per_epoch // accumulate) :]
    mean = sum(item[pretraining.LOSS] for item in rows) / len(rows)
    task = sum(item[PARTS]["interaction"] for item in rows) / len(rows)
    return f"epoch {epoch}: loss {mean:.4f}, of it interaction {task:.4f}"


def epochs_of(history: list[dict[str, Any]], per_epoch: int, accumulate: int) -> list[dict[str, Any]]:
    """Mean loss and terms of every epoch, from a Trainer's log: a step counts to the epoch it began in."""
    found: dict[int, list[dict[str, Any]]] = {}
    for item in history:
        if PARTS in item:
            found.setdefault((item["step"] - 1) * accumulate // per_epoch + 1, []).append(item)
    rows = []
    for epoch, items in sorted(found.items()):
        parts = {name: sum(item[PARTS][name] for item in items) / len(items) for name in items[0][PARTS]}
        loss = sum(item[pretraining.LOSS] for item in items) / len(items)
        rows.append({"epoch": epoch, "loss": loss, PARTS: parts})
    return rows
