"""The command line: compress, eval, report, recipes; pretrain and export have files of their own.

Every long step shows a progress bar with the time left, on stderr. With --json, stdout carries one JSON
document and nothing else. Errors of the user's are one line and exit status 2.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from rankfold import cli_adapt, cli_classify, cli_export, cli_hoi, cli_hoi_use, cli_pretrain
from rankfold.cli_options import (
    Data,
    Device,
    Dtype,
    Json,
    Model,
    Out,
    Overwrite,
    Skip,
    Targets,
    Unit,
    Verify,
)
from rankfold.cli_session import app, console, print_json, session
from rankfold.progress import bars

__all__ = [
    "app",
    "cli_adapt",
    "cli_classify",
    "cli_export",
    "cli_hoi",
    "cli_hoi_use",
    "cli_pretrain",
    "main",
]  # importing those registers commands


@app.command()
def compress(
    model: Model,
    out: Out,
    recipe: Annotated[
        str, typer.Option(help="a name from `rankfold recipes`, a recipe's JSON file, or a compressed folder")
    ] = "best",
    budget: Annotated[
        float, typer.Option(help="fraction of the selected layers' cost that is KEPT, in (0, 1]")
    ] = 0.8,
    unit: Unit = "nbytes",
    calib: Annotated[
        str | None, typer.Option(help="calibration text, NAME[:split][:NxL]; default wikipedia:train:64x512")
    ] = None,
    targets: Targets = None,
    skip: Skip = None,
    metrics: Annotated[
        str | None, typer.Option(help="file to keep the calibration in, and to reuse it from")
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(help="folder for fits as they are made: a stopped run goes on there"),
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="values of sparse codes: float, bf14 (14 bits) or int8")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="sequences in a calibration batch; lower it when memory runs out")
    ] = 4,
    seed: Annotated[
        int, typer.Option(help="draws the calibration windows, and labels where a recipe samples them")
    ] = 0,
    dtype: Dtype = None,
    device: Device = None,
    data: Data = None,
    evaluate: Annotated[
        bool, typer.Option(help="measure quality and speed before and after, on --data")
    ] = True,
    verify: Verify = True,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Factorize MODEL to a budget and write OUT, an ordinary Hugging Face folder with a report page."""
    with session(json_):
        from rankfold import journey

        report, folder = journey.compress(
            model,
            out,
            recipe=recipe,
            budget=budget,
            unit=unit,
            calib=calib,
            targets=targets or None,
            skip=skip or (),
            metrics_file=metrics,
            keep=keep,
            storage=storage,
            batch_size=batch_size,
            seed=seed,
            dtype=dtype,
            device=device,
            data=data,
            evaluate=evaluate,
            check=verify,
            overwrite=overwrite,
            progress=lambda: bars(console),
        )
        if json_:
            print_json({"out": str(folder), **report.to_json()})
            return
        report.print(console, layers=False)
        console.print(
            f"\nWrote [bold]{folder}[/bold]: open {folder}/report.html, or `rankfold report {folder}`."
        )
        console.print(
            f'Load it: AutoModel…from_pretrained("{folder}"), with rankfold installed and no import of it.'
        )


@app.command("eval")
def eval_(
    model: Model,
    against: Annotated[
        str | None, typer.Option(help="a second model to compare with: the dense original")
    ] = None,
    data: Data = None,
    dtype: Dtype = None,
    device: Device = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    latency: Annotated[
        bool, typer.Option(help="with --against: prefill and decode time of both, interleaved")
    ] = True,
    json_: Json = False,
) -> None:
    """Perplexity (or accuracy) of MODEL, its size, and with --against the divergence and speed ratio."""
    with session(json_):
        from rankfold import judge

        result = judge.evaluate(
            model,
            against,
            data=data,
            dtype=dtype,
            device=device,
            batch_size=batch_size,
            timed=latency,
            progress=lambda: bars(console),
        )
        if json_:
            print_json(result)
        else:
            judge.print_evaluation(result, Console())


@app.command()
def report(
    out: Annotated[str, typer.Argument(help="a folder that `compress` wrote, or its rankfold_report.json")],
    other: Annotated[str | None, typer.Argument(help="a second one: prints the difference")] = None,
    html: Annotated[str | None, typer.Option(help="write the report page to this file")] = None,
    json_: Json = False,
) -> None:
    """Print the report of OUT, layer by layer; with two, what differs."""
    with session(json_):
        from pathlib import Path

        from rankfold.atomic import writing_file
        from rankfold.report import Report

        first = Report.load(out)
        if html:
            with writing_file(Path(html)) as beside:
                beside.write_text(first.to_html(), encoding="utf-8")
            console.print(f"Wrote {html}")
        if other is not None:
            second = Report.load(other)
            if json_:
                print_json(first.differences(second))
            else:
                Console().print(first.diff(second))
        elif json_:
            print_json(first.to_json())
        elif not html:
            first.print(Console())


@app.command()
def recipes(json_: Json = False) -> None:
    """List the recipes: ours, and those of installed packages."""
    with session(json_):
        from rich.table import Table

        from rankfold import recipes as known

        items = known.available()
        if json_:
            print_json({name: {**item.to_json(), "summary": item.summary} for name, item in items.items()})
            return
        table = Table(box=None, pad_edge=False)
        for heading in ("recipe", "method", "metric", "allocator", "data", "paper", ""):
            table.add_column(heading, no_wrap=heading == "recipe")
        for name, item in sorted(items.items()):
            body = item.to_json()
            need = "yes" if item.metric.needs_data else "no"
            table.add_row(
                name,
                body["method"]["kind"],
                body["metric"]["kind"],
                body["allocate"],
                need,
                item.paper,
                item.summary,
            )
        Console().print(table)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
