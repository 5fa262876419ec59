"""The model card: the README.md of an output folder, with the same facts as the report.

Markdown with YAML front matter, as the hub reads it. Every value of the front matter is written as a JSON
string or list, which YAML reads unchanged, so no name can break out of it; texts are escaped or fenced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from rankfold import report_adapters as adapters
from rankfold import report_facts as facts
from rankfold import report_healing as healings
from rankfold import report_training as trainings
from rankfold.report import FILE_NAME, Report
from rankfold.report_format import DASH, clean, percent, seconds, shape, size

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SPECIAL = re.compile(r"([\\`*{}\[\]<>#|~!&]|(?<!\w)_|_(?!\w))")


def card(
    report: Report,
    *,
    base_model: str | None = None,
    license: str | None = None,
    pipeline_tag: str | None = None,
    language: Iterable[str] = (),
    loader: str = "AutoModelForCausalLM",
) -> str:
    """The text of README.md.

    base_model    hub id of the dense model; taken from the report where that is one
    license, pipeline_tag, language  of the base model, for the front matter; left out where not known
    loader        the transformers class that loads the folder; "" for a model that is not transformers'
    """
    parts = [
        _front(report, base_model, license, pipeline_tag, language, loader),
        _what(report),
        _loading(loader, plain=facts.kind(report) == "dense"),
        _table(report),
        _samples(report),
        _layers(report),
        _recipe(report),
    ]
    return "\n\n".join(part for part in parts if part).rstrip() + "\n"


def _front(
    report: Report,
    base_model: str | None,
    license: str | None,
    pipeline_tag: str | None,
    language: Iterable[str],
    loader: str,
) -> str:
    base = base_model or (report.model if _HUB_ID.fullmatch(report.model) else None)
    kinds = {row.structure for row in report.layers if not row.dense and row.structure.isidentifier()}
    what = facts.kind(report)
    fields: dict[str, Any] = {
        "library_name": "transformers" if loader else "rankfold",
        "license": license,
        "language": list(language),
        "pipeline_tag": pipeline_tag,
        "base_model": None if report.training else base,
        # The hub knows four relations of a model to its base; this is that of a smaller copy of the weights.
        "base_model_relation": "quantized" if base and what == "compressed" else None,
        "tags": ["rankfold", what, *sorted(kinds)],
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items() if value]
    return "\n".join(["---", *lines, "---"])


def _what(report: Report) -> str:
    before, after = facts.total(report, "model", "before"), facts.total(report, "model", "after")
    kept = f"{percent(facts.fraction(after, before))} of the bytes, {size(before)} → {size(after)}."
    found = healings.lines(report)
    if report.training:
        lines = [
            f"Trained from scratch with rankfold. Of the dense model of its sizes it holds {kept}",
            "",
            *(f"- {label}: {_plain(words)}" for label, words in trainings.lines(report)),
        ]
    elif facts.kind(report) == "dense":
        lines = [
            "An ordinary checkpoint, made by rankfold of a structured model, whose layers are dense again: "
            f"{size(before)} → {size(after)}."
        ]
    elif facts.kind(report) == "adapter":
        lines = [
            f"Adapters, put beside the weights with rankfold: {size(before)} → {size(after)}.",
            "",
            *(f"- {label}: {_plain(words)}" for label, words in adapters.lines(report)),
            "",
            facts.speed(report)[0],
        ]
    else:
        lines = [
            f"Compressed with rankfold. {percent(report.reached)} of the selected layers' "
            f"{_plain(facts.unit(report))} are kept (asked: {percent(report.budget)}); of the whole model "
            f"{kept}",
            "",
            facts.speed(report)[0],
            *(["", *(f"- {label}: {_plain(words)}" for label, words in found)] if found else []),
        ]
    title = trainings.title(report, _plain(facts.model_name(report)), _plain(facts.recipe_name(report)))
    lines = [f"# {title}", "", *lines]
    for text in facts.alarms(report):
        lines += ["", f"> **Warning.** {_plain(text)}"]
    return "\n".join(lines)


def _loading(loader: str, plain: bool) -> str:
    """How to open the folder; `plain`: there is nothing of rankfold in it."""
    if not loader:
        return """## Load it

```sh
pip install rankfold
```

```python
import rankfold

model = ...  # the dense architecture, with any weights
rankfold.load_(model, "path/to/this/folder")
```"""
    code = f"""```python
from transformers import {loader}

model = {loader}.from_pretrained("path/to/this/folder")
```"""
    if plain:
        return f"## Load it\n\n{code}\n\nNothing else is needed."
    return f"""## Load it

