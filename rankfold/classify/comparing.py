"""The same examples, several models, several seeds: `rankfold classify compare`.

Every run is trained by `train` with the same splits and is one line of OUT/results.jsonl, found by a hash of
all that decides it: what is there is not run again, and a run that was stopped goes on. The table gives the
mean and the standard deviation over seeds (n − 1 in its divisor).
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from rankfold.atomic import sync, writing_file
from rankfold.classify.examples import check_spec, read
from rankfold.classify.settings import Choice, options_of, training
from rankfold.classify.training import train
from rankfold.judge import Bars
from rankfold.loading import one_device
from rankfold.report import encode as as_json
from rankfold.report_format import count, percent, size
from rankfold.report_format import seconds as duration

RESULTS, TABLE = "results.jsonl", "table.md"
_COLUMNS = ("model", "test accuracy", "macro F1", "seeds", "parameters", "attention", "MACs", "bytes", "time")


def choices(models: Sequence[str], options: Mapping[str, Any]) -> list[Choice]:
    """A `Choice` for each model with those of the options that it has. Raises ValueError for an option that
    none of the models has, for a model named twice, and what `Choice` refuses."""
    given = {key: value for key, value in options.items() if value is not None}
    if len(set(models)) < len(models) or not models:
        raise ValueError(f"--models {','.join(models)}: name at least one, and each once")
    for key in given:
        if not any(key in options_of(model) for model in models):
            raise ValueError(f"none of the models {', '.join(models)} has --{key.replace('_', '-')}")
    known = {field.name for field in fields(Choice)}
    assert set(given) <= known
    return [
        Choice(model=model, **{key: value for key, value in given.items() if key in options_of(model)})
        for model in models
    ]


def compare(
    data: str,
    out: str,
    *,
    models: Sequence[str],
    seeds: Sequence[int],
    progress: Bars,
    say: Callable[[str], None],
    test: str | None = None,
    options: Mapping[str, Any] | None = None,
    text_column: str = "text",
    label_column: str = "label",
    validation: str | None = None,
    held: float | None = None,
    keep_models: bool = False,
    device: str | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Train every model with every seed, and return a row for each model; see `train` for the arguments.

    test         None: the split "test" of a packaged set whose "train" is `data`; else it must be given
    options      of the models: each takes those that it has
    keep_models  leave the trained folders in OUT/models

    Raises ValueError before anything is trained.
    """
    chosen = choices(models, options or {})
    if len(set(seeds)) < len(seeds) or not seeds:
        raise ValueError(f"--seeds {','.join(map(str, seeds))}: name at least one, and each once")
    if test is None:
        if check_spec(data).split != "train":
            raise ValueError(f"--test: name the examples that the models are judged on; {data!r} trains them")
        test = data.removesuffix("train") + "test"
    place = one_device(device, "classify")
    for choice in chosen:
        for seed in seeds:
            training(choice, device=place, seed=seed, **settings)
    columns = {"text_column": text_column, "label_column": label_column}
    hashes = {spec: read(spec, **columns).hash for spec in (data, test, validation) if spec}  # type: ignore[arg-type]
    folder = Path(out)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RESULTS).is_file():
        if not (folder / "models").is_dir():
            raise ValueError(f"{folder} is not empty and holds no comparison; choose another folder")
    done = load_results(folder)
    wanted: dict[str, list[str]] = {}
    total = len(chosen) * len(seeds)
    for choice in chosen:
        for seed in seeds:
            stated = training(choice, device=place, seed=seed, **settings).to_json()
            identity = {
                "model": choice.to_json(),
                "settings": {key: value for key, value in stated.items() if key != "device"},
                "data": hashes,
                "held": held,
            }
            mark = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
            wanted.setdefault(choice.model, []).append(mark)
            position = sum(map(len, wanted.values()))
            if mark in done:
                say(f"run {position} of {total}: {choice.model}, seed {seed}: there already")
                continue
            say(f"run {position} of {total}: {choice.model}, seed {seed}")
            place_ = folder / "models" / f"{Path(choice.model).name}-{seed}-{mark[:6]}"
            facts, _ = train(
                data,
                str(place_),
                choice=replace(choice),
                progress=progress,
                say=say,
                validation=validation,
                held=held,
                test=test,
                overwrite=True,
                check=False,
                device=device,
                seed=seed,
                **columns,  # type: ignore[arg-type]
                **settings,
            )
            done[mark] = {"id": mark, "seed": seed, **facts}
            _append(folder / RESULTS, done[mark])
            if not keep_models:
                shutil.rmtree(place_, ignore_errors=True)
    if not keep_models and (folder / "models").is_dir() and not any((folder / "models").iterdir()):
        (folder / "models").rmdir()
    rows = [row_of(model, [done[mark] for mark in marks]) for model, marks in wanted.items()]
    with writing_file(folder / TABLE) as beside:
        beside.write_text(markdown(rows, data, test), encoding="utf-8")
    return rows


