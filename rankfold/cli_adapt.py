"""`rankfold adapt`: what is trained on a model that exists already: adapters (`rankfold.adapt`), or with
--heal what compressing cost (`rankfold.heal`)."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from rankfold.cli_adapt_options import (
    AdapterOnly,
    Alpha,
    AsLora,
    Augment,
    Coefficients,
    Core,
    Epochs,
    ImageColumn,
    ImageSize,
    Init,
    Keep,
    LabelColumn,
    Levels,
    Mean,
    Merge,
    NewHead,
    Patience,
    PerClass,
    Rank,
    Recipe,
    Scale,
    Std,
    Steps,
    TextColumn,
    Wavelet,
    Workers,
    check_alone,
    of_recipe,
)
from rankfold.cli_options import (
    Device,
    EvalEvery,
    Json,
    KeepRun,
    Model,
    OutOfRun,
    Overwrite,
    Precision,
    Restart,
    Resume,
    SaveEvery,
    Skip,
    Targets,
    Verify,
    Warmup,
    check_resume,
)
from rankfold.cli_session import app, console, print_json, session
from rankfold.progress import bars


@app.command()
def adapt(
    ctx: typer.Context,
    model: Model,
    out: OutOfRun,
    recipe: Recipe = None,
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
            help="what to train on, NAME[:split], repeatable, in equal shares: wikipedia:train, my.jsonl, a "
            "hub data set; chats; for a classifier one labelled set: movie:train, my.csv, fashion:train, a "
            "folder of class folders of images"
        ),
    ] = None,
    rank: Rank = None,
    alpha: Alpha = None,
    wavelet: Wavelet = None,
    levels: Levels = None,
    init: Init = None,
    coefficients: Coefficients = None,
    scale: Scale = None,
    core: Core = None,
    targets: Targets = None,
    skip: Skip = None,
    keep_trainable: Keep = None,
    epochs: Epochs = None,
    steps: Steps = None,
    tokens: Annotated[
        int | None, typer.Option(help="tokens to train on, all texts and epochs together; default 300000")
    ] = None,
    validation: Annotated[
        list[str] | None,
        typer.Option(help="text to choose the best state on, repeatable; default: held out of --data"),
    ] = None,
    held_out: Annotated[
        float, typer.Option(help="share of documents, of each class, held out of --data")
    ] = 0.1,
    validation_tokens: Annotated[
        int | None, typer.Option(help="tokens to choose on, at most; default 8192")
    ] = None,
    test: Annotated[
        list[str] | None,
        typer.Option(
            help="text to judge on, NAME[:split][:NxL], repeatable; default: the test documents of packaged "
            "texts in --data"
        ),
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="tokens in a window; default 512, or 128 of a labelled text")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="windows in a batch; default 2, or 32 labelled texts or images")
    ] = None,
    accumulate: Annotated[int | None, typer.Option(help="batches to a step; default 1")] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="highest learning rate; by a cosine to a tenth of it. Default 5e-4, full 5e-5, probe 2e-3, "
            "--heal 2e-4"
        ),
    ] = None,
    warmup: Warmup = 0.1,
    clip: Annotated[float, typer.Option(help="norm that gradients are clipped to, 0: not")] = 1.0,
    lm: Annotated[
        float, typer.Option(help="share of the text itself in the loss, beside what ORIGINAL says of it")
    ] = 0.0,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="train dense embeddings and the head too")
    ] = False,
    dtype: Precision = "float32",
    eval_every: EvalEvery = None,
    save_every: SaveEvery = None,
    patience: Patience = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    image_column: ImageColumn = None,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    augment: Augment = None,
    per_class: PerClass = None,
    new_head: NewHead = False,
    workers: Workers = None,
    seed: Annotated[int, typer.Option(help="of the order of the text, and of what is drawn")] = 0,
    device: Device = None,
    merge: Merge = False,
    adapter_only: AdapterOnly = False,
    as_lora: AsLora = False,
    resume: Resume = False,
    restart: Restart = False,
    keep_run: KeepRun = False,
    verify: Verify = True,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Fine-tune MODEL with an adapter (--recipe), or win back what compressing it cost (--heal ORIGINAL).

    Stopped or killed, the same command goes on from the last checkpoint, to the same bytes.
    """
    with session(json_):
        check_alone(ctx.params)
        check_resume(resume, restart)
        if heal is None:
            _recipe(model, out, json_, of_recipe(ctx.params))
            return
        from rankfold import heal as healing

        report, folder = healing.heal(
            model,
            out,
            original=heal,
            data=data or (),
            tokens=300_000 if tokens is None else tokens,
            validation=validation or (),
            held_out=held_out,
            validation_tokens=8192 if validation_tokens is None else validation_tokens,
            tests=test or (),
            length=512 if length is None else length,
            batch_size=2 if batch_size is None else batch_size,
            accumulate=1 if accumulate is None else accumulate,
            lr=healing.LR if lr is None else lr,
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


def _recipe(model: str, out: str, json_: bool, options: dict[str, Any]) -> None:
    from rankfold.adapt import adapt as run
    from rankfold.adapt.tables import print_facts

    facts, folder = run(
        model,
        out,
        progress=lambda: bars(console),
        say=lambda words: console.print(words, highlight=False, markup=False),
        **options,
    )
    if json_:
        print_json({"out": str(folder), **facts})
        return
    print_facts(facts, Console())
    console.print(f"\nWrote [bold]{folder}[/bold]: open {folder}/report.html.")
