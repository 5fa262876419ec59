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