def load_results(folder: Path) -> dict[str, dict[str, Any]]:
    """{id: facts} of the runs that are there. A last line that was cut short is no result; ValueError for any
    other damage."""
    path = folder / RESULTS
    if not path.is_file():
        return {}
    found: dict[str, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            body = json.loads(line)
            found[body["id"]] = body
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                continue
            raise ValueError(f"'{path}', line {number} is damaged ({error}); take it out") from error
    return found


def _append(path: Path, body: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if path.is_file() else b""
    kept = before[: before.rfind(b"\n") + 1]  # without a line that was cut short
    with writing_file(path) as beside:
        beside.write_bytes(kept + json.dumps(as_json(body, RESULTS), allow_nan=False).encode() + b"\n")
    sync(path)


def row_of(model: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds (None for one), and the size of the model."""
    accuracy = [run["metrics"]["test"]["accuracy"] for run in runs]
    f1 = [run["metrics"]["test"]["macro_f1"] for run in runs]
    facts = runs[0]["model"]
    return {
        "model": model,
        "accuracy": statistics.fmean(accuracy),
        "accuracy_sd": statistics.stdev(accuracy) if len(runs) > 1 else None,
        "standard_error": math.sqrt(
            statistics.fmean(run["metrics"]["test"]["standard_error"] ** 2 for run in runs)
        ),
        "macro_f1": statistics.fmean(f1),
        "macro_f1_sd": statistics.stdev(f1) if len(runs) > 1 else None,
        "seeds": len(runs),
        **{key: facts[key] for key in ("parameters", "attention_parameters", "macs", "macs_length", "bytes")},
        "seconds": statistics.fmean(run["training"]["seconds"] for run in runs),
    }


def _cells(row: Mapping[str, Any]) -> list[str]:
    def spread(value: float, by: float | None) -> str:
        return percent(value) if by is None else f"{percent(value)[:-2]} ± {percent(by)}"

    attention = row["attention_parameters"]
    return [
        row["model"],
        spread(row["accuracy"], row["accuracy_sd"]),
        spread(row["macro_f1"], row["macro_f1_sd"]),
        str(row["seeds"]),
        f"{row['parameters']:,}",
        "–" if attention is None else f"{attention:,}",
        count(row["macs"]),
        size(row["bytes"]),
        duration(row["seconds"]),
    ]


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, heading in enumerate(_COLUMNS):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def markdown(rows: Sequence[Mapping[str, Any]], data: str, test: str) -> str:
    """The table as a page."""
    error = percent(max(row["standard_error"] for row in rows))
    lengths = ", ".join(sorted({str(row["macs_length"]) for row in rows}))
    lines = [
        f"Trained on `{data}`, judged on `{test}`. Accuracy and F1: mean ± s.d. over seeds; one "
        f"accuracy has a standard error of {error}. MACs: of a text of {lengths} tokens, the mean length. "
        "Attention: parameters that decide what is attended to. Time: training, mean.",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|" + "---|" * len(_COLUMNS),
        *("| " + " | ".join(_cells(row)) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"
