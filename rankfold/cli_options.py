"""The arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="hub id, folder, .gguf file, or the packaged 'smollm2'")]
Json = Annotated[bool, typer.Option("--json", help="print machine-readable JSON on stdout, and nothing else")]
Data = Annotated[
    str | None,
    typer.Option(
        help="text to evaluate on: NAME[:split][:NxL], e.g. wikipedia:test:12x512, notes.txt, a hub data set"
    ),
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; default: the checkpoint's own")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; default: cuda where there is one")]
Out = Annotated[str, typer.Argument(help="folder to write; refused if it exists and is not empty")]
Unit = Annotated[str, typer.Option(help="what the budget counts: nbytes, params or macs")]
Targets = Annotated[
    list[str] | None,
    typer.Option(help="glob of layer names, repeatable; default: all but embeddings, heads"),
]
Skip = Annotated[list[str] | None, typer.Option(help="glob of layer names to leave as they are, repeatable")]
Verify = Annotated[bool, typer.Option(help="reload what was written and compare it bit for bit")]
Overwrite = Annotated[
    bool, typer.Option(help="replace OUT if it is not empty (only when everything has succeeded)")
]

# Of commands that train.
Resume = Annotated[
    bool, typer.Option("--resume", help="go on, or fail; without it: go on where there is a run")
]
Restart = Annotated[bool, typer.Option("--restart", help="throw away the run in OUT.run")]
KeepRun = Annotated[
    bool, typer.Option("--keep-run", help="leave OUT.run, with its checkpoints, when all is done")
]
Precision = Annotated[str, typer.Option(help="float32, or bfloat16: autocast over float32 weights")]
EvalEvery = Annotated[int | None, typer.Option(help="steps between validations; default: a tenth of all")]
SaveEvery = Annotated[int | None, typer.Option(help="steps between checkpoints; default: a tenth of all")]
OutOfRun = Annotated[str, typer.Argument(help="folder to write; a run in progress is in OUT.run")]
Warmup = Annotated[float, typer.Option(help="share of the steps in which it rises")]


def rank_of(text: str | None) -> int | float | None:
    """The value of a --rank that may be a share. Raises ValueError for what is no number."""
    try:
        return text if text is None else float(text) if "." in text else int(text)
    except ValueError as error:
        raise ValueError(
            f"--rank {text!r}: an integer such as 128, or a share of break-even such as 0.25"
        ) from error


def check_resume(resume: bool, restart: bool) -> None:
    """Raise ValueError where both are asked for."""
    if resume and restart:
        raise ValueError("--resume and --restart: one of them")
