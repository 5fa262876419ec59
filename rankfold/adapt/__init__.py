"""Fine-tune a pretrained model with an adapter: `rankfold adapt MODEL OUT --recipe lora`.

    classification   labelled texts      the head trains whole, adapters below it
    images           labelled images     the same
    language         text, or chats      adapters alone

The model decides which, by what its configuration says it is: one that writes text goes on doing so, any
other gets a head for the classes of the data. A run that was stopped goes on from its last checkpoint, to
the same losses.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rankfold import data as texts
from rankfold.adapt.chat import is_chat
from rankfold.adapt.choice import choice
from rankfold.adapt.classes import Asked
from rankfold.adapt.classifier import adapt_classifier
from rankfold.adapt.images import open_images
from rankfold.adapt.job import Job
from rankfold.adapt.labelled import open_texts
from rankfold.adapt.language import adapt_language
from rankfold.adapt.material import Wanted
from rankfold.adapt.output import form_of
from rankfold.adapt.pixels import Reading
from rankfold.atomic import check_folder
from rankfold.classify.rows import SUFFIXES
from rankfold.classify.settings import Training
from rankfold.data_classes import CLASSES
from rankfold.data_images import IMAGES
from rankfold.gguf import PACKAGED, packaged_model
from rankfold.judge import Bars
from rankfold.loading import one_device

DTYPES = ("float32", "bfloat16")
# Options by what they are of; those of every task stand nowhere.
_LABELLED = {"classification", "images"}
KINDS = {
    "classification": "text classifiers",
    "images": "image classifiers",
    "language": "language models",
}
TASKS: dict[str, set[str]] = {
    **{key: _LABELLED for key in ("label_column", "patience", "per_class", "new_head")},
    **{key: {"images"} for key in ("image_column", "image_size", "mean", "std", "augment", "workers")},
    **{key: {"language"} for key in ("tokens", "steps", "accumulate", "validation_tokens")},
    **{key: {"language"} for key in ("eval_every", "save_every")},
    "text_column": {"classification"},
    "length": {"classification", "language"},
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "classification": {"epochs": 3, "batch_size": 32, "length": 128, "patience": 3},
    "images": {"epochs": 3, "batch_size": 32, "patience": 3},
    "language": {"batch_size": 2, "length": 512},
}


def adapt(
    model: str,
    out: str,
    *,
    recipe: str | None,
    data: Sequence[str],
    progress: Bars,
    say: Callable[[str], None],
    options: Mapping[str, Any] | None = None,
    targets: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    keep_trainable: Sequence[str] = (),
    validation: Sequence[str] = (),
    test: Sequence[str] = (),
    held_out: float = 0.1,
    lr: float | None = None,
    warmup: float = 0.1,
    clip: float = 1.0,
    dtype: str = "float32",
    seed: int = 0,
    device: str | None = None,
    merge: bool = False,
    adapter_only: bool = False,
    as_lora: bool = False,
    restart: bool = False,
    resume: bool = False,
    keep_run: bool = False,
    check: bool = True,
    overwrite: bool = False,
    **given: Any,
) -> tuple[dict[str, Any], Path]:
    """Adapt MODEL, write OUT, and return what adapt.json says and the path.

    recipe   of an adapter (lora, wara, …), "full" or "probe"; `options` are its rank, alpha, wavelet, levels,
             init, those that are not None
    data     one labelled source for a classifier; texts, or files of conversations, for a language model
    given    epochs, batch_size, length; patience, label_column, per_class, new_head of a classifier;
             text_column; image_column, image_size, mean, std, augment, workers of images
             (`rankfold.adapt.pixels.Reading`); tokens, steps, accumulate, validation_tokens, eval_every,
             save_every of a language model. None is the default of the task

    Raises ValueError for bad arguments and bad data before anything is trained, and where the loss is not a
    number; `Stopped` where a signal ended the run, with a checkpoint.
    """
    chosen = choice(recipe, options or {}, targets=targets, skip=skip, keep=keep_trainable, seed=seed)
    form = form_of(
        chosen.name, chosen.recipe is not None, merge=merge, adapter_only=adapter_only, as_lora=as_lora
    )
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r}: float32, or bfloat16 for autocast over the weights as they are")
    if restart and resume:
        raise ValueError("--resume and --restart: one of them")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("rankfold adapt runs in one process: start it without torchrun")
    task = task_of(model)
    stated = {key: value for key, value in given.items() if value is not None}
    _check_options(task, model, stated)
    check_data(task, model, data, [*validation, *test], stated.get("label_column", "label"))
    stated = DEFAULTS[task] | stated
    job = Job(
        model=model,
        folder=check_folder(out, overwrite),
        choice=chosen,
        form=form,
        dtype=dtype,
        device=one_device(device, "adapt"),
        seed=seed,
        progress=progress,
        say=say,
        restart=restart,
        resume=resume,
        keep_run=keep_run,
        check=check,
        overwrite=overwrite,
    )
    rate = chosen.rate if lr is None else lr
    if task in _LABELLED:
        for option, specs in (("data", data), ("validation", validation), ("test", test)):
            if len(specs) > 1:
                raise ValueError(f"--{option}: a classifier takes one of them; {len(specs)} were given")
        training = Training(
            epochs=stated["epochs"],
            lr=rate,
            batch_size=stated["batch_size"],
            length=stated.get("length"),
            patience=stated["patience"],
            warmup=warmup,
            clip=clip,
            seed=seed,
            device=job.device,
            workers=stated.get("workers", 0),
        )
        asked = Asked(
            data=data[0],
            validation=validation[0] if validation else None,
            test=test[0] if test else None,
            held=held_out,
            label_column=stated.get("label_column", "label"),
            per_class=stated.get("per_class"),
            new_head=stated.get("new_head", False),
        )
        if task == "images":
            names = {"column": "image_column", "size": "image_size", "mean": "mean", "std": "std"}
            reading = Reading.of(
                **{name: stated.get(key) for name, key in names.items()}, augment=stated.get("augment")
            )
            opening = partial(open_images, model, asked, reading, seed)
        else:
            column = stated.get("text_column", "text")
            opening = partial(open_texts, model, asked, column, stated["length"], seed)
        return adapt_classifier(job, training, opening), job.folder
    accumulate = stated.get("accumulate", 1)
    wanted = Wanted(
        data=tuple(data),
        validation=tuple(validation),
        tests=tuple(test),
        held_out=held_out,
        validation_tokens=stated.get("validation_tokens", 8192),
        length=stated["length"],
        rows=stated["batch_size"] * accumulate,
        epochs=stated.get("epochs"),
        steps=stated.get("steps"),
        tokens=stated.get("tokens"),
    )
    facts = adapt_language(
        job,
        wanted,
        batch_size=stated["batch_size"],
        accumulate=accumulate,
        lr=rate,
        warmup=warmup,
        clip=clip,
        eval_every=stated.get("eval_every"),
        save_every=stated.get("save_every"),
    )
    return facts, job.folder


def _check_options(task: str, model: str, stated: Mapping[str, Any]) -> None:
    for key in stated:
        tasks = TASKS.get(key, {task})
        if task not in tasks:
            what = "a classifier trains whole --epochs" if key in ("tokens", "steps") else f"{model} is none"
            kinds = (
                "classifiers" if tasks == _LABELLED else " and ".join(KINDS[item] for item in sorted(tasks))
            )
            raise ValueError(f"--{key.replace('_', '-')}: of {kinds}, and {what}")


def task_of(model: str) -> str:
    """ "language" for a model that writes text, "images" for one that reads images, else "classification";
    only its configuration is read. Raises ValueError for a model that cannot be found."""
    from transformers import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        AutoConfig,
    )

    import rankfold.hf
    import rankfold.models  # noqa: F401  its own kinds

    path = packaged_model(model) if model in PACKAGED else model
    if str(path).endswith(".gguf"):
        return "language"
    try:
        config = AutoConfig.from_pretrained(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"no model {model!r}: not a folder with config.json, not a .gguf file, not packaged "
            f"({', '.join(PACKAGED)}), and the hub could not be asked ({str(error).splitlines()[0]})"
        ) from error
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "language"
    if "ForImageClassification" in architecture:
        return "images"
    sees = type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    reads = type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    return "images" if sees and not reads else "classification"


def check_data(task: str, model: str, data: Sequence[str], others: Sequence[str], label_column: str) -> None:
    """Raise ValueError where the data is not what the model learns from: labels for one that writes text,
    conversations for one that does not."""
    if not data:
        raise ValueError(
            "what to train on: --data, such as movie:train, brown:train, my.csv, chats.jsonl, a folder of "
            "images"
        )
    if task == "images":
        return  # looked at by name when they are opened
    for spec in (*data, *others):
        name = texts.Spec.parse(spec).name
        if name in IMAGES or (task == "classification" and Path(name).is_dir()):
            raise ValueError(
                f"{spec!r} is a set of images, and {model} reads text; name a model that reads images"
            )
        if task == "classification" and is_chat(spec):
            raise ValueError(f"{spec!r} holds conversations, and {model} writes no text; name a causal model")
        if task == "classification" or is_chat(spec):
            continue
        labelled = name in CLASSES or (Path(name).suffix in SUFFIXES and Path(name).suffix != ".jsonl")
        if labelled or label_column in texts.first_record(name):
            raise ValueError(
                f"{spec!r} has labels, and {model} writes text: to classify, adapt a model that reads, such "
                "as minilm; to learn the texts alone, put them without labels into a .jsonl file"
            )


__all__ = ["adapt", "check_data", "task_of"]
