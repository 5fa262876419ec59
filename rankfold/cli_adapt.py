"""`rankfold adapt`: what is trained on a model that exists already. For now healing; see `rankfold.heal`."""

from __future__ import annotations

from typing import Annotated

import typer

from rankfold.cli_options import Json, Model, Overwrite, Verify
from rankfold.cli_session import app, console, print_json, session
from rankfold.progress import bars


@app.command()
def adapt(
    model: Model,
    out: Annotated[str, typer.Argument(help="folder to write; a run in progress is in OUT.run")],
    heal: Annotated[
        str | None,
        typer.Option(
            metavar="ORIGINAL",
            help="recover the quality that compressing ORIGINAL to MODEL cost, keeping structure and bytes",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="text to train on, NAME[:split], repeatable, in equal shares: wikipedia:train, my.jsonl, a "
            "hub data set"
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="tokens to train on, all texts and epochs together")] = 300_000,
    validation: Annotated[
        list[str] | None,
        typer.Option(help="text to choose the best state on, repeatable; default: held out of --data"),
    ] = None,
    held_out: Annotated[float, typer.Option(help="share of documents held out of --data")] = 0.1,
    validation_tokens: Annotated[int, typer.Option(help="tokens to choose on, at most")] = 8192,
    test: Annotated[
        list[str] | None,
        typer.Option(
            help="text to judge on, NAME[:split][:NxL], repeatable; default: the test documents of packaged "
            "texts in --data"
        ),
    ] = None,
    length: Annotated[int, typer.Option(help="tokens in a window")] = 512,
    batch_size: Annotated[int, typer.Option(help="windows in a batch")] = 2,
    accumulate: Annotated[int, typer.Option(help="batches to a step")] = 1,
    lr: Annotated[float, typer.Option(help="highest learning rate; by a cosine to a tenth of it")] = 2e-4,
    warmup: Annotated[float, typer.Option(help="share of the steps in which it rises")] = 0.1,
    clip: Annotated[float, typer.Option(help="norm that gradients are clipped to, 0: not")] = 1.0,
    lm: Annotated[
        float, typer.Option(help="share of the text itself in the loss, beside what ORIGINAL says of it")
    ] = 0.0,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="train dense embeddings and the head too")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="float32, or bfloat16: autocast over float32 weights")
    ] = "float32",
    eval_every: Annotated[
        int | None, typer.Option(help="steps between validations; default: a tenth of all")
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(help="steps between checkpoints; default: a tenth of all")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the order of the text")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on, or fail; without it: go on where there is a run")
    ] = False,
    restart: Annotated[bool, typer.Option("--restart", help="throw away the run in OUT.run")] = False,
    keep_run: Annotated[
        bool, typer.Option("--keep-run", help="leave OUT.run, with its checkpoints, when all is done")
    ] = False,
    verify: Verify = True,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Train MODEL further, and write OUT, an ordinary folder. With --heal ORIGINAL: what compressing cost.

    Stopped or killed, the same command goes on from the last checkpoint, to the same bytes.
    """
    with session(json_):
        if heal is None:
            raise ValueError("what to adapt: --heal ORIGINAL, the model that MODEL was compressed from")
        if resume and restart:
            raise ValueError("--resume and --restart: one of them")
        from rankfold import heal as healing

        report, folder = healing.heal(
            model,
            out,
            original=heal,
            data=data or (),
            tokens=tokens,
            validation=validation or (),
            held_out=held_out,
            validation_tokens=validation_tokens,
            tests=test or (),
            length=length,
            batch_size=batch_size,
            accumulate=accumulate,
            lr=lr,
            warmup=warmup,
            clip=clip,
            dtype=dtype,
            lm=lm,
            embeddings=embeddings,
            eval_every=eval_every,
            save_every=save_every,
            seed=seed,
            device=device,
            restart=restart,
            resume=resume,
            keep_run=keep_run,
            check=verify,
            overwrite=overwrite,
            progress=lambda: bars(console),
            say=lambda words: console.print(words, highlight=False, markup=False),
        )
        if json_:
            print_json({"out": str(folder), **report.to_json()})
            return
        report.print(console, layers=False)
        console.print(
            f"\nWrote [bold]{folder}[/bold]: open {folder}/report.html, or `rankfold report {folder}`."
        )
