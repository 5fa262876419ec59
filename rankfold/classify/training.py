"""Train a classifier and write it, as the command line does: `rankfold classify train`.

    examples -> tokenizer, model -> Trainer of transformers -> best epoch -> ordinary folder, classify.json

Names, options, files and labels are checked before anything is trained. A run that was stopped goes on from
its last checkpoint, to the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.atomic import writing, writing_file
from rankfold.checkpoint import check_folder, save, verify
from rankfold.classify.build import Words, build, check_fits, source, words
from rankfold.classify.encode import Batches, Encoded, encode, logits_of
from rankfold.classify.examples import (
    Examples,
    balanced,
    check_spec,
    classes_of,
    held_out,
    numbers,
    read,
    warnings_of,
)
from rankfold.classify.facts import size_of
from rankfold.classify.scores import confusion, scores
from rankfold.classify.settings import SCRATCH, Choice, Training, training
from rankfold.classify.trainer import (
    ClassifyTrainer,
    Watch,
    best,
    epochs_of,
    evaluations,
    train_to_the_best,
)
from rankfold.judge import Bars
from rankfold.loading import one_device
from rankfold.metrics import Progress
from rankfold.pretrain.run import Run
from rankfold.provenance import versions
from rankfold.report import encode as as_json
from rankfold.report_format import percent

FACTS = "classify.json"


def train(
    data: str,
    out: str,
    *,
    progress: Bars,
    say: Callable[[str], None],
    choice: Choice | None = None,
    text_column: str = "text",
    label_column: str = "label",
    validation: str | None = None,
    held: float | None = None,
    test: str | None = None,
    restart: bool = False,
    resume: bool = False,
    check: bool = True,
    overwrite: bool = False,
    device: str | None = None,
    **settings: Any,
) -> tuple[dict[str, Any], Path]:
    """Train on `data`, write OUT, and return what classify.json says and the path.

    choice      the model and its options; None: LAMA over a GRU
    validation  examples that choose the epoch; None: `held` (a tenth) of the training ones. held=0: none, and
                the last epoch is kept
    test        examples that are scored once, at the end
    settings    epochs, lr, batch_size, length, seed, patience, best, weight_decay, warmup, clip: see
                `Training`; None is the default of that model

    Raises ValueError for bad arguments and bad data, before anything is trained, and where the loss is not a
    number; `Stopped` where a signal ended the run, with a checkpoint.
    """
    choice = choice or Choice()
    place = one_device(device, "classify")
    chosen = training(choice, device=place, **settings)
    length = chosen.length
    assert length is not None  # of images alone
    if validation is not None and held is not None:
        raise ValueError("--validation and --held-out: give one of them")
    share = 0.1 if held is None else held
    if not 0 <= share < 1:
        raise ValueError(f"--held-out {share:g}: the share for validation, at least 0 and below 1")
    for spec in (data, validation, test):
        if spec is not None:
            check_spec(spec)
    folder = check_folder(out, overwrite)
    reading = partial(read, text_column=text_column, label_column=label_column)
    sets, names = sets_of(data, validation, test, share, reading)
    labels = {part: numbers(examples, names) for part, examples in sets.items()}
    if not choice.scratch:
        check_pretrained(choice.model, length)
    elif choice.vectors is not None and not choice.vectors_file:
        check_pretrained(choice.vectors, 0)
    identity = {
        "model": choice.to_json(),
        "training": chosen.to_json(),
        "data": {part: {"source": item.source, "hash": item.hash} for part, item in sets.items()},
        "classes": names,
    }
    run = Run(folder, identity)
    warned = warnings_of(sets["train"], {part: item for part, item in sets.items() if part != "train"})
    for words_ in warned:
        say(f"warning: {words_}")
    with progress() as tell:
        run.open(restart=restart, resume=resume)
        tell("prepare", 0, 1)
        known = words(choice, sets["train"].texts, length)
        known.tokenizer = _kept_tokenizer(run, known)
        encoded = {part: encode(known.tokenizer, item.texts, length) for part, item in sets.items()}
        cut = check_tokens(sets, encoded)
        for words_ in cut:
            say(f"warning: {words_}")
        warned += cut
        model = build(choice, known, names, seed=chosen.seed, length=length)
        tell("prepare", 1, 1)
        trained = _fit(run, model, chosen, encoded, labels, tell, say)
        metrics = {}
        for part in sets:
            if part == "train":
                continue
            logits = logits_of(model, encoded[part], 2 * chosen.batch_size, tell=tell, stage=part)
            matrix = confusion(labels[part], logits.argmax(-1).tolist(), len(names))
            metrics[part] = scores(matrix, names)
        model.eval()
        tell("write", 0, 1)
        save(model, folder, tokenizer=known.tokenizer, overwrite=overwrite)
        if check:
            verify(model, folder)
        tell("write", 1, 1)
    facts = {
        "model": {**choice.to_json(), **known.facts, **size_of(model, encoded["train"].mean_length, folder)},
        "classes": names,
        "data": {
            part: {"source": item.source, "hash": item.hash, "n": len(item), "cut": encoded[part].cut}
            for part, item in sets.items()
        },
        "held_out": share if validation is None else None,
        "settings": chosen.to_json(),
        "training": trained,
        "metrics": metrics,
        "warnings": warned,
        "versions": versions(),
    }
    write_facts(folder, facts)
    run.remove()
    return facts, folder


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    with writing_file(folder / FACTS) as beside:
        beside.write_text(json.dumps(as_json(facts, FACTS), indent=1, allow_nan=False), encoding="utf-8")


def sets_of(
    data: str,
    validation: str | None,
    test: str | None,
    share: float,
    reading: Callable[[str], Examples],
    per_class: int | None = None,
) -> tuple[dict[str, Examples], list[str]]:
    """{"train", "validation", "test": examples}, those that there are, as `reading` finds them, and the
    classes. `per_class`: so many training examples of every class, None: all that there are."""
    whole = reading(data)
    names = classes_of(whole)
    sets = {"train": whole}
    if validation is not None:
        sets["validation"] = reading(validation)
    elif share:
        sets["train"], sets["validation"] = held_out(whole, share)
    if per_class is not None:
        sets["train"] = balanced(sets["train"], per_class)
    if test is not None:
        sets["test"] = reading(test)
    return sets, names


def check_pretrained(model: str, length: int) -> None:
    """Raise ValueError where the model has no configuration, or reads fewer tokens; no weights are loaded."""
    from transformers import AutoConfig

    import rankfold.models  # noqa: F401  its own kinds

    try:
        check_fits(model, AutoConfig.from_pretrained(source(model)), length)
    except (OSError, KeyError) as error:
        raise ValueError(
            f"no model {model!r}: none of {', '.join(SCRATCH)}, not a folder with config.json, not "
            f"packaged, and the hub could not be asked ({str(error).splitlines()[0]})"
        ) from error


def _kept_tokenizer(run: Run, known: Words) -> Any:
    """The tokenizer of the run, as its first session made it."""
    from transformers import AutoTokenizer

    if not run.tokenizer.is_dir():
        with writing(run.tokenizer) as beside:
            known.tokenizer.save_pretrained(beside)
        return known.tokenizer
    return AutoTokenizer.from_pretrained(str(run.tokenizer))


def check_tokens(sets: dict[str, Examples], encoded: dict[str, Encoded]) -> list[str]:
    """Refuse texts in which the tokenizer finds nothing; say how many are cut."""
    found = []
    for part, data in sets.items():
        for index, ids in enumerate(encoded[part].ids):
            if not ids:
                raise ValueError(
                    f"{data.at(index)}: the tokenizer finds no word in {data.texts[index][:40]!r}; take the "
                    "row out"
                )
        if cut := encoded[part].cut:
            found.append(
                f"{cut} of the {len(data)} {part} texts ({percent(cut / len(data))}) are longer than "
                f"{encoded[part].length} tokens and were cut there (--length)"
            )
    return found


def _fit(
    run: Run,
    model: nn.Module,
    chosen: Training,
    encoded: dict[str, Encoded],
    labels: dict[str, list[int]],
    tell: Progress,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Train to the end of all epochs or of patience, load the best weights, and return how it went."""
    batches = Batches(encoded["train"], labels["train"], chosen.batch_size, chosen.epochs, chosen.seed)
    held: tuple[Encoded, Tensor] | None = None
    if "validation" in encoded:
        held = encoded["validation"], torch.tensor(labels["validation"])
    watch = Watch(tell, say, batches.per_epoch)
    trainer = ClassifyTrainer(model, run.folder, chosen, batches, held, watch)
    history, done, seconds = train_to_the_best(trainer, watch, run, say)
    seen = evaluations(history)
    return {
        "epochs": epochs_of(history, batches.per_epoch),
        "best_epoch": best(seen, chosen.best) + 1 if seen else done // batches.per_epoch,
        "stopped_early": done < len(batches),
        "steps": done,
        "seconds": seconds,
        "sessions": run.sessions,
    }
