"""`rankfold export`: cut a trained model to a budget without training it again (see `rankfold.cut`), or write
it for others: an ordinary checkpoint, a LoRA of PEFT (see `rankfold.export_forms`), an ONNX file (see
`rankfold.onnx`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from rankfold.cli_options import Data, Device, Dtype, Json, Model, Out, Overwrite, Unit, Verify
from rankfold.cli_session import app, console, print_json, session
from rankfold.progress import bars

FORMS = ("dense", "peft", "onnx")
CUT = ("budget", "unit", "order", "calib", "data", "batch_size", "seed")  # options of the cut alone


@app.command()
def export(
    ctx: typer.Context,
    model: Model,
    out: Out,
    budget: Annotated[
        float | None,
        typer.Option(help="fraction of the DENSE cost of the low-rank layers that is KEPT, in (0, 1]"),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            help="uncut, for others: dense (an ordinary checkpoint, adapters merged), peft (the adapters "
            "as a LoRA), onnx (the file OUT); takes no --budget"
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="with --to dense, peft: what the adapters of MODEL belong to; default: what MODEL says"
        ),
    ] = None,
    keep_trainable: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="with --to peft: parameters that trained beside the adapters (a head), repeatable; default: "
            "what MODEL says, as a folder of rankfold adapt does",
        ),
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
    --to, write MODEL for others: as an ordinary checkpoint, a LoRA, or an ONNX file."""
    with session(json_):
        _check_options(ctx, to)
        place = {"dtype": dtype, "device": device, "overwrite": overwrite}
        if to == "onnx":
            _onnx(model, out, place, verify, json_)
            return
        if to == "peft":
            _peft(model, out, base, keep_trainable or (), place, json_)
            return
        if to == "dense":
            from rankfold.export_forms import export_dense

            report, folder = export_dense(
                model, out, base=base, check=verify, progress=lambda: bars(console), **place
            )
        else:
            if budget is None:
                raise ValueError("give --budget, the fraction that is kept, or --to dense, peft or onnx")
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
                check=verify,
                progress=lambda: bars(console),
                **place,
            )
        if json_:
            print_json({"out": str(folder), **report.to_json()})
            return
        report.print(console, layers=False)
        console.print(f"\nWrote [bold]{folder}[/bold]: open {folder}/report.html.")


def _check_options(ctx: typer.Context, to: str | None) -> None:
    """Raise ValueError for an unknown form, and for options that were given and do not apply to it."""
    if to is not None and to not in FORMS:
        raise ValueError(f"--to {to!r} is not a format; choose 'dense', 'peft' or 'onnx'")
    given = [
        name
        for name in (*CUT, "base", "keep_trainable", "verify")
        if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    for name in given:
        option = f"--{name.replace('_', '-')}"
        if to is not None and name in CUT:
            raise ValueError(
                f"--to {to} writes the model as it is: {option} belongs to a cut; export what it wrote"
            )
        if name == "base" and to not in ("dense", "peft"):
            raise ValueError("--base says what adapters belong to: it goes with --to dense or --to peft")
        if name == "keep_trainable" and to != "peft":
            raise ValueError(
                "--keep-trainable names what a LoRA holds beside adapters: it goes with --to peft"
            )
        if name == "verify" and to == "peft":
            raise ValueError("--to peft writes tensors and does not reopen them; leave out --no-verify")


def _peft(
    model: str, out: str, base: str | None, keep: Sequence[str], place: dict[str, Any], json_: bool
) -> None:
    from rankfold.export_forms import export_lora

    done = export_lora(model, out, base=base, keep=keep, **place)
    if json_:
        facts = {key: getattr(done, key) for key in ("layers", "params", "nbytes", "base")}
        print_json({"out": str(done.folder), **facts})
        return
    named = f"for {done.base}" if done.base else "for a base that its config does not name (see --base)"
    console.print(
        f"Wrote [bold]{done.folder}[/bold], a LoRA on {done.layers} layers, {done.nbytes:,} bytes, {named}."
    )


def _onnx(model: str, out: str, place: dict[str, Any], verify: bool, json_: bool) -> None:
    from rankfold.loading import open_model
    from rankfold.onnx import check_place, export_onnx

    overwrite = place.pop("overwrite")
    check_place(out, overwrite)
    done = export_onnx(open_model(model, **place).model, out, check=verify, overwrite=overwrite)
    if json_:
        print_json({"out": str(done.path), "nbytes": done.nbytes, "difference": done.difference})
        return
    told = "not compared" if done.difference is None else f"within {done.difference:.1e} of the model"
    console.print(f"Wrote [bold]{done.path}[/bold], {done.nbytes:,} bytes, {told}.")
