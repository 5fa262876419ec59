"""How well a classifier did, from its confusion matrix alone.

    precision_c = m_cc / Σ_r m_rc      recall_c = m_cc / Σ_p m_cp      F1_c = 2 m_cc / (Σ_r m_rc + Σ_p m_cp)

m_rp counts the examples of class r that were taken for p. Macro F1 is the mean of F1_c over the classes that
occur, in the data or among the predictions. The standard error of the accuracy a is √(a(1 − a)/n).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from rankfold.report_format import clean, percent

MOST = 20  # classes in a printed confusion matrix


def confusion(truth: Sequence[int], predicted: Sequence[int], classes: int) -> list[list[int]]:
    """Counts (classes, classes): rows are what is true, columns what was predicted."""
    matrix = [[0] * classes for _ in range(classes)]
    for row, column in zip(truth, predicted, strict=True):
        matrix[row][column] += 1
    return matrix


def scores(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> dict[str, Any]:
    """Accuracy with its standard error, macro F1, and precision, recall, F1 and number of examples by class;
    a share of nothing (precision of a class that was never predicted) is 0. ValueError for no examples."""
    n = sum(map(sum, matrix))
    if not n:
        raise ValueError("no examples to score")
    columns = [sum(row[number] for row in matrix) for number in range(len(names))]
    right = sum(matrix[number][number] for number in range(len(names)))
    rows = {}
    for number, name in enumerate(names):
        hit, true, taken = matrix[number][number], sum(matrix[number]), columns[number]
        rows[name] = {
            "precision": hit / taken if taken else 0.0,
            "recall": hit / true if true else 0.0,
            "f1": 2 * hit / (true + taken) if true + taken else 0.0,
            "n": true,
        }
    present = [rows[name]["f1"] for number, name in enumerate(names) if rows[name]["n"] or columns[number]]
    share = right / n
    return {
        "n": n,
        "accuracy": share,
        "standard_error": math.sqrt(share * (1 - share) / n),
        "macro_f1": sum(present) / len(present),
        "classes": rows,
        "confusion": [list(row) for row in matrix],
    }


def in_words(found: dict[str, Any]) -> str:
    return (
        f"accuracy {percent(found['accuracy'])} ± {percent(found['standard_error'])}, macro F1 "
        f"{percent(found['macro_f1'])}, {found['n']} examples"
    )


def class_table(found: dict[str, Any]) -> Table:
    """Precision, recall and F1 of every class."""
    table = Table(box=None, pad_edge=False)
    table.add_column("class")
    for heading in ("precision", "recall", "F1", "examples"):
        table.add_column(heading, justify="right")
    for name, row in found["classes"].items():
        cells = [percent(row[key]) for key in ("precision", "recall", "f1")]
        table.add_row(_name(name), *cells, f"{row['n']:,}")
    return table


def confusion_table(found: dict[str, Any]) -> Table | None:
    """The confusion matrix: a row for each true class, a column for each predicted one; None where it would
    not fit a terminal."""
    names = list(found["classes"])
    if len(names) > MOST:
        return None
    table = Table(box=None, pad_edge=False)
    table.add_column("true \\ predicted")
    short = len(names) > 6  # columns by number, so that they fit
    for number, name in enumerate(names):
        table.add_column(str(number) if short else _name(name), justify="right")
    for number, (name, row) in enumerate(zip(names, found["confusion"], strict=True)):
        cells = [f"[bold]{n:,}[/bold]" if n and at == number else f"{n:,}" for at, n in enumerate(row)]
        table.add_row(f"{number} {_name(name)}" if short else _name(name), *cells)
    return table


def _name(text: str) -> str:
    """A class name as a terminal may show it: no markup, no control characters, not endless."""
    shown = clean(text).replace("[", "\\[")
    return shown if len(shown) <= 32 else shown[:31] + "…"
