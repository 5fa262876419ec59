"""A classifier, adapted: labelled texts or images in; the head trains whole, the model below it by its
adapters.

examples -> model with a head -> adapters on -> scores before -> Trainer -> best epoch -> scores after
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rankfold.adapt.choice import head_of, trained_facts
from rankfold.adapt.job import Job, before, finish, memory_of
from rankfold.adapt.output import check_form
from rankfold.adapt.trainer import ClassifierTrainer, ClassifierWatch
from rankfold.classify.encode import Batches, Inputs, logits_of
from rankfold.classify.examples import Examples, numbers
from rankfold.classify.scores import confusion, scores
from rankfold.classify.settings import Training
from rankfold.classify.trainer import best, epochs_of, evaluations, train_to_the_best
from rankfold.footprint import params
from rankfold.metrics import Progress
from rankfold.pretrain.report import thinned
from rankfold.pretrain.run import Run
from rankfold.pretrain.trainer import curves
from rankfold.provenance import weights_hash


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is learned: a model with a head for `names`, and examples as it reads them.

    reader    what makes inputs of examples, and is saved beside the model: a tokenizer, an image processor
    sets      {"train", "validation", "test": examples}, those that there are; `inputs`: the same, for the
              model
    facts     what is told of each set, beside its source and size
    identity  what makes a run another one, beside data, model and training; `settings`: what is told of it
    """

    model: Any
    reader: Any
    names: list[str]
    sets: Mapping[str, Examples]
    inputs: Mapping[str, Inputs]
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def adapt_classifier(job: Job, training: Training, opening: Callable[[Progress], Task]) -> dict[str, Any]:
    """Run the job on what `opening` reads and return the facts. Raises ValueError before anything trains for
    what cannot be, and where the loss is not a number; `Stopped` where a signal ended the run, with a
    checkpoint."""
    with job.progress() as tell:
        task = opening(tell)
    sets, names, encoded, model = task.sets, task.names, task.inputs, task.model
    labels = {part: numbers(item, names) for part, item in sets.items()}
    said = list(task.warnings)
    model.to(job.device)
    head = head_of(model)
    identity = {
        "model": weights_hash(model),
        "recipe": job.choice.to_json(),
        "training": training.to_json() | {"dtype": job.dtype},
        "data": {part: {"source": item.source, "hash": item.hash} for part, item in sets.items()},
        "classes": names,
        **task.identity,
    }
    size = params(model)
    report = job.choice.put_(model, head)
    if report is not None:
        check_form(model, job.form)
        said += report.warnings
    trained = trained_facts(model, size, report) | {"head": head}
    run = Run(job.folder, identity)
    for words_ in said:
        job.say(f"warning: {words_}")
    with job.progress() as tell:
        run.open(restart=job.restart, resume=job.resume)
        judged = [part for part in sets if part != "train"]

        def measure() -> dict[str, Any]:
            found = {}
            for part in judged:
                logits = logits_of(model, encoded[part], 2 * training.batch_size, tell=tell, stage=part)
                matrix = confusion(labels[part], logits.argmax(-1).tolist(), len(names))
                found[part] = scores(matrix, names)
            return found

        first = before(run, measure)
        watch, went = _fit(job, run, model, training, encoded, labels, tell)
        after = measure()
        facts = {
            "task": "classification",
            "of": sets["train"].noun,
            "classes": names,
            "trained": trained,
            "data": {
                part: {"source": item.source, "hash": item.hash, "n": len(item), **task.facts.get(part, {})}
                for part, item in sets.items()
            },
            "settings": training.to_json() | {"dtype": job.dtype, **task.settings},
            "training": went,
            "metrics": {part: {"before": first[part], "after": after[part]} for part in judged},
            "memory": memory_of(watch),
            "warnings": said,
        }
        finish(job, run, model, task.reader, facts, tell)
    return facts


def _fit(
    job: Job,
    run: Run,
    model: Any,
    training: Training,
    encoded: Mapping[str, Inputs],
    labels: dict[str, list[int]],
    tell: Any,
) -> tuple[ClassifierWatch, dict[str, Any]]:
    """Train to the end of all epochs or of patience, load the best weights, and say how it went."""
    batches = Batches(encoded["train"], labels["train"], training.batch_size, training.epochs, training.seed)
    held: tuple[Inputs, Tensor] | None = None
    if "validation" in encoded:
        held = encoded["validation"], torch.tensor(labels["validation"])
    watch = ClassifierWatch(tell, job.say, batches.per_epoch)
    trainer = ClassifierTrainer(
        model, run.folder, training, batches, held, watch, autocast=job.dtype == "bfloat16"
    )
    history, done, seconds = train_to_the_best(trainer, watch, run, job.say)
    train, validated = curves(history)
    seen = evaluations(history)
    return watch, {
        "steps": done,
        "epochs": epochs_of(history, batches.per_epoch),
        "best_epoch": best(seen, training.best) + 1 if seen else done // batches.per_epoch,
        "stopped_early": done < len(batches),
        "train": thinned(train),
        "validation": validated,
        "seconds": seconds,
        "sessions": run.sessions,
    }
