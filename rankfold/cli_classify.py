"""`rankfold classify`: train, predict, explain, compare. Examples in, a model folder or answers out."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from rankfold.cli_classify_options import (
    SPEC,
    BatchSize,
    Best,
    Context,
    Dropout,
    Embedding,
    Epochs,
    Examples,
    Folder,
    Heads,
    HeldOut,
    K,
    LabelColumn,
    Layers,
    Length,
    Patience,
    Pooler,
    Rank,
    RankPerHead,
    Rate,
    Sharing,
    Temperature,
    TextColumn,
    Texts,
    Validation,
    Vectors,
    Vocabulary,
    Width,
    WordDropout,
    listed,
    options,
    settings,
)
from rankfold.cli_options import Device, Json, Out, Overwrite, Restart, Resume, Verify, check_resume
from rankfold.cli_session import app, console, print_json, say, session
from rankfold.progress import bars

group = typer.Typer(help="Text classification: train, predict, explain, compare.", no_args_is_help=True)
app.add_typer(group, name="classify")


@group.command()
def train(
    ctx: typer.Context,
    data: Examples,
    out: Out,
    model: Annotated[
        str,
        typer.Option(help="lama, gru, dense, linformer, lrt; minilm, a folder or a hub id to train further"),
    ] = "lama",
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    validation: Validation = None,
    held_out: HeldOut = None,
    test: Annotated[str | None, typer.Option(help="examples that are scored once, at the end")] = None,
    epochs: Epochs = None,
    lr: Rate = None,
    batch_size: BatchSize = None,
    length: Length = None,
    patience: Patience = None,
    best: Best = None,
    seed: Annotated[int, typer.Option(help="of the weights, the dropout, the order of the texts")] = 0,
    pooler: Pooler = None,
    heads: Heads = None,
    rank_per_head: RankPerHead = None,
    context: Context = None,
    temperature: Temperature = None,
    rank: Rank = None,
    k: K = None,
    sharing: Sharing = None,
    vocabulary: Vocabulary = None,
    vectors: Vectors = None,
    width: Width = None,
    layers: Layers = None,
    embedding: Embedding = None,
    dropout: Dropout = None,
    word_dropout: WordDropout = None,
    device: Device = None,
    resume: Resume = False,
    restart: Restart = False,
    verify: Verify = True,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Train a classifier on DATA and write OUT, an ordinary Hugging Face folder with classify.json.

    Stopped or killed, the same command goes on from the last checkpoint, to the same weights.
    """
    with session(json_):
        check_resume(resume, restart)
        from rankfold import classify
        from rankfold.classify.tables import print_facts

        given = options(ctx.params)
        facts, folder = classify.train(
            data,
            out,
            choice=classify.Choice(model=model, **given),
            text_column=text_column,
            label_column=label_column,
            validation=validation,
            held=held_out,
            test=test,
            **settings(ctx.params),
            seed=seed,
            device=device,
            resume=resume,
            restart=restart,
            check=verify,
            overwrite=overwrite,
            progress=lambda: bars(console),
            say=say,
        )
        if json_:
            print_json({"out": str(folder), **facts})
            return
        print_facts(facts, Console())
        say(f"\nWrote {folder}: rankfold classify predict {folder} DATA")


