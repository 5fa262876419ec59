"""What `rankfold classify` prints: scores as tables, sizes in a line, answers in the order of the texts."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from rankfold.classify.scores import class_table, confusion_table, in_words
from rankfold.report_format import clean, count, percent, size
from rankfold.report_format import seconds as duration

_WIDE = 100  # characters of a text in a line


def print_scores(found: dict[str, Any], console: Console, heading: str) -> None:
    console.print(f"\n[bold]{heading}[/bold]: {in_words(found)}", highlight=False)
    console.print(class_table(found))
    matrix = confusion_table(found)
    if matrix is None:
        console.print("The confusion matrix is in classify.json, and in --json.")
    else:
        console.print()
        console.print(matrix)


def print_facts(facts: dict[str, Any], console: Console) -> None:
    """What a training run left: how it went, how large it is, how well it does."""
    model, went, data = facts["model"], facts["training"], facts["data"]
    sets = ", ".join(f"{part} {item['n']:,}" for part, item in data.items())
    console.print(f"{len(facts['classes'])} classes; examples: {sets}", highlight=False)
    end = ", stopped early" if went["stopped_early"] else ""
    took = f"{len(went['epochs'])} epochs in {duration(went['seconds'])}{end}"
    console.print(f"{took}; epoch {went['best_epoch']} is kept", highlight=False)
    attention = model["attention_parameters"]
    inside = "" if attention is None else f", {attention:,} of them in attention"
    console.print(
        f"{model['parameters']:,} parameters ({model['embedding_parameters']:,} in the embedding{inside}), "
        f"{size(model['bytes'])}, {count(model['macs'])} multiply-adds for a text of {model['macs_length']} "
        "tokens",
        highlight=False,
    )
    for part, found in facts["metrics"].items():
        print_scores(found, console, part)


def print_predictions(found: dict[str, Any], out: Console, notes: Console, *, answers: bool) -> None:
    """The answers as lines `label <tab> probability <tab> text`, and the scores."""
    if answers:
        for row in found["predictions"]:
            label = "-" if row["label"] is None else clean(row["label"])
            share = row["reason"] if row["label"] is None else percent(row["probability"])
            text = clean(" ".join(row["text"].split()))
            text = text if len(text) <= _WIDE else text[: _WIDE - 1] + "…"
            out.file.write(f"{label}\t{share}\t{text}\n")
    if found["metrics"] is not None:
        print_scores(found["metrics"], notes, found["data"] or "scores")
