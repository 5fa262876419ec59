"""The app, its console, and what every command runs in: quiet libraries, errors in one line, JSON alone."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

app = typer.Typer(
    help="Factorized weights: compress a model, reload it anywhere, see what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True)


def say(words: str) -> None:
    """A line on stderr, as it is: no markup, no colours, no breaks of ours."""
    console.print(words, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def session(quiet: bool) -> Iterator[None]:
    """Libraries quiet, progress on stderr, and one line for an error of the user's."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    console.quiet = quiet and not sys.stderr.isatty()
    try:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        yield
    except (ValueError, FileExistsError, OSError, MemoryError) as error:
        fail(str(error) or type(error).__name__, quiet, 2)
    except KeyboardInterrupt as error:
        fail(str(error) or "interrupted; nothing was written", quiet, 130)
    except RuntimeError as error:
        from rankfold.metric import DecompositionError

        if isinstance(error, DecompositionError):
            fail(str(error), quiet, 2)
        if "out of memory" not in str(error).lower() and "alloc" not in str(error).lower():
            raise
        fail(
            f"out of memory: {error}. Lower --batch-size, shorten the windows (NxL of --calib, --length), or "
            "use --dtype bfloat16",
            quiet,
            2,
        )


def fail(message: str, quiet: bool, status: int) -> None:
    if quiet:
        print_json({"error": message})
    sys.stderr.write(f"rankfold: {message}\n")
    raise typer.Exit(status)


def print_json(body: Any) -> None:
    from rankfold.report import encode

    sys.stdout.write(json.dumps(encode(body, "result"), indent=2, allow_nan=False) + "\n")
