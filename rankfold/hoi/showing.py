"""What a trained model finds in any image, as triplets or as a picture: `rankfold hoi predict`, `visualise`.

Detections come from a detector, from a file that is named, or, for an image that the model was trained or
scored on, from the files that hoi.json names. A model that was trained on a detector's output uses that one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rankfold.atomic import writing_file
from rankfold.hoi.annotations import Bad, Scene
from rankfold.hoi.classes import ClassTable
from rankfold.hoi.evaluation import Predicted
from rankfold.hoi.facts import read_facts, split_of
from rankfold.hoi.folder import open_part
from rankfold.hoi.loader import HoiDataset, open_image
from rankfold.hoi.model import HolaModel
from rankfold.hoi.predict import open_model, pixels_of, predict, predictions, upright
from rankfold.hoi.sources import check_queries, looking, opened, source_of
from rankfold.hoi.visualise import draw
from rankfold.hoi.visualise_page import Shown, page
from rankfold.judge import Bars
from rankfold.loading import one_device

SHOWN = 6  # images of a part on the page of a training
PICTURES = (".png", ".jpg", ".jpeg")


def find(
    folder: str,
    images: Sequence[str],
    *,
    detector: str | None = None,
    detections: str | None = None,
    top: int = 10,
    device: str | None = None,
    progress: Bars,
) -> tuple[HolaModel, list[Predicted]]:
    """The model in `folder`, and the `top` best triplets of each image file. Raises ValueError for an image
    that is missing or none, before the model runs."""
    if top < 1:
        raise ValueError(f"--top {top}: at least 1")
    for path in images:
        if not Path(path).is_file():
            raise ValueError(f"no image {path}")
    place = one_device(device, "hoi")
    facts = read_facts(folder)
    model = open_model(folder, place)
    source = source_of(facts, model.table, place, detector=detector, detections=detections)
    with progress() as tell:
        return model, predict(model, images, source, top=top, tell=tell)


def visualise(
    folder: str,
    what: Sequence[str],
    out: str,
    *,
    part: str = "test",
    annotations: str | None = None,
    images: str | None = None,
    detections: str | None = None,
    detector: str | None = None,
    bad: Bad = "raise",
    limit: int = 12,
    top: int = 10,
    least: float = 0.0,
    device: str | None = None,
    progress: Bars,
) -> dict[str, Any]:
    """Draw what the model in `folder` finds and write it to `out`; returns how many images and triplets.

    what   image files, or one data folder: then the first `limit` images of its part with what is annotated
    out    .html for a page; .png or .jpg for one image alone
    top    triplets drawn into an image, the best ones with a score of at least `least`

    Raises ValueError for other names of `out`, several images for a picture, and what is not there.
    """
    whole = len(what) == 1 and Path(what[0]).is_dir()
    kind = Path(out).suffix.lower()
    if kind not in (".html", *PICTURES):
        raise ValueError(f"--out {out}: a page, .html, or one picture, {' or '.join(PICTURES)}")
    if kind != ".html" and (whole or len(what) > 1):
        raise ValueError(f"--out {out}: a picture holds one image; name a page, .html")
    if limit < 1 or not 0 <= least <= 1:
        raise ValueError(f"--limit {limit} and --least {least}: at least 1, and from 0 to 1")
    if whole:
        model, pairs = _part(
            folder,
            what[0],
            part,
            {"annotations": annotations, "images": images, "detections": detections, "bad": bad},
            detector=detector,
            limit=limit,
            top=top,
            device=device,
            progress=progress,
        )
    else:
        model, found = find(
            folder,
            what,
            detector=detector,
            detections=detections,
            top=top,
            device=device,
            progress=progress,
        )
        pairs = [(path, row, None) for path, row in zip(what, found, strict=True)]
    if kind == ".html":
        split = split_of(read_facts(folder), model.table)
        shown = (Shown(upright(path) if t is None else open_image(path), row, t) for path, row, t in pairs)
        facts = {"model": str(folder), "images of": ", ".join(what[:3])}
        text = page(shown, model.table, title="Interactions", facts=facts, split=split, top=top, least=least)
        with writing_file(Path(out)) as beside:
            beside.write_text(text, encoding="utf-8")
    else:
        [(path, row, _)] = pairs
        picture = draw(upright(path), row, model.table, top=top, least=least)
        with writing_file(Path(out)) as beside:
            picture.save(beside, {".png": "PNG"}.get(kind, "JPEG"))
    return {"out": out, "images": len(pairs), "triplets": sum(len(row) for _, row, _ in pairs)}


def _part(
    folder: str,
    data: str,
    part: str,
    places: dict[str, Any],
    *,
    detector: str | None,
    limit: int,
    top: int,
    device: str | None,
    progress: Bars,
) -> tuple[HolaModel, list[tuple[str, Predicted, Scene | None]]]:
    place = one_device(device, "hoi")
    model = open_model(folder, place)
    given = open_part(data, part, table=model.table, **places)
    source = opened(given, looking(detector, model.table, place))
    check_queries(source, model.config.query_width)
    few = replace(given.annotations, scenes=given.annotations.scenes[:limit])
    data_set = HoiDataset(few, given.images, source, pixels_of(model))
    with progress() as tell:
        found = list(predictions(model, data_set, top=top, tell=tell))
    return model, [
        (str(given.images / scene.filename), row, scene) for scene, row in zip(few.scenes, found, strict=True)
    ]


def as_json(found: Predicted, table: ClassTable, path: str) -> dict[str, Any]:
    """The triplets of one image: names and ids, boxes in pixels, scores; the best first."""
    rows = zip(
        found.interactions.tolist(),
        found.scores.tolist(),
        found.boxes_h.tolist(),
        found.boxes_o.tolist(),
        strict=True,
    )
    triplets = [
        {
            "interaction": i,
            "verb": table.verbs[table.interactions[i][0]],
            "object": table.objects[table.interactions[i][1]],
            "score": score,
            "human": human,
            "thing": thing,
        }
        for i, score, human, thing in rows
    ]
    return {"image": path, "triplets": triplets}


def first(rows: Iterable[Predicted], kept: list[Predicted], most: int = SHOWN) -> Iterator[Predicted]:
    """`rows`, the first `most` of which are put into `kept`."""
    for row in rows:
        if len(kept) < most:
            kept.append(row)
        yield row


def shown_of(data: HoiDataset, found: Predicted) -> Shown:
    """A prediction with its image and what is annotated in it."""
    scene = next(scene for scene in data.annotations.scenes if scene.filename == found.filename)
    return Shown(open_image(data.images / found.filename), found, scene)
