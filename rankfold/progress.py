"""Progress of long work: bars with the time left on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

QUIET = 15.0  # seconds between two lines of one stage in a log


@contextmanager
def bars(console: Console) -> Iterator[Any]:
    """A callback (stage, done, total) that shows one bar a stage, with the time elapsed and the time left.

    Where the console is no terminal, it prints a line when a stage begins and ends, and every QUIET seconds
    between.
    """
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as drawn:
        tasks: dict[str, Any] = {}

        def tell(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = drawn.add_task(stage, total=total)
            drawn.update(tasks[stage], completed=done, total=total)

        yield tell


class _Lines:
    def __init__(self, console: Console) -> None:
        self.console = console
        self.began: dict[str, float] = {}
        self.last = 0.0

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        first, last = stage not in self.began, total is not None and done >= total
        began = self.began.setdefault(stage, now)
        if not (first or last) and now - self.last < QUIET:
            return
        self.last = now
        spent = now - began
        left = f", {spent / done * (total - done):.0f} s left" if total and 0 < done < total else ""
        self.console.print(f"{stage} {done}/{total or '?'}, {spent:.0f} s{left}", highlight=False)
