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
