"""The report of a model beside its weights: JSON, a page, and the model card that the hub shows."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rankfold.atomic import writing_file
from rankfold.card import card
from rankfold.report import Report

PAGE, CARD = "report.html", "README.md"


def write_report(report: Report, folder: str | os.PathLike[str]) -> None:
    """Write a report in its three forms: rankfold_report.json, report.html, and README.md, the model card."""
    folder = Path(folder)
    report.save(folder)
    for name, text in ((PAGE, report.to_html()), (CARD, card(report, loader=_loader(folder)))):
        with writing_file(folder / name) as beside:
            beside.write_text(text, encoding="utf-8")


def _loader(folder: Path) -> str:
    """The Auto class that opens a folder; "" for a module that is not transformers'."""
    if not (folder / "config.json").is_file():
        return ""
    architecture = (
        json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    )[0]
    kinds = (
        "SequenceClassification",
        "TokenClassification",
        "QuestionAnswering",
        "ImageClassification",
        "MaskedLM",
    )
    kind = next((kind for kind in kinds if architecture.endswith(f"For{kind}")), None)
    if kind is None and ("CausalLM" in architecture or architecture.endswith("LMHeadModel")):
        kind = "CausalLM"
    return f"AutoModelFor{kind}" if kind else "AutoModel"
