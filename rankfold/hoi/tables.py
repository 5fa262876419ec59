"""What `rankfold hoi` prints: mAP by group, triplets of an image, how a training went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from rankfold.hoi.facts import lines
from rankfold.report_format import clean, percent

_GROUPS = ("full", "rare", "non_rare", "seen", "unseen", "harmonic")
_SAID = ("setting", "trained on", "image encoder", "texts", "parameters", "training")


def print_scores(found: dict[str, Any], console: Console, heading: str) -> None:
    """The means of `Scores.to_json`."""
    console.print(f"[bold]{clean(heading)}[/bold]: {found['images']:,} images, setting {found['split']}")
    table = Table(box=None, pad_edge=False)
    table.add_column("interactions")
    table.add_column(f"mAP, {found['points']}-point", justify="right")
    table.add_column("classes", justify="right")
    for name in _GROUPS:
        value = found["mAP"][name]
        if value is None:
            continue
        shown = {"non_rare": "non-rare", "harmonic": "harmonic mean"}.get(name, name)
        counted = found["classes"].get(name)
        table.add_row(shown, percent(value, 2), "" if counted is None else f"{counted:,}")
    console.print(table)
    missing = sum(truths == 0 for truths in found["truths"])
    if missing:
        console.print(f"{missing:,} interactions have no pair here: no AP, and part of no mean")
    if found["detector"]:
        console.print(found["detector"], highlight=False)


def print_facts(facts: dict[str, Any], console: Console) -> None:
    """What a training left: on what, how large, how well."""
    said = lines(facts)
    for name in _SAID:
        console.print(f"{name}: {clean(said[name])}", highlight=False, markup=False, soft_wrap=True)
    for name, words in said.items():
        if name.startswith("loss of epoch"):
            console.print(f"{name}: {words}", highlight=False, markup=False, soft_wrap=True)
    for part, found in facts["metrics"].items():
        console.print()
        print_scores(found, console, part)


def print_triplets(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """A line a triplet: score, verb, object, box of the human, box of the object, the image."""
    for row in rows:
        name = clean(row["image"])
        if not row["triplets"]:
            console.file.write(f"–\t{name}: no person with another thing\n")
        for one in row["triplets"]:
            boxes = "\t".join(" ".join(f"{x:.0f}" for x in one[side]) for side in ("human", "thing"))
            console.file.write(f"{one['score']:.4f}\t{one['verb']}\t{one['object']}\t{boxes}\t{name}\n")
