"""hoi.json, which stands beside a trained model: what it was trained on, how, and how well it does; and
the same in words, for the terminal and the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from rankfold.atomic import writing_file
from rankfold.footprint import params
from rankfold.hoi.classes import ClassTable
from rankfold.hoi.detection_file import DetectionFile
from rankfold.hoi.detector import Detector
from rankfold.hoi.folder import Part
from rankfold.hoi.splits import Split
from rankfold.report import encode
from rankfold.report_format import number, seconds

FACTS = "hoi.json"


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    with writing_file(folder / FACTS) as beside:
        beside.write_text(json.dumps(encode(facts, FACTS), indent=1, allow_nan=False), encoding="utf-8")


def read_facts(folder: str | Path) -> dict[str, Any]:
    """hoi.json of a folder. Raises ValueError where there is none, or it is damaged."""
    path = Path(folder) / FACTS
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}. `rankfold hoi train` writes it") from error
    if not isinstance(body, dict) or not {"setting", "data", "text"} <= set(body):
        raise ValueError(f"{path} is not what `rankfold hoi train` writes")
    return body


def split_of(facts: dict[str, Any], table: ClassTable) -> Split:
    """The setting that a model was trained in."""
    return Split.from_json(facts["setting"], table, f"'setting' of {FACTS}")


def size_of(model: nn.Module) -> dict[str, int]:
    """Parameters, and those that are trained."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"parameters": params(model), "trained": trained}


def part_facts(part: Part, source: DetectionFile | Detector) -> dict[str, Any]:
    """Of one part of a data set, and of its detections."""
    held, chosen = part.annotations, source.selection
    kept = isinstance(source, DetectionFile)
    return {
        "annotations": held.source,
        "images": len(held),
        "pairs": int(held.counts().sum()),
        "detections": str(part.detections.resolve()) if kept else None,
        "detector": source.detector if kept else source.name,
        "selection": None if chosen is None else chosen.to_json(),
    }


def lines(facts: dict[str, Any]) -> dict[str, str]:
    """Name: words, in the order of a reader's questions."""
    counts, model, went, held = (facts[key] for key in ("setting", "model", "training", "trained_on"))
    hidden = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in counts["counts"].items())
    found = {
        "setting": f"{counts['name']}: {hidden}",
        "trained on": f"{held['images']:,} images, {held['pairs']:,} pairs",
        "texts": f"{facts['text']['source']}, width {facts['text']['width']}",
    }
    for name, part in facts["data"].items():
        found[name] = f"{part['images']:,} images, {part['pairs']:,} pairs: {part['annotations']}"
        found[f"detections of {name}"] = part["detector"] + (
            f", {part['detections']}" if part["detections"] else ""
        )
    found["image encoder"] = str(model["vision"])
    found["parameters"] = f"{model['parameters']:,}, of which {model['trained']:,} are trained"
    found["training"] = f"{went['steps']:,} steps in {seconds(went['seconds'])}"
    for row in [*went["epochs"][:1], *went["epochs"][1:][-1:]]:
        parts = ", ".join(f"{name.replace('_', ' ')} {number(v)}" for name, v in row["parts"].items())
        found[f"loss of epoch {row['epoch']}"] = f"{number(row['loss'])}: {parts}"
    for heading, key in (("settings", "settings"), ("weights of the loss", "losses")):
        found[heading] = ", ".join(f"{name} {value}" for name, value in facts[key].items())
    found["model"] = ", ".join(f"{name} {value}" for name, value in model["options"].items())
    found["versions"] = ", ".join(f"{name} {value}" for name, value in facts["versions"].items())
    return found