```sh
pip install "rankfold[hf]"
```

{code}

With rankfold installed, nothing else has to be imported. Where its autoload is switched off, write
`import rankfold.hf` first. Without rankfold, transformers cannot rebuild these layers and would fill them
with random weights: install it."""


def _table(report: Report) -> str:
    rows = [
        f"| {_plain(x.label)} | {x.before} | {x.after} | {x.change} |" for x in facts.before_after(report)
    ]
    if not rows:
        return ""
    heads = " | ".join(facts.sides(report))
    text = f"## Before and after\n\n| | {heads} | change |\n|---|--:|--:|--:|\n" + "\n".join(rows)
    data = (report.evaluation or {}).get("data")
    if isinstance(data, Mapping) and data:
        text += f"\n\nEvaluated on: {_pairs(data)}."
    elif not report.evaluation and not report.training:
        text += "\n\nQuality was not measured."
    return text


def _samples(report: Report) -> str:
    found = (report.evaluation or {}).get("generation")
    if not isinstance(found, Mapping):
        return ""
    texts = [(key, found.get(key)) for key in ("prompt", "dense", "compressed") if found.get(key) is not None]
    return "## What it says\n\n" + "\n\n".join(f"{key}:\n\n{_fenced(text, 'text')}" for key, text in texts)


def _layers(report: Report) -> str:
    rows = []
    for label, layers in facts.by_type(report):
        before, after = (sum(getattr(row, f"bytes_{side}") for row in layers) for side in ("before", "after"))
        sizes = sorted({row.size for row in layers if isinstance(row.size, int)})
        span = f"{sizes[0]}" + (f" to {sizes[-1]}" if len(sizes) > 1 else "") if sizes else DASH
        shapes = ", ".join(dict.fromkeys(shape(row.shape) for row in layers[:8]))
        rows.append(
            f"| {_plain(label)} | {len(layers)} | {shapes} | {span} | {sum(row.dense for row in layers)} | "
            f"{size(before)} → {size(after)} | {percent(facts.fraction(after, before))} |"
        )
    other, kept = "no adapter" if facts.kind(report) == "adapter" else "left dense", facts.kept(report)
    head = f"| type | layers | shape | size | {other} | bytes | {kept} |\n|---|--:|---|--:|--:|--:|--:|"
    text = f"## Layers\n\n{head}\n" + "\n".join(rows) if rows else "## Layers\n\nNo layer was selected."
    others = [
        f"- {_plain(reason)}: {len(found)}, for example {_plain(found[0].name)}"
        for reason, found in facts.left_dense(report)
    ]
    if others:
        title = "Without one" if facts.kind(report) == "adapter" else "Stayed dense"
        text += f"\n\n{title}:\n\n" + "\n".join(others)
    compressed = facts.kind(report) == "compressed"
    gap = f"Allocation: {_plain(facts.gap(report))}\n\n" if compressed else ""
    return f"{text}\n\n{gap}Every layer is in `{FILE_NAME}`."


def _recipe(report: Report) -> str:
    recipe = json.dumps(report.to_json()["recipe"], indent=2)
    lines = ["## Repeat it", "", _fenced(recipe, "json"), ""]
    if report.data:
        lines.append(f"- {'Data' if report.training else 'Calibration data'}: {_pairs(report.data)}")
    if facts.kind(report) == "compressed":
        lines.append(f"- Budget: {report.budget} of the {_plain(facts.unit(report))} of the selected layers")
    if report.seed is not None:
        lines.append(f"- Seed: {report.seed}")
    if report.weights_hash:
        lines.append(f"- Weights{'' if report.training else ' before'}: {_plain(report.weights_hash)}")
    if report.dtype:
        lines.append(f"- dtype: {_plain(report.dtype)}")
    if report.versions:
        lines.append(f"- Versions: {_pairs(report.versions)}")
    if report.timings:
        times = ", ".join(f"{_plain(key)} {seconds(value)}" for key, value in report.timings.items())
        lines.append(f"- Time: {times}")
    return "\n".join(lines)


def _plain(text: Any) -> str:
    """Text on one line in which no character has a meaning for Markdown or HTML."""
    return _SPECIAL.sub(r"\\\1", " ".join(clean(text).split()))


def _pairs(data: Mapping[str, Any]) -> str:
    return ", ".join(f"{_plain(key)} {_plain(value)}" for key, value in data.items())


def _fenced(text: Any, kind: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    body = clean(text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", body)), default=0))
    return f"{fence}{kind}\n{body}\n{fence}"
