"""Pre-training from scratch, as the command line runs it: a model that is small from its first step.

    configuration -> untrained model -> recipe -> Trainer of transformers -> ordinary model folder, report

Everything cheap is checked before anything long begins. A run that was stopped, by whatever, goes on from its
last checkpoint to the same losses: its tokens are on disk, and what a step sees depends on the seed alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rankfold.checkpoint import check_folder
from rankfold.journey import write
from rankfold.judge import Bars
from rankfold.pretrain.data import Plan, parse_sources
from rankfold.pretrain.model import (
    check_length,
    check_settings,
    check_size,
    fit_tokenizer,
    open_tokenizer,
    override,
    read_config,
)
from rankfold.pretrain.recipe import training
from rankfold.pretrain.report import report_of
from rankfold.pretrain.run import Run, step_of
from rankfold.pretrain.settings import Settings
from rankfold.pretrain.stages import check_layers, processes, start, tokenize
from rankfold.pretrain.tokens import validation_windows
from rankfold.pretrain.trainer import curves, train_to_the_end
from rankfold.report import Report


def pretrain(
    model: str,
    out: str,
    *,
    recipe: str,
    data: Sequence[str],
    progress: Bars,
    say: Callable[[str], None],
    options: Mapping[str, Any] | None = None,
    validation: Sequence[str] = (),
    held_out: float = 0.05,
    validation_tokens: int = 131_072,
    tokenizer: str | None = None,
    train_bpe: int | None = None,
    sets: Sequence[str] = (),
    targets: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    steps: int | None = None,
    tokens: int | None = None,
    length: int = 256,
    batch_size: int = 16,
    accumulate: int = 1,
    lr: float = 1e-3,
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    clip: float | None = None,
    dtype: str = "float32",
    optimizer: str = "adamw",
    per_layer: bool = False,
    gradient_checkpointing: bool = False,
    eval_every: int | None = None,
    save_every: int | None = None,
    seed: int = 0,
    device: str | None = None,
    restart: bool = False,
    resume: bool = False,
    keep_run: bool = False,
    check: bool = True,
    overwrite: bool = False,
) -> tuple[Report | None, Path]:
    """Train, write OUT, and return its report (None on every process but the first) and its path.

    options  of the recipe, those that are not None (see `rankfold.pretrain.recipe.training`)
    clip     None: 1, or 0 where `per_layer` leaves nothing to clip

    The other arguments are those of `rankfold pretrain`; see `Settings` and `Plan`. Raises ValueError for bad
    arguments, early; for OUT.run that holds another run; and where the loss is not a number. `Stopped` where
    a signal ended the run, with a checkpoint.
    """
    chosen = training(recipe, options or {}, targets=targets, skip=skip, seed=seed)
    if (steps is None) == (tokens is None):
        raise ValueError("how long to train: one of --steps and --tokens")
    if not 0 < held_out < 1:
        raise ValueError(f"--held-out {held_out}: the share of documents for validation, above 0 and below 1")
    if validation_tokens < length:
        raise ValueError(f"--validation-tokens {validation_tokens}: at least one window of --length {length}")
    sources, held = parse_sources(data, validation)
    folder = check_folder(out, overwrite)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    state = processes(place)
    if steps is None:
        assert tokens is not None
        steps = math.ceil(tokens / max(batch_size * accumulate * state.num_processes * length, 1))
    settings = Settings(
        steps=steps,
        batch_size=batch_size,
        accumulate=accumulate,
        length=length,
        lr=lr,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=(0.0 if per_layer else 1.0) if clip is None else clip,
        dtype=dtype,
        optimizer=optimizer,
        per_layer=per_layer,
        gradient_checkpointing=gradient_checkpointing,
        eval_every=max(1, steps // 10) if eval_every is None else eval_every,
        save_every=max(1, steps // 10) if save_every is None else save_every,
        seed=seed,
        device=place,
        processes=state.num_processes,
    )
    if per_layer and (chosen.options or {}).get("penalty", (chosen.options or {}).get("nuclear", 0)):
        raise ValueError(
            f"--per-layer leaves no gradients for the penalty of recipe {chosen.name!r} to be added to: "
            "--penalty 0, or step in the ordinary way"
        )
    check_settings(sets, train_bpe is not None)
    config = override(read_config(model), sets)
    check_length(config, length)
    given = None
    if train_bpe is None:
        given = open_tokenizer(tokenizer or model)
        fit_tokenizer(config, given, False)
    elif tokenizer is not None:
        raise ValueError("--tokenizer and --train-tokenizer: give one of them")
    else:
        check_size(train_bpe)
        config.vocab_size = train_bpe
    check_layers(chosen, config)
    plan = Plan(sources, length, settings.windows * length, held_out, held, validation_tokens)
    stated = {key: value for key, value in config.to_dict().items() if key != "transformers_version"}
    identity = {
        "recipe": chosen.to_json(),
        "data": plan.to_json(),
        "tokenizer": f"trained, {train_bpe}" if train_bpe is not None else tokenizer or model,
        "model": stated,
        "training": settings.to_json(),
    }
    run, first = Run(folder, identity), state.is_main_process

    with progress() as tell:
        with state.main_process_first():
            run.open(restart=restart and first, resume=resume and first)
            made, facts = tokenize(run, plan, given, train_bpe, tell)
        config = fit_tokenizer(config, made, train_bpe is not None)
        started = start(run, chosen, settings, config, facts, plan, tell, say)
        with state.main_process_first():
            found = run.checkpoint()
        done = step_of(found) if found else 0
        if found:
            say(f"going on from {found}")
        if first:
            run.note(done)
        began = time.perf_counter()
        train_to_the_end(started.watch, found, run.folder)
        seconds = time.perf_counter() - began
        net = started.finish_()
        train, held_losses = curves(started.trainer.state.log_history)
        facts = facts | {"tokenizer": len(made), "trained_tokenizer": train_bpe is not None}
        report = report_of(
            net,
            started.report,
            chosen.to_json(),
            settings,
            config,
            facts=facts,
            train=train,
            held=held_losses,
            memory=started.watch.memory,
            sessions=run.sessions,
            session_steps=settings.steps - done,
            seconds=seconds,
            name=model,
            warnings=started.warnings,
            found=started.found,
        )
        if first:
            ids = validation_windows(run.data, facts, length)[:1].to(next(net.parameters()).device)
            write(net, folder, report, made, {"input_ids": ids}, check=check, overwrite=overwrite, tell=tell)
        state.wait_for_everyone()
        if first and not keep_run:
            run.remove()
    return (report if first else None), folder
