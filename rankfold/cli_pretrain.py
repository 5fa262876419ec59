"""`rankfold pretrain`: train a model that is small from its first step; see `rankfold.pretrain`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rankfold.cli_options import (
    Device,
    EvalEvery,
    Json,
    KeepRun,
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
    rank_of,
)
from rankfold.cli_session import app, console, print_json, session
from rankfold.progress import bars


@app.command()
def pretrain(
    model: Annotated[
        str,
        typer.Argument(
            help="folder, hub id, config.json or packaged 'smollm2', of which only the sizes are taken"
        ),
    ],
    out: OutOfRun,
    recipe: Annotated[
        str,
        typer.Option(help="dense, low_rank, sltrain, lrt, maestro or trp; or a recipe's JSON file"),
    ] = "sltrain",
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="text, NAME[:split], repeatable: wikipedia, my.jsonl, allenai/c4:en/train (streamed)"
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="steps of the optimizer; or --tokens")] = None,
    tokens: Annotated[int | None, typer.Option(help="tokens to train on, all epochs together")] = None,
    # the recipe's own
    rank: Annotated[
        str | None,
        typer.Option(help="rank of every layer, or a share of break-even between 0 and 1, e.g. 0.25"),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="sltrain: share of entries that the sparse term has")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="scale of the product, alpha / rank")] = None,
    init: Annotated[str | None, typer.Option(help="zero, torch, variance_preserving or svd_of_dense")] = None,
    penalty: Annotated[
        float | None, typer.Option(help="maestro: its group lasso; trp: its nuclear norm")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="trp: share of a layer's energy that a truncation may drop")
    ] = None,
    every: Annotated[
        int | None, typer.Option(help="maestro, trp: steps between two shrinkings or truncations")
    ] = None,
    nested: Annotated[
        bool, typer.Option("--nested", help="maestro: keep every layer a product, for `rankfold export`")
    ] = False,
    targets: Targets = None,
    skip: Skip = None,
    # the model and its text
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE of the configuration, repeatable, e.g. hidden_size=256"),
    ] = None,
    train_tokenizer: Annotated[
        int | None,
        typer.Option(metavar="SIZE", help="train a byte-level BPE of SIZE entries on the training text"),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="folder or hub id of a tokenizer; default: MODEL's own")
    ] = None,
    length: Annotated[int, typer.Option(help="tokens in a window")] = 256,
    validation: Annotated[
        list[str] | None,
        typer.Option(help="text to validate on, repeatable; default: documents held out of --data"),
    ] = None,
    held_out: Annotated[
        float, typer.Option(help="share of documents held out, of a text that is not packaged")
    ] = 0.05,
    validation_tokens: Annotated[int, typer.Option(help="tokens to validate on, at most")] = 131_072,
    # the training
    batch_size: Annotated[int, typer.Option(help="windows in a batch, of each process")] = 16,
    accumulate: Annotated[int, typer.Option(help="batches to a step")] = 1,
    lr: Annotated[float, typer.Option(help="highest learning rate; by a cosine to a tenth of it")] = 1e-3,
    warmup: Warmup = 0.1,
    weight_decay: Annotated[float, typer.Option(help="of matrices; of factors it is not that of W")] = 0.0,
    clip: Annotated[
        float | None, typer.Option(help="norm that gradients are clipped to, 0: not; default 1")
    ] = None,
    dtype: Precision = "float32",
    optimizer: Annotated[str, typer.Option(help="adamw, or adamw_8bit (torchao)")] = "adamw",
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="step in the backward pass: gradients of one layer at a time")
    ] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="recompute activations: memory for time")
    ] = False,
    seed: Annotated[int, typer.Option(help="of the weights, the places, and the order of the text")] = 0,
    device: Device = None,
    # the run
    eval_every: EvalEvery = None,
    save_every: SaveEvery = None,
    resume: Resume = False,
    restart: Restart = False,
    keep_run: KeepRun = False,
    verify: Verify = True,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Train a language model from scratch, small from its first step, and write OUT, an ordinary folder.

    Stopped or killed, the same command goes on from the last checkpoint, to the same losses.
    """
    with session(json_):
        check_resume(resume, restart)
        from rankfold.pretrain import pretrain as run

        first = is_first()
        console.quiet = console.quiet or not first
        options: dict[str, Any] = {
            "rank": rank_of(rank),
            "sparsity": sparsity,
            "alpha": alpha,
            "init": init,
            "penalty": penalty,
            "energy": energy,
            "every": every,
            "nested": nested or None,
        }
        report, folder = run(
            model,
            out,
            recipe=recipe,
            options=options,
            data=data or (),
            validation=validation or (),
            held_out=held_out,
            validation_tokens=validation_tokens,
            tokenizer=tokenizer,
            train_bpe=train_tokenizer,
            sets=set_ or (),
            targets=targets or None,
            skip=skip or (),
            steps=steps,
            tokens=tokens,
            length=length,
            batch_size=batch_size,
            accumulate=accumulate,
            lr=lr,
            warmup=warmup,
            weight_decay=weight_decay,
            clip=clip,
            dtype=dtype,
            optimizer=optimizer,
            per_layer=per_layer,
            gradient_checkpointing=gradient_checkpointing,
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
        if report is None:
            return
        if json_:
            print_json({"out": str(folder), **report.to_json()})
            return
        report.print(console, layers=False)
        console.print(
            f"\nWrote [bold]{folder}[/bold]: open {folder}/report.html, or `rankfold report {folder}`."
        )
        console.print(
            f'Load it: AutoModelForCausalLM.from_pretrained("{folder}"), with rankfold installed and no '
            "import of it."
        )


def is_first() -> bool:
    """Whether this is the first of torchrun's processes, or the only one: it alone speaks."""
    import os

    return os.environ.get("RANK", "0") == "0"
