"""`rankfold hoi eval | predict | visualise`: what a trained model is worth, says, and shows."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from rankfold.cli_hoi import group
from rankfold.cli_hoi_options import (
    DATA,
    AnnotationFile,
    BadBoxes,
    Detections,
    DetectorName,
    Folder,
    Images,
    PartName,
    Points,
    Top,
    Workers,
)
from rankfold.cli_options import Device, Json
from rankfold.cli_session import console, print_json, say, session
from rankfold.progress import bars


@group.command("eval")
def eval_(
    folder: Folder,
    data: DATA,
    part: PartName = "test",
    points: Points = "11",
    seen_images: Annotated[
        bool, typer.Option("--seen-images", help="only the images and pairs that training saw (--part train)")
    ] = False,
    save: Annotated[str | None, typer.Option(help="keep the predictions in this .safetensors file")] = None,
    html: Annotated[
        str | None, typer.Option(help="write a page: scores, confusions, the first images")
    ] = None,
    annotations: AnnotationFile = None,
    images: Images = None,
    detections: Detections = None,
    detector: DetectorName = None,
    bad: BadBoxes = "raise",
    batch_size: Annotated[int, typer.Option(help="images at a time")] = 16,
    workers: Workers = None,
    device: Device = None,
    json_: Json = False,
) -> None:
    """mAP of the model in OUT on a part of DATA: full, rare and non-rare, seen and unseen, harmonic mean."""
    with session(json_):
        from rankfold.hoi.scoring import score
        from rankfold.hoi.tables import print_scores

        found, _ = score(
            folder,
            data,
            part=part,
            annotations=annotations,
            images=images,
            detections=detections,
            detector=detector,
            bad=bad,  # type: ignore[arg-type]
            points=points,
            seen_images=seen_images,
            save=save,
            html=html,
            batch_size=batch_size,
            workers=workers or 0,
            device=device,
            progress=lambda: bars(console),
        )
        if json_:
            print_json(found.to_json())
            return
        print_scores(found.to_json(), Console(), f"{part} of {data}")
        for file in (save, html):
            if file is not None:
                say(f"Wrote {file}")


@group.command()
def predict(
    folder: Folder,
    image: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="image files")],
    detector: DetectorName = None,
    detections: Annotated[
        str | None, typer.Option(help="a file of `hoi detect` that has these images")
    ] = None,
    top: Top = 10,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Who does what with what in each IMAGE: score, verb, object, and both boxes in pixels.

    Without --detector or --detections: by the detector that the model was trained with, or, for images of its
    data set, from the files that it was trained and scored with.
    """
    with session(json_):
        from rankfold.hoi.showing import as_json, find
        from rankfold.hoi.tables import print_triplets

        model, found = find(
            folder,
            image,
            detector=detector,
            detections=detections,
            top=top,
            device=device,
            progress=lambda: bars(console),
        )
        rows = [as_json(one, model.table, path) for path, one in zip(image, found, strict=True)]
        if json_:
            print_json({"images": rows})
            return
        print_triplets(rows, Console())


@group.command()
def visualise(
    folder: Folder,
    what: Annotated[list[str], typer.Argument(metavar="DATA|IMAGE...", help="a data folder, or image files")],
    out: Annotated[
        str, typer.Option(help=".html for a page; .png or .jpg for one image")
    ] = "interactions.html",
    part: PartName = "test",
    limit: Annotated[int, typer.Option(help="images of DATA, the first ones")] = 12,
    top: Top = 10,
    least: Annotated[float, typer.Option(help="score below which nothing is drawn")] = 0.0,
    detector: DetectorName = None,
    detections: Detections = None,
    annotations: AnnotationFile = None,
    images: Images = None,
    bad: BadBoxes = "raise",
    device: Device = None,
    json_: Json = False,
) -> None:
    """Draw boxes, pairs and verbs: of DATA beside what is annotated there, or of any IMAGE."""
    with session(json_):
        from rankfold.hoi.showing import visualise as run

        found = run(
            folder,
            what,
            out,
            part=part,
            annotations=annotations,
            images=images,
            detections=detections,
            detector=detector,
            bad=bad,  # type: ignore[arg-type]
            limit=limit,
            top=top,
            least=least,
            device=device,
            progress=lambda: bars(console),
        )
        if json_:
            print_json(found)
            return
        say(f"Wrote {out}: {found['images']} images, {found['triplets']} interactions")
