"""Scores from a confusion matrix, and how they are shown."""

from __future__ import annotations

import math

import pytest
import torch
from rich.console import Console
from sklearn.metrics import f1_score, precision_recall_fscore_support

from rankfold.classify.scores import class_table, confusion, confusion_table, in_words, scores


def test_against_scikit_learn() -> None:
    draw = torch.Generator().manual_seed(0)
    truth = torch.randint(4, (200,), generator=draw).tolist()
    said = [
        t if torch.rand(1, generator=draw) < 0.6 else int(torch.randint(4, (1,), generator=draw))
        for t in truth
    ]
    found = scores(confusion(truth, said, 4), list("abcd"))
    theirs = precision_recall_fscore_support(truth, said)
    for place, name in enumerate("abcd"):
        row = found["classes"][name]
        assert [row["precision"], row["recall"], row["f1"], row["n"]] == pytest.approx(
            [t[place] for t in theirs]
        )
    assert found["macro_f1"] == pytest.approx(f1_score(truth, said, average="macro"))
    right = sum(a == b for a, b in zip(truth, said, strict=True)) / 200
    assert found["accuracy"] == right
    assert found["standard_error"] == pytest.approx(math.sqrt(right * (1 - right) / 200))


def test_classes_that_are_never_predicted_or_never_there() -> None:
    found = scores([[3, 0, 0], [2, 0, 0], [0, 0, 0]], ["a", "b", "c"])
    assert found["classes"]["b"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "n": 2}
    assert found["macro_f1"] == pytest.approx((0.75 + 0) / 2)  # c occurs nowhere and counts nowhere
    assert found["accuracy"] == 0.6 and "5 examples" in in_words(found)
    with pytest.raises(ValueError, match="no examples"):
        scores([[0, 0], [0, 0]], ["a", "b"])


def shown(table: object) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    with console.file:
        console.print(table)
        return console.export_text()


def test_tables_survive_any_class_name() -> None:
    names = ["[red]evil[/]", "ナ" * 40, "\x1b[31mred"]
    found = scores([[1, 2, 3], [4, 5, 6], [7, 8, 9]], names)
    text = shown(class_table(found)) + shown(confusion_table(found))
    assert "[red]evil[/]" in text and "…" in text and "\x1b" not in text
    wide = scores([[1] * 10] * 10, [f"class number {i}" for i in range(10)])
    assert "9 class number 9" in shown(confusion_table(wide))
    assert confusion_table(scores([[1] * 30] * 30, [str(i) for i in range(30)])) is None
