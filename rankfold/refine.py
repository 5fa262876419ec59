"""Healing: train the factors of a compressed model until it says again what the original says.

    min over values, dictionaries, factors, norms, biases of  KL(original ‖ healed)

A compression fits each layer for itself; healing lets the layers make up for each other's errors, by
distillation [Hinton et al. 2015]. Nothing that costs bytes moves: places, ranks and sizes stay, and values go
back to the bits that they were stored in. The best state on windows that were not trained on is kept. If none
is better than the start, the model stays as it was, bit for bit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from rankfold.evaluate import kl_to
from rankfold.metrics import Progress
from rankfold.pretrain.settings import Settings
from rankfold.pretrain.trainer import arguments, collate, curves, train_to_the_end
from rankfold.refine_state import Trainable, nbytes
from rankfold.refine_trainer import BEST, HealTrainer, HealWatch, check_pair

LR = 2e-4


@dataclass(frozen=True)
class Healed:
    """What a healing found. KL(original ‖ model) is in nats a token, on the held-out windows.

    before, after  of the model as it was given and as it is stored now; equal where it was left as it was
    step           of the optimizer, whose state was kept; 0: the model was left as it was
    attempt        KL of the best state, as stored, also where it was not kept; NaN where none was better than
                   the start while it trained
    train, held    [step, loss] of training and [step, KL] of validation, that of step 0 among them
    memory         bytes of a training step, see `rankfold.pretrain.memory.accounting`; without the original
    trained        numbers that trained
    """

    before: float
    after: float
    step: int
    attempt: float
    train: list[list[float]]
    held: list[list[float]]
    memory: dict[str, int]
    trained: int


def heal_(
    model: nn.Module,
    original: nn.Module,
    windows: Tensor,
    held_out: Tensor,
    *,
    steps: int | None = None,
    batch_size: int = 2,
    accumulate: int = 1,
    lr: float = LR,
    warmup: float = 0.1,
    clip: float = 1.0,
    dtype: str = "float32",
    lm: float = 0.0,
    embeddings: bool = False,
    eval_every: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Healed:
    """Train the factors of `model`, in place, to say what `original` says. Both are causal language models of
    transformers on one device, with the same tokens; the original is put into eval mode.

    windows, held_out  token ids (N, L) and (M, L) int64: training, in this order, and the choice of the best
                       state. Take them from different documents
    steps       of batch_size x accumulate windows; default: as many as `windows` has, once. More begin again
    lr          the highest rate of AdamW, after `warmup` (a share of the steps); by a cosine to a tenth of it
    dtype       "float32", or "bfloat16": weights stay float32, products run under autocast
    lm          share of the language model's own loss in the loss, in [0, 1)
    embeddings  train dense embeddings and the head too
    eval_every  steps between two validations; default: a tenth of all

    Raises ValueError for models that do not go together, for options out of range, and where the training
    diverges: the model is then as it was.
    """
    shapes = tuple(windows.shape), tuple(held_out.shape)
    if len(shapes[0]) != 2 or shapes[0][1:] != shapes[1][1:] or not len(held_out):
        raise ValueError(f"windows {shapes[0]} and held_out {shapes[1]}: token ids (N, L) and (M, L)")
    one = batch_size * accumulate
    count = len(windows) // max(one, 1) if steps is None else steps
    if count < 1:
        raise ValueError(f"{len(windows)} windows are less than one step of {one}: a smaller batch, or more")
    place = next(model.parameters()).device.type
    settings = settings_for(
        steps=count,
        batch_size=batch_size,
        accumulate=accumulate,
        length=windows.shape[1],
        lr=lr,
        warmup=warmup,
        clip=clip,
        dtype=dtype,
        eval_every=eval_every,
        save_every=count + 1,  # a run in memory: nothing to resume from
        seed=seed,
        device=place,
    )
    with tempfile.TemporaryDirectory() as folder:
        return run_(
            model,
            original,
            Repeated(windows, settings.windows),
            held_out,
            settings,
            lm=lm,
            embeddings=embeddings,
            folder=Path(folder),
            tell=progress or (lambda *_: None),
            say=say or (lambda _: None),
        )


def settings_for(*, steps: int, eval_every: int | None, save_every: int | None, **options: Any) -> Settings:
    """`Settings` of a healing; by default, validation and checkpoints at every tenth. Raises ValueError."""
    tenth = max(1, steps // 10)
    return Settings(
        steps=steps,
        eval_every=tenth if eval_every is None else eval_every,
        save_every=tenth if save_every is None else save_every,
        weight_decay=0.0,  # it would pull the factors away from what they stand for
        optimizer="adamw",
        per_layer=False,
        gradient_checkpointing=False,
        **options,
    )


class Repeated(Dataset[dict[str, Tensor]]):
    """`count` windows in their order, from the first again after the last."""

    def __init__(self, windows: Tensor, count: int) -> None:
        self.windows, self.count = windows, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index % len(self.windows)]}


def run_(
    model: Any,
    original: nn.Module,
    dataset: Dataset[dict[str, Tensor]],
    held_out: Tensor,
    settings: Settings,
    *,
    lm: float,
    embeddings: bool,
    folder: Path,
    tell: Progress,
    say: Callable[[str], None],
    checkpoint: Path | None = None,
) -> Healed:
    """`heal_` on a data set of {"input_ids": (L,)}, with its checkpoints in `folder`; goes on from
    `checkpoint`. Raises `Stopped` where a signal ended the run. After any exception the model is as it
    was."""
    check_pair(model, original, settings.length, lm)
    size = nbytes(model)
    original.eval()
    tell("validate", 0, 1)
    before = kl_to(original, model, held_out, batch_size=settings.batch_size)
    tell("validate", 1, 1)
    opened = Trainable.open_(model, embeddings=embeddings)
    watch = HealWatch(tell, say, before)
    with _as_it_was(model), ExitStack() as undo:
        undo.callback(opened.restore_)
        watch.trainer = trainer = HealTrainer(
            model,
            # Autocast is ours to switch: the Trainer's would be around validation too.
            arguments(folder, replace(settings, dtype="float32")),
            train_dataset=dataset,
            data_collator=collate,
            callbacks=[watch],
            windows=held_out,
            original=original,
            opened=opened,
            autocast=settings.dtype == "bfloat16",
            lm=lm,
            before=before,
            best=folder / BEST,
        )
        train_to_the_end(watch, checkpoint, folder)
        train, held = curves(trainer.state.log_history)
        if not held or held[-1][0] < settings.steps:
            trainer.evaluate()
            train, held = curves(trainer.state.log_history)
        step, attempt = trainer.take_best_(), float("nan")
        trained = sum(parameter.numel() for parameter in opened.parameters().values())
        if step:
            opened.close_()
            tell("validate", 0, 1)
            attempt = kl_to(original, model, held_out, batch_size=settings.batch_size)
            tell("validate", 1, 1)
        if attempt < before:
            undo.pop_all()
        else:
            step = 0
    assert nbytes(model) == size, "healing keeps the bytes"
    return Healed(
        before=before,
        after=attempt if step else before,
        step=step,
        attempt=attempt,
        train=train,
        held=[[0, before], *held],
        memory=watch.memory,
        trained=trained,
    )


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """What the Trainer sets on a model, set back: its mode, and whether it caches keys and values."""
    mode, cached = model.training, getattr(model.config, "use_cache", None)
    try:
        yield
    finally:
        model.train(mode)
        if cached is not None:
            model.config.use_cache = cached
