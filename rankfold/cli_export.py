"""`rankfold export`: cut a trained model to a budget without training it again; see `rankfold.cut`."""

from __future__ import annotations

from typing import Annotated

import typer

from rankfold.cli_options import Data, Device, Dtype, Json, Model, Out, Overwrite, Unit, Verify
from rankfold.cli_session import app, console, print_json, session
from rankfold.progress import bars


@app.command()
def export(
    model: Model,
    out: Out,
    budget: Annotated[
        float, typer.Option(help="fraction of the DENSE cost of the low-rank layers that is KEPT, in (0, 1]")
    ],
    unit: Unit = "nbytes",
    order: Annotated[
        str,
        typer.Option(help="prefix: components as trained (maestro --nested); svd: sorted first, any other"),
    ] = "prefix",
    calib: Annotated[
        str | None,
        typer.Option(
            help="training text, NAME[:split][:NxL]: ranks by what the loss is worth; else by energy"
        ),
    ] = None,
    data: Data = None,
    batch_size: Annotated[int, typer.Option(min=1, help="sequences in a batch")] = 4,
    seed: Annotated[int, typer.Option(help="draws the windows of --calib")] = 0,
    dtype: Dtype = None,
    device: Device = None,
    verify: Verify = True,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Cut the low-rank layers of MODEL to a budget and write OUT: train once, deploy at any rank."""
    with session(json_):
        from rankfold.export import export as run

        report, folder = run(
            model,
            out,
            budget=budget,
            unit=unit,
            order=order,
            calib=calib,
            data=data,
            batch_size=batch_size,
            seed=seed,
            dtype=dtype,
            device=device,
            check=verify,
            overwrite=overwrite,
            progress=lambda: bars(console),
        )
        if json_:
            print_json({"out": str(folder), **report.to_json()})
            return
        report.print(console, layers=False)
        console.print(f"\nWrote [bold]{folder}[/bold]: open {folder}/report.html.")
