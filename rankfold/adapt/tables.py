"""What `rankfold adapt` prints: the lines of the report, and scores by class."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from rankfold.adapt.lines import lines, title
from rankfold.classify.scores import class_table, confusion_table
from rankfold.report_format import clean


def print_facts(facts: dict[str, Any], console: Console) -> None:
    console.print(f"\n{clean(title(facts))}\n", style="bold", highlight=False, markup=False)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for label, words in lines(facts):
        table.add_row(_plain(label), _plain(words))
    console.print(table)
    if facts["task"] != "classification" or not facts["metrics"]:
        return
    name, row = next(reversed(facts["metrics"].items()))
    console.print(f"\n[bold]Classes, {name}[/bold]")
    console.print(class_table(row["after"]))
    matrix = confusion_table(row["after"])
    if matrix is not None:
        console.print()
        console.print(matrix)


def _plain(text: str) -> str:
    return clean(text).replace("[", "\\[")
