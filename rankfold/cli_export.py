"""`rankfold export`: cut a trained model to a budget without training it again (see `rankfold.cut`), or write
a classifier or an encoder as an ONNX file (see `rankfold.onnx`)."""

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
        float | None,
        typer.Option(help="fraction of the DENSE cost of the low-rank layers that is KEPT, in (0, 1]"),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(help="onnx: write the file OUT for other runtimes, uncut; takes no --budget"),
    ] = None,
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
    """Cut the low-rank layers of MODEL to a budget and write OUT: train once, deploy at any rank. Or, with
    --to onnx, write a classifier or an encoder of text as a file for other runtimes."""
    with session(json_):
        if to is not None:
            given = {"--budget": budget, "--calib": calib, "--data": data}
            _to_file(model, out, to, given, dtype, device, verify, overwrite, json_)
            return
        if budget is None:
            raise ValueError("give --budget, the fraction that is kept, or --to onnx")
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


def _to_file(
    model: str,
    out: str,
    to: str,
    given: dict[str, object],
    dtype: str | None,
    device: str | None,
    verify: bool,
    overwrite: bool,
    json_: bool,
) -> None:
    if to != "onnx":
        raise ValueError(f"--to {to!r} is not a format; choose 'onnx'")
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"--to onnx writes the model as it is: {name} belongs to a cut; export what it wrote"
            )
    from rankfold.loading import open_model
    from rankfold.onnx import check_place, export_onnx

    check_place(out, overwrite)
    done = export_onnx(
        open_model(model, dtype=dtype, device=device).model, out, check=verify, overwrite=overwrite
    )
    if json_:
        print_json({"out": str(done.path), "nbytes": done.nbytes, "difference": done.difference})
        return
    told = "not compared" if done.difference is None else f"within {done.difference:.1e} of the model"
    console.print(f"Wrote [bold]{done.path}[/bold], {done.nbytes:,} bytes, {told}.")
