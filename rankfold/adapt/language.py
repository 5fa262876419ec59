"""A causal language model, adapted: text or conversations in, the state with the lowest held-out loss out.

open -> adapters on -> data -> perplexity before -> Trainer -> best state -> perplexity after -> write
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from rankfold.adapt.choice import FULL, trained_facts
from rankfold.adapt.job import Job, before, finish, memory_of
from rankfold.adapt.material import Wanted
from rankfold.adapt.output import check_form
from rankfold.adapt.trainer import BEST, LanguageTrainer
from rankfold.footprint import params
from rankfold.loading import Opened, open_model
from rankfold.pretrain.model import check_causal
from rankfold.pretrain.report import thinned
from rankfold.pretrain.run import Run, step_of
from rankfold.pretrain.trainer import Watch, arguments, curves, train_to_the_end
from rankfold.provenance import weights_hash
from rankfold.refine import settings_for


def adapt_language(
    job: Job,
    wanted: Wanted,
    *,
    batch_size: int,
    accumulate: int,
    lr: float,
    warmup: float,
    clip: float,
    eval_every: int | None,
    save_every: int | None,
) -> dict[str, Any]:
    """Run the job and return the facts. Raises ValueError before anything trains for what cannot be, and
    where the loss is not a number; `Stopped` where a signal ended the run, with a checkpoint."""
    plan = wanted.plan()

    def settings_of(steps: int) -> Any:
        return settings_for(
            steps=steps,
            batch_size=batch_size,
            accumulate=accumulate,
            length=wanted.length,
            lr=lr,
            warmup=warmup,
            clip=clip,
            dtype=job.dtype,
            eval_every=eval_every,
            save_every=save_every,
            seed=job.seed,
            device=job.device,
        )

    settings_of(plan.steps)  # what is wrong with an option is said before the weights are read
    opened = open_model(job.model, device=job.device)
    said = _check(opened, job, wanted.length)
    model: Any = opened.model
    plan.open_(opened.tokenizer, job.model)
    settings = settings_of(plan.steps)
    identity = {
        "model": weights_hash(model),
        "recipe": job.choice.to_json(),
        "data": plan.to_json(),
        "training": settings.to_json(),
    }
    size = params(model)
    report = job.choice.put_(model)
    if report is not None:
        check_form(model, job.form)
        said += report.warnings
    trained = trained_facts(model, size, report)
    run = Run(job.folder, identity)
    with job.progress() as tell:
        run.open(restart=job.restart, resume=job.resume)
        material = plan.read(run, opened.tokenizer, batch_size, job.seed, tell)
        said += material.warnings
        for words in said:
            job.say(f"warning: {words}")

        def measure() -> dict[str, Any]:
            model.eval()
            found: dict[str, Any] = {"held out": {"loss": material.score(model)}}
            return found | {name: {"perplexity": test(model)} for name, test in material.tests.items()}

        tell("measure", 0, 1)
        first = before(run, measure)
        tell("measure", 1, 1)
        watch = Watch(tell, job.say, per_layer=False)
        cached = getattr(model.config, "use_cache", None)
        watch.trainer = trainer = LanguageTrainer(
            model,
            # Autocast is the trainer's to switch: around validation there is none.
            arguments(run.folder, replace(settings, dtype="float32")),
            train_dataset=material.train,
            data_collator=material.collate,
            callbacks=[watch],
            score=material.score,
            best=run.folder / BEST,
            autocast=settings.dtype == "bfloat16",
        )
        found = run.checkpoint()
        done = step_of(found) if found else 0
        if found:
            job.say(f"going on from {found}")
        run.note(done)
        began = time.perf_counter()
        train_to_the_end(watch, found, run.folder)
        seconds = time.perf_counter() - began
        train, held = curves(trainer.state.log_history)
        if not held or held[-1][0] < settings.steps:
            trainer.evaluate()
            train, held = curves(trainer.state.log_history)
        best = trainer.take_best_()
        if cached is not None:
            model.config.use_cache = cached
        tell("judge", 0, 1)
        after = measure()
        tell("judge", 1, 1)
        facts = {
            "task": "language",
            "trained": trained,
            "data": material.facts,
            "settings": {**vars(settings), "dtype": settings.dtype},
            "training": {
                "steps": settings.steps,
                "best_step": best,
                "train": thinned(train),
                "validation": [[0, first["held out"]["loss"]], *held],
                "seconds": seconds,
                "sessions": run.sessions,
            },
            "metrics": {name: {"before": first[name], "after": after[name]} for name in after},
            "memory": memory_of(watch),
            "warnings": said,
        }
        finish(job, run, model, opened.tokenizer, facts, tell)
    return facts


def _check(opened: Opened, job: Job, length: int) -> list[str]:
    """Refuse what cannot be adapted so; train in float32 what would lose its steps in 16 bits. Returns
    warnings."""
    model: Any = opened.model
    if opened.tokenizer is None:
        raise ValueError(f"{job.model} has no tokenizer beside it, so text cannot be read for it")
    longest = getattr(model.config, "max_position_embeddings", None) or length
    if not 2 <= length <= longest:
        raise ValueError(f"--length {length}: {job.model} reads from 2 to {longest} tokens")
    check_causal(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    weights = job.choice.name == FULL or bool(job.choice.keep)
    if dtype == torch.float16 or (dtype == torch.bfloat16 and weights):
        model.float()
        why = "its own weights train" if weights else "float16 overflows in training"
        return [f"{job.model} is in {str(dtype).removeprefix('torch.')} and trains in float32, since {why}"]
    return []
