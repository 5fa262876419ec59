"""`rankfold hoi synthetic | detect | train`: data, detections, a model. See also `rankfold.cli_hoi_use`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from rankfold.cli_hoi_options import (
    DATA,
    AnnotationFile,
    BadBoxes,
    Detections,
    DetectorName,
    Images,
    Points,
    Workers,
    training_options,
)
from rankfold.cli_options import (
    Device,
    Json,
    KeepRun,
    Out,
    OutOfRun,
    Overwrite,
    Restart,
    Resume,
    Verify,
    check_resume,
)
from rankfold.cli_session import app, console, print_json, say, session
from rankfold.progress import bars

group = typer.Typer(
    help="Human-object interactions in images: drawn data, detect, train, eval, predict, visualise.",
    no_args_is_help=True,
)
app.add_typer(group, name="hoi")


@group.command()
def synthetic(
    data: Out,
    images: Annotated[int, typer.Option(help="of the training part")] = 1000,
    test_images: Annotated[int, typer.Option(help="of the test part")] = 500,
    size: Annotated[str, typer.Option(help="width and height of an image in pixels")] = "160x120",
    pairs: Annotated[int, typer.Option(help="of an image, at most")] = 3,
    noise: Annotated[float, typer.Option(help="of the geometry; verbs differ by about 1")] = 0.15,
    jitter: Annotated[float, typer.Option(help="of the detected boxes, in their sides")] = 0.02,
    classes: Annotated[
        str | None, typer.Option(help="a HICO-DET annotation file; default: those of the package consnet")
    ] = None,
    text: Annotated[
        str, typer.Option(help="encoder of the classes' texts, or a .safetensors file of features")
    ] = "minilm",
    seed: Annotated[int, typer.Option(help="draws everything")] = 0,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Draw a data set in HICO-DET's format, whose geometry tells the verb, into the folder OUT."""
    with session(json_):
        from rankfold.hoi.making import synthetic as run
        from rankfold.hoi.synthetic import Options

        wide, cross, high = size.partition("x")
        if not (cross and wide.isdecimal() and high.isdecimal()):
            raise ValueError(f"--size {size!r}: WIDTHxHEIGHT, such as 160x120")
        options = Options(size=(int(wide), int(high)), most=pairs, noise=noise, jitter=jitter)
        found = run(
            data,
            images=images,
            test_images=test_images,
            seed=seed,
            options=options,
            classes=classes,
            text=text,
            overwrite=overwrite,
            progress=lambda: bars(console),
            say=say,
        )
        if json_:
            print_json(found)
            return
        say(
            f"Wrote {data}: {images} and {test_images} images, {found['interactions']} interactions of "
            f"{found['verbs']} verbs and {found['objects']} objects; rankfold hoi train {data} OUT"
        )


