"""Healing end to end, as the command line runs it: a compressed folder in, a better one of its size out.

    open both -> text -> perplexity before -> `refine.run_` -> perplexity after -> write, verify, report

Everything cheap is checked before anything long begins. A run that was stopped goes on from its last
checkpoint to the same bytes. What is judged is the model as it is stored in the end.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfold import data as texts
from rankfold.atomic import check_folder, writing_file
from rankfold.evaluate import perplexity
from rankfold.heal_data import Text, judged_on, plans, read
from rankfold.journey import write
from rankfold.judge import Bars, side_by_side
from rankfold.layers import select
from rankfold.loading import Opened, open_model
from rankfold.manifest import recipe_of
from rankfold.metrics import Progress
from rankfold.pretrain.memory import peak
from rankfold.pretrain.model import build
from rankfold.pretrain.report import rows_of, thinned
from rankfold.pretrain.run import Run, step_of
from rankfold.pretrain.settings import Settings
from rankfold.provenance import versions, weights_hash
from rankfold.refine import LR, Healed, run_, settings_for
from rankfold.refine_state import check_compressed
from rankfold.refine_trainer import check_pair
from rankfold.report import FILE_NAME, Report

BEFORE = "before.json"


def heal(
    model: str,
    out: str,
    *,
    original: str,
    data: Sequence[str],
    progress: Bars,
    say: Callable[[str], None],
    tokens: int = 300_000,
    validation: Sequence[str] = (),
    held_out: float = 0.1,
    validation_tokens: int = 8192,
    tests: Sequence[str] = (),
    length: int = 512,
    batch_size: int = 2,
    accumulate: int = 1,
    lr: float = LR,
    warmup: float = 0.1,
    clip: float = 1.0,
    dtype: str = "float32",
    lm: float = 0.0,
    embeddings: bool = False,
    eval_every: int | None = None,
    save_every: int | None = None,
    seed: int = 0,
    device: str | None = None,
    restart: bool = False,
    resume: bool = False,
    keep_run: bool = False,
    check: bool = True,
    overwrite: bool = False,
) -> tuple[Report, Path]:
    """Heal MODEL, a compressed folder, by what `original` says, write OUT, and return its report and path.

    tokens  to train on, all sources and epochs together, rounded up to whole steps
    tests   SPECs to measure the perplexity on; default: the test documents of the packaged texts in `data`

    The other arguments are those of `rankfold adapt --heal`; see `heal_`. Raises ValueError for bad
    arguments, early; for OUT.run that holds another run; and where the training diverges. `Stopped` where a
    signal ended the run, with a checkpoint.
    """
    folder = check_folder(out, overwrite)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("healing runs in one process: start it without torchrun")
    if tokens < 1:
        raise ValueError(f"--tokens {tokens}: at least 1")
    settings = settings_for(
        steps=math.ceil(tokens / max(batch_size * accumulate * length, 1)),
        batch_size=batch_size,
        accumulate=accumulate,
        length=length,
        lr=lr,
        warmup=warmup,
        clip=clip,
        dtype=dtype,
        eval_every=eval_every,
        save_every=save_every,
        seed=seed,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    wanted = plans(
        data,
        validation,
        length=length,
        windows=settings.windows,
        held_out=held_out,
        validation_tokens=validation_tokens,
    )
    judged = judged_on(data, tests)
    small = open_model(model, device=settings.device)
    check_compressed(small.model)
    large = open_model(original, device=settings.device)
    check_pair(small.model, large.model, length, lm)
    check_tokens(small, large)
    identity = {
        "model": weights_hash(small.model),
        "original": weights_hash(large.model),
        "data": [plan.to_json() for plan in wanted],
        "training": settings.to_json(),
        "lm": lm,
        "embeddings": embeddings,
    }
    run = Run(folder, identity)
    with progress() as tell:
        run.open(restart=restart, resume=resume)
        text = read(run, wanted, small.tokenizer, settings.windows, seed, tell)
        windows = {str(spec): texts.token_windows(spec, small.tokenizer, split="test") for spec in judged}
        ids = {name: found.input_ids for name, found in windows.items()}
        measured = _before(run, small, large, ids, tell)
        checkpoint = run.checkpoint()
        done = step_of(checkpoint) if checkpoint else 0
        if checkpoint:
            say(f"going on from {checkpoint}")
        run.note(done)
        began = time.perf_counter()
        healed = run_(
            small.model,
            large.model,
            text.train,
            text.held_out,
            settings,
            lm=lm,
            embeddings=embeddings,
            folder=run.folder,
            tell=tell,
            say=say,
            checkpoint=checkpoint,
        )
        seconds = time.perf_counter() - began
        for name, row in measured.items():
            row["after"] = perplexity(small.model, ids[name]) if healed.step else row["before"]
        report = _report(model, small, original)
        report.healing = facts_of(
            healed,
            settings,
            text,
            original=original,
            lm=lm,
            embeddings=embeddings,
            tests=measured,
            seconds=seconds,
            steps=settings.steps - done,
            sessions=run.sessions,
        )
        report.timings |= {"heal": seconds}
        report.versions, report.weights_hash = versions(), weights_hash(small.model)
        if not healed.step:
            report.warnings.append(
                f"healing did not lower the held-out KL ({healed.before:.4g} nats a token): the model is as "
                "it was given"
            )
        if windows and healed.step:
            name, first = next(iter(windows.items()))
            batches = [{"input_ids": part} for part in first.input_ids.split(4)]
            found = side_by_side(small, large.model, batches, first.facts(), tell, timed=False)
            report.warnings += found.pop("warnings", [])
            for row in ("dense", "compressed"):
                found[row].pop("bytes", None)
            report.evaluation = found
        example = {"input_ids": text.held_out[:1].to(next(small.model.parameters()).device)}
        write(
            small.model,
            folder,
            report,
            small.tokenizer,
            example,
            check=check,
            overwrite=overwrite,
            tell=tell,
        )
        if not keep_run:
            run.remove()
    return report, folder


def check_tokens(small: Opened, large: Opened) -> None:
    """Raise ValueError where the two read text as different tokens."""
    if small.tokenizer is None:
        raise ValueError(f"{small.name} has no tokenizer beside it, so text cannot be read for it")
    if large.tokenizer is not None and small.tokenizer.get_vocab() != large.tokenizer.get_vocab():
        raise ValueError(
            f"the tokenizers of {small.name} ({len(small.tokenizer)} tokens) and {large.name} "
            f"({len(large.tokenizer)}) differ: --heal takes the model that {small.name} was made from"
        )


def _before(
    run: Run, small: Opened, large: Opened, windows: Mapping[str, Tensor], tell: Progress
) -> dict[str, dict[str, float]]:
    """{text: {"dense", "before"}} perplexities, measured once a run."""
    file = run.folder / BEFORE
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if set(known) == set(windows):
        return known
    found = {}
    for done, (name, ids) in enumerate(windows.items()):
        tell("measure", done, len(windows))
        found[name] = {"dense": perplexity(large.model, ids), "before": perplexity(small.model, ids)}
    tell("measure", len(windows), len(windows))
    with writing_file(file) as beside:
        beside.write_text(json.dumps(found), encoding="utf-8")
    return found


def _report(folder: str, small: Opened, original: str) -> Report:
    """The report of the compression, or one that is read off the model."""
    path = Path(folder)
    if (path / FILE_NAME).is_file():
        return Report.load(path)
    net: Any = small.model
    dense = build(net.config, 0, "meta").to(next(net.parameters()).dtype)
    report = rows_of(net, dense, select(dense), dict(recipe_of(net) or {}))
    report.model = original
    return report


def facts_of(
    healed: Healed,
    settings: Settings,
    text: Text,
    *,
    original: str,
    lm: float,
    embeddings: bool,
    tests: Mapping[str, Mapping[str, float]],
    seconds: float,
    steps: int,
    sessions: list[int],
) -> dict[str, Any]:
    """`Report.healing`. `steps` were done in the `seconds` of the last session."""
    per_step = settings.batch_size * settings.accumulate * settings.length
    return {
        "original": original,
        "steps": settings.steps,
        "tokens": settings.steps * per_step,
        "settings": {**asdict(settings), "lm": lm, "embeddings": embeddings},
        "trained": healed.trained,
        "kl": {"before": healed.before, "after": healed.after, "attempt": healed.attempt},
        "kept_step": healed.step,
        "held_out_tokens": text.held_out.numel(),
        "sources": text.facts,
        "perplexity": {name: dict(row) for name, row in tests.items()},
        "train": thinned(healed.train),
        "held": healed.held,
        "memory": {"training": healed.memory, "peak": peak()},
        "tokens_per_second": steps * per_step / seconds if steps else None,
        "seconds": seconds,
        "sessions": sessions,
    }
