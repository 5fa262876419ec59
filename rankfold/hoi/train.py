"""Train a HOLa model and write it, as the command line does: `rankfold hoi train`.

    annotations, images, detections, texts -> model -> Trainer of transformers -> score -> folder, hoi.json

Names, options, files, classes and sizes are checked before anything is trained. A run that was stopped goes
on from its last checkpoint, to the same weights.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rankfold.atomic import check_folder, writing
from rankfold.checkpoint import verify
from rankfold.hoi.annotations import Bad
from rankfold.hoi.build import Choice, build, check_vision, check_width, open_text
from rankfold.hoi.evaluation import evaluate
from rankfold.hoi.facts import lines, part_facts, size_of, write_facts
from rankfold.hoi.folder import TEXT, has_part, open_part
from rankfold.hoi.loader import Batches, HoiDataset
from rankfold.hoi.model import HolaModel
from rankfold.hoi.precision import check_points
from rankfold.hoi.predict import pixels_of, predictions
from rankfold.hoi.regime import HolaRegime
from rankfold.hoi.settings import Losses, Training, losses
from rankfold.hoi.showing import first, shown_of
from rankfold.hoi.sources import check_queries, looking, opened
from rankfold.hoi.splits import Split, split
from rankfold.hoi.text_file import save_features
from rankfold.hoi.trainer import HoiTrainer, Watch, epochs_of, steps_of
from rankfold.hoi.visualise_page import page
from rankfold.judge import Bars
from rankfold.loading import one_device
from rankfold.metrics import Progress
from rankfold.pretrain.run import Run, step_of
from rankfold.pretrain.trainer import train_to_the_end
from rankfold.provenance import versions

PAGE = "report.html"


def train(
    data: str,
    out: str,
    *,
    progress: Bars,
    say: Callable[[str], None],
    setting: str = "none",
    unseen: str | None = None,
    choice: Choice | None = None,
    weights: dict[str, float] | None = None,
    annotations: str | None = None,
    images: str | None = None,
    detections: str | None = None,
    detector: str | None = None,
    bad: Bad = "raise",
    score: bool = True,
    points: str = "11",
    restart: bool = False,
    resume: bool = False,
    keep_run: bool = False,
    check: bool = True,
    overwrite: bool = False,
    device: str | None = None,
    **settings: Any,
) -> tuple[dict[str, Any], Path]:
    """Train on the training part of the data folder, write OUT, and return what hoi.json says and the path.

    setting, unseen   what is hidden: see `rankfold.hoi.splits.split`
    choice            the model and its options; None: a small encoder of random weights
    weights           of the loss, by name: see `Losses`
    annotations, images, detections   instead of those of the folder (see `rankfold.hoi.folder`)
    detector          finds what is in the images as they are read, instead of files of detections
    bad               boxes that leave the image or have no area: "raise", "clip", "drop"
    score             evaluate on the test part, if the folder has one, once, at the end; by `points`
    settings          epochs, lr, batch_size, accumulate, ...: see `Training`; None is its default

    Raises ValueError for bad arguments and bad data, before anything is trained, and where the loss is not a
    number; `Stopped` where a signal ended the run, with a checkpoint.
    """
    choice = choice or Choice()
    place = one_device(device, "hoi")
    given = {name: value for name, value in settings.items() if value is not None}
    chosen, terms = Training(device=place, **given), losses(choice.upstream, **(weights or {}))
    check_points(points)
    folder = check_folder(out, overwrite)
    width = check_vision(choice)
    part = open_part(data, "train", annotations=annotations, images=images, detections=detections, bad=bad)
    table = part.annotations.table
    hidden = split(table, setting, unseen)
    held = part.annotations.without_unseen(hidden)
    live = looking(detector, table, place, chosen.workers)
    parts, sources = {"train": part}, {"train": opened(part, live)}
    if score and annotations is None and has_part(data, "test"):
        parts["test"] = open_part(data, "test", table=table, bad=bad)
        sources["test"] = opened(parts["test"], live)
    query_width = sources["train"].width
    for source in sources.values():
        check_queries(source, query_width)
    words, encoded = open_text(choice, data, table, place)
    identity = {
        "model": choice.to_json(),
        "losses": terms.to_json(),
        "training": chosen.to_json(),
        "setting": hidden.to_json(),
        "data": {
            "annotations": _digest(Path(part.annotations.source)),
            "images": len(held),
            "classes": table.hash,
            "detections": detector or _digest(part.detections),
            "texts": words,
        },
    }
    run = Run(folder, identity)
    with progress() as tell:
        run.open(restart=restart, resume=resume)
        text = encoded(run.folder / TEXT, say)
        check_width(text, width, choice)
        model = build(choice, text, table, query_width=query_width, seed=chosen.seed)
        seen = HoiDataset(held, part.images, sources["train"], pixels_of(model))
        trained = _fit(run, model, chosen, terms, seen, hidden, tell, say)
        scores, shown = None, []
        if "test" in parts:
            whole = HoiDataset(
                parts["test"].annotations, parts["test"].images, sources["test"], pixels_of(model)
            )
            rows = predictions(
                model.eval(),
                whole,
                batch_size=chosen.batch_size,
                workers=chosen.workers,
                tell=tell,
                stage="test",
            )
            scores = evaluate(
                first(rows, shown),
                whole.annotations,
                hidden,
                points=points,
                detector_saw=sources["test"].known,
            )
            say(f"test: {scores.in_words()}")
        tell("write", 0, 1)
        facts = {
            "model": {**choice.to_json(), **size_of(model), "options": choice.options},
            "setting": hidden.to_json() | {"counts": hidden.facts()},
            "text": {"source": text.source, "hash": text.hash, "width": text.width},
            "data": {name: part_facts(parts[name], sources[name]) for name in parts},
            "trained_on": {"images": len(held), "pairs": int(held.counts().sum())},
            "losses": terms.to_json(),
            "settings": chosen.to_json(),
            "training": trained,
            "metrics": {} if scores is None else {"test": scores.to_json()},
            "versions": versions(),
        }
        with writing(folder) as beside:
            model.save_pretrained(beside)
            save_features(text, beside / TEXT)
            write_facts(beside, facts)
            pictures = (shown_of(whole, found) for found in shown)
            title = f"HOLa, setting {hidden.name}"
            text_of_page = page(pictures, table, title=title, facts=lines(facts), scores=scores, split=hidden)
            (beside / PAGE).write_text(text_of_page, encoding="utf-8")
        if check:
            verify(model, folder)
        tell("write", 1, 1)
    if not keep_run:
        run.remove()
    return facts, folder


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _fit(
    run: Run,
    model: HolaModel,
    chosen: Training,
    terms: Losses,
    data: HoiDataset,
    hidden: Split,
    tell: Progress,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Train to the end of all epochs, show the model all classes again, and return how it went."""
    batches = Batches(data, chosen.batch_size, chosen.epochs, chosen.seed)
    rare = data.annotations.table.rare - set(hidden.unseen) if hidden.name.startswith("RF") else ()
    regime = HolaRegime(hidden.unseen, terms, rare=rare)
    regime.start_(model, steps_of(batches, chosen))
    watch = Watch(tell, say)
    trainer = HoiTrainer(model, run.folder, chosen, batches, regime, watch)
    found = run.checkpoint()
    if found:
        say(f"going on from {found}")
    run.note(step_of(found) if found else 0)
    began = time.perf_counter()
    train_to_the_end(watch, found, run.folder)
    seconds = time.perf_counter() - began
    ended = regime.finish_()
    return {
        "epochs": epochs_of(trainer.state.log_history, batches.per_epoch, chosen.accumulate),
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "sessions": run.sessions,
        "residual": ended.get("language.decomposition"),
    }
