"""How well a trained model does on one part of a data set: `rankfold hoi eval`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rankfold.atomic import writing_file
from rankfold.hoi.annotations import Annotations, Bad
from rankfold.hoi.confusion import confusions
from rankfold.hoi.detector import Detector, extract
from rankfold.hoi.evaluation import evaluate
from rankfold.hoi.facts import lines, read_facts, split_of
from rankfold.hoi.folder import Part, open_part
from rankfold.hoi.loader import HoiDataset
from rankfold.hoi.precision import check_points
from rankfold.hoi.predict import open_model, pixels_of, predictions
from rankfold.hoi.prediction_file import load_predictions, save_predictions
from rankfold.hoi.scores import Scores
from rankfold.hoi.showing import SHOWN, shown_of
from rankfold.hoi.sources import check_queries, looking, opened
from rankfold.hoi.visualise_page import page
from rankfold.judge import Bars
from rankfold.loading import one_device


def score(
    folder: str,
    data: str,
    *,
    part: str = "test",
    annotations: str | None = None,
    images: str | None = None,
    detections: str | None = None,
    detector: str | None = None,
    bad: Bad = "raise",
    points: str = "11",
    seen_images: bool = False,
    save: str | None = None,
    html: str | None = None,
    batch_size: int = 16,
    workers: int = 0,
    device: str | None = None,
    progress: Bars,
) -> tuple[Scores, Annotations]:
    """mAP of the model in `folder` on a part of the data folder, and the annotations.

    detector     finds what is in the images now, instead of a file of detections
    seen_images  only what training saw: images and pairs of seen interactions (with part "train")
    save         a file to keep the predictions in
    html         a page to write: scores, every interaction, what was taken for what, the first images

    Raises ValueError for what is missing or does not fit, before any image is read.
    """
    if batch_size < 1 or workers < 0:
        raise ValueError(f"--batch-size {batch_size} and --workers {workers}: at least 1, and at least 0")
    check_points(points)
    place = one_device(device, "hoi")
    facts = read_facts(folder)
    model = open_model(folder, place)
    table = model.table
    hidden = split_of(facts, table)
    given = open_part(
        data, part, table=table, annotations=annotations, images=images, detections=detections, bad=bad
    )
    held = given.annotations.without_unseen(hidden) if seen_images else given.annotations
    source = opened(given, looking(detector, table, place, workers))
    check_queries(source, model.config.query_width)
    whole = HoiDataset(held, given.images, source, pixels_of(model))
    with progress() as tell:
        rows: Any = predictions(model, whole, batch_size=batch_size, workers=workers, tell=tell, stage=part)
        with TemporaryDirectory() as beside:
            if save is not None or html is not None:  # a page reads them twice
                kept = {"model": str(folder), "setting": hidden.to_json(), "part": part}
                file = save_predictions(rows, save or Path(beside) / "predictions.safetensors", table, kept)
                rows = load_predictions(file, table)
            scores = evaluate(rows, held, hidden, points=points, detector_saw=source.known)
            if html is not None:
                shown = (shown_of(whole, row) for row in rows[:SHOWN])
                text = page(
                    shown,
                    table,
                    title=f"HOLa on {part}, setting {hidden.name}",
                    facts={"model": str(folder), **lines(facts)},
                    scores=scores,
                    split=hidden,
                    confused=confusions(rows, held),
                )
                with writing_file(Path(html)) as written:
                    written.write_text(text, encoding="utf-8")
        return scores, held


def detect(
    data: str,
    name: str,
    *,
    parts: tuple[str, ...],
    revision: str | None = None,
    selection: Any = None,
    batch_size: int = 1,
    annotations: str | None = None,
    images: str | None = None,
    out: str | None = None,
    bad: Bad = "raise",
    overwrite: bool = False,
    device: str | None = None,
    progress: Bars,
) -> list[str]:
    """Write the detections of each part of the data folder and return the files: see `extract`. Raises
    ValueError for what is missing, and for a file that is there, without `overwrite`."""
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: at least 1")
    given: list[Part] = [
        open_part(data, part, annotations=annotations, images=images, detections=out, bad=bad)
        for part in parts
    ]
    for part in given:
        if part.detections.exists() and not overwrite:
            raise ValueError(f"{part.detections} exists: --overwrite replaces it, --out names another file")
    place = one_device(device, "hoi")
    found = Detector.open(name, given[0].annotations.table, place, revision=revision, selection=selection)
    with progress() as tell:
        for part in given:
            extract(found, part.annotations, part.images, part.detections, batch=batch_size, progress=tell)
    return [str(part.detections) for part in given]