@group.command()
def detect(
    data: DATA,
    detector: Annotated[str, typer.Option(help="folder or hub id of a DETR")] = "facebook/detr-resnet-50",
    revision: Annotated[str | None, typer.Option(help="of a hub id, such as no_timm")] = None,
    part: Annotated[str | None, typer.Option(help="train or test; default: both")] = None,
    score: Annotated[float, typer.Option(help="detections that score less are left out …")] = 0.2,
    least: Annotated[int, typer.Option(help="… but so many humans and others are kept")] = 3,
    most: Annotated[int, typer.Option(help="and no more than so many of each")] = 15,
    annotations: AnnotationFile = None,
    images: Images = None,
    out: Annotated[str | None, typer.Option(help="instead of DATA/detections_PART.safetensors")] = None,
    bad: BadBoxes = "raise",
    batch_size: Annotated[int, typer.Option(help="images at a time")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a file that is there")] = False,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Run a detector over the images of DATA once, and keep what it found and its query vectors."""
    with session(json_):
        from rankfold.hoi.detections import Selection
        from rankfold.hoi.folder import PARTS
        from rankfold.hoi.scoring import detect as run

        if part is None and (out or annotations or images):
            raise ValueError("--out, --annotations, --images: of one part; name it with --part")
        files = run(
            data,
            detector,
            parts=PARTS if part is None else (part,),
            revision=revision,
            selection=Selection(score=score, least=least, most=most),
            batch_size=batch_size,
            annotations=annotations,
            images=images,
            out=out,
            bad=bad,  # type: ignore[arg-type]
            overwrite=overwrite,
            device=device,
            progress=lambda: bars(console),
        )
        if json_:
            print_json({"files": files})
            return
        say(f"Wrote {', '.join(files)}")


@group.command()
def train(
    data: DATA,
    out: OutOfRun,
    setting: Annotated[
        str | None, typer.Option(help="what is hidden: none (default), UV, UO, RF-UC, NF-UC, or your own")
    ] = None,
    unseen: Annotated[
        str | None, typer.Option(help="JSON file of hidden interaction ids; RF-UC and NF-UC need one")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="JSON file of these options; default: DATA/settings.json, if there is one"),
    ] = None,
    vision: Annotated[
        str | None, typer.Option(help="small (random weights, default), or folder or hub id of a CLIP model")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="features (.safetensors) or an encoder; default: DATA/text.safetensors, else --vision"
        ),
    ] = None,
    descriptions: Annotated[
        str | None, typer.Option(help="JSON file of texts about the classes, for the encoder")
    ] = None,
    upstream: Annotated[
        bool | None,
        typer.Option("--upstream/--described", help="the public code where it departs from its description"),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of the model, such as rank=24; repeatable")
    ] = None,
    weight: Annotated[
        list[str] | None, typer.Option(help="TERM=NUMBER of the loss, such as sem=0; repeatable")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="default 12")] = None,
    lr: Annotated[float | None, typer.Option(help="default 1e-3")] = None,
    batch_size: Annotated[int | None, typer.Option(help="images in a batch; default 16")] = None,
    accumulate: Annotated[int | None, typer.Option(help="batches in a step; default 1")] = None,
    drop: Annotated[
        int | None, typer.Option(help="epochs after which the rate is a tenth; default 10, 0: never")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="of AdamW; default 1e-4")] = None,
    clip: Annotated[float | None, typer.Option(help="norm of the gradients; default 0.1, 0: not")] = None,
    seed: Annotated[int | None, typer.Option(help="of weights, dropout, order; default 66")] = None,
    workers: Workers = None,
    annotations: AnnotationFile = None,
    images: Images = None,
    detections: Detections = None,
    detector: DetectorName = None,
    bad: BadBoxes = "raise",
    evaluate: Annotated[bool, typer.Option(help="score the test part at the end, if DATA has one")] = True,
    points: Points = "11",
    device: Device = None,
    resume: Resume = False,
    restart: Restart = False,
    keep_run: KeepRun = False,
    verify: Verify = True,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Train on DATA and write OUT: the model, its texts, hoi.json and a page.

    Stopped or killed, the same command goes on from the last checkpoint, to the same weights.
    """
    with session(json_):
        check_resume(resume, restart)
        from rankfold.hoi.build import Choice
        from rankfold.hoi.making import settings_file
        from rankfold.hoi.train import train as run

        given = {
            "setting": setting,
            "unseen": unseen,
            "vision": vision,
            "text": text,
            "descriptions": descriptions,
            "upstream": upstream,
            "set": set_,
            "weights": weight,
            "epochs": epochs,
            "lr": lr,
            "batch_size": batch_size,
            "accumulate": accumulate,
            "drop": drop,
            "weight_decay": weight_decay,
            "clip": clip,
            "seed": seed,
            "workers": workers,
        }
        file = settings_file(data, config)
        held = training_options(file, given)
        if file is not None:
            say(f"options of {file}")
        model: dict[str, Any] = {
            name: held.pop(name) for name in ("vision", "text", "descriptions", "upstream") if name in held
        }
        facts, folder = run(
            data,
            out,
            choice=Choice(settings=held.pop("set"), **model),
            **held,
            annotations=annotations,
            images=images,
            detections=detections,
            detector=detector,
            bad=bad,  # type: ignore[arg-type]
            score=evaluate,
            points=points,
            device=device,
            resume=resume,
            restart=restart,
            keep_run=keep_run,
            check=verify,
            overwrite=overwrite,
            progress=lambda: bars(console),
            say=say,
        )
        if json_:
            print_json({"out": str(folder), **facts})
            return
        from rankfold.hoi.tables import print_facts

        print_facts(facts, Console())
        say(f"\nWrote {folder}: open {folder}/report.html, or rankfold hoi eval {folder} {data}")