@group.command()
def predict(
    folder: Folder,
    data: Annotated[str | None, typer.Argument(metavar="[DATA]", help=SPEC)] = None,
    text: Texts = None,
    out: Annotated[str | None, typer.Option(help="file for the answers: .jsonl or .csv")] = None,
    text_column: TextColumn = "text",
    label_column: Annotated[
        str | None, typer.Option(help="the labels, to be scored; default: label where there is one; '': none")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="tokens that a text is cut at; default: as trained")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="texts at a time")] = 32,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Classify DATA or --text with the classifier in FOLDER; scores where DATA has labels.

    An answer a text, in order: on stdout, or in --out. A text without a word gets no label, and a reason.
    """
    with session(json_):
        from rankfold import classify
        from rankfold.classify.tables import print_predictions

        found = classify.predict(
            folder,
            data,
            texts=text or (),
            out=out,
            text_column=text_column,
            label_column=label_column,
            length=length,
            batch_size=batch_size,
            device=device,
            progress=lambda: bars(console),
            say=say,
        )
        if json_:
            print_json(found if out is None else {**found, "predictions": None, "out": out})
            return
        print_predictions(found, Console(), console, answers=out is None)


@group.command()
def explain(
    folder: Folder,
    data: Annotated[str | None, typer.Argument(metavar="[DATA]", help=SPEC)] = None,
    text: Texts = None,
    out: Annotated[str, typer.Option(help="the page to write, .html")] = "explain.html",
    limit: Annotated[int, typer.Option(min=1, help="texts on the page, the first ones of DATA")] = 50,
    text_column: TextColumn = "text",
    label_column: Annotated[
        str | None, typer.Option(help="the labels, to be shown; default: label where there is one; '': none")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="tokens that a text is cut at; default: as trained")
    ] = None,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Write a page that shows what each head of the pooler read in the texts, word by word."""
    with session(json_):
        from rankfold.classify.explaining import explain as run

        found = run(
            folder,
            data,
            texts=text or (),
            out=out,
            limit=limit,
            text_column=text_column,
            label_column=label_column,
            length=length,
            device=device,
        )
        if json_:
            print_json(found)
            return
        say(f"Wrote {out}: {found['texts']} texts, {found['heads']} heads")


@group.command()
def compare(
    ctx: typer.Context,
    data: Examples,
    out: Annotated[
        str, typer.Argument(help="folder of results.jsonl and table.md; runs that are there are kept")
    ],
    models: Annotated[
        str, typer.Option(help="names, folders or hub ids, separated by commas")
    ] = "lama,lrt,linformer,dense",
    seeds: Annotated[str, typer.Option(help="integers, separated by commas")] = "0,1,2",
    test: Annotated[
        str | None, typer.Option(help="what models are judged on; default NAME:test for NAME:train")
    ] = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    validation: Validation = None,
    held_out: HeldOut = None,
    epochs: Epochs = None,
    lr: Rate = None,
    batch_size: BatchSize = None,
    length: Length = None,
    patience: Patience = None,
    best: Best = None,
    pooler: Pooler = None,
    heads: Heads = None,
    rank_per_head: RankPerHead = None,
    context: Context = None,
    temperature: Temperature = None,
    rank: Rank = None,
    k: K = None,
    sharing: Sharing = None,
    vocabulary: Vocabulary = None,
    vectors: Vectors = None,
    width: Width = None,
    layers: Layers = None,
    embedding: Embedding = None,
    dropout: Dropout = None,
    word_dropout: WordDropout = None,
    device: Device = None,
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="leave the trained folders in OUT/models")
    ] = False,
    json_: Json = False,
) -> None:
    """Train several models with several seeds on the same splits, and print one table: accuracy, sizes, time.

    Each option of a model goes to the models that have it. Stopped, the same command goes on.
    """
    with session(json_):
        from rankfold import classify
        from rankfold.classify.comparing import table_of

        given = options(ctx.params)
        drawn = listed(seeds, "--seeds")
        if not all(item.isdecimal() for item in drawn):
            raise ValueError(f"--seeds {seeds!r}: integers of at least 0, separated by commas")
        rows = classify.compare(
            data,
            out,
            models=listed(models, "--models"),
            seeds=[int(item) for item in drawn],
            test=test,
            options=given,
            text_column=text_column,
            label_column=label_column,
            validation=validation,
            held=held_out,
            keep_models=keep_models,
            device=device,
            **settings(ctx.params),
            progress=lambda: bars(console),
            say=say,
        )
        if json_:
            print_json({"out": out, "rows": rows})
            return
        Console().print(table_of(rows))
        say(f"\nWrote {out}/results.jsonl and {out}/table.md")
