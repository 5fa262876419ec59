"""What every benchmark here shares: a model, a calibration text, held-out texts, and how results are printed.

Model: the packaged SmolLM2-135M-Instruct (GGUF Q4_1, dequantized to float32). Calibration: windows of 512
tokens of `wikipedia:train`. Held out: 12 evenly spaced windows of 512 of `wikipedia:test` (in domain; no
article in common) and of `pydoc:all` (out of domain: Python's own documentation).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor, nn

from rankfold import recipes
from rankfold.calibration_file import load_metrics, save_metrics
from rankfold.data import Windows, token_windows
from rankfold.evaluate import perplexity
from rankfold.factorize import calibrate
from rankfold.layers import select
from rankfold.loading import Opened, open_model
from rankfold.metric import Metric
from rankfold.provenance import versions, weights_hash

MODEL, LENGTH = "smollm2", 512
HELD_OUT = {"in domain": "wikipedia:test:12x512", "out of domain": "pydoc:all:12x512"}


def arguments(description: str | None, **extra: Mapping[str, Any]) -> argparse.Namespace:
    """--threads, --sequences and --out, which all benchmarks take, and more by `name={argparse options}`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--sequences", type=int, default=64, help="calibration windows (default 64)")
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    for name, options in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    return chosen


def open_smollm2() -> Opened:
    return open_model(MODEL, dtype="float32", device="cpu")


def calibration(opened: Opened, sequences: int) -> Windows:
    spec = f"wikipedia:train:{sequences}x{LENGTH}"
    return token_windows(spec, opened.tokenizer, seed=0, spread="random")


def held_out(opened: Opened) -> dict[str, Tensor]:
    return {name: token_windows(spec, opened.tokenizer).input_ids for name, spec in HELD_OUT.items()}


def perplexities(model: nn.Module, windows: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: perplexity(model, ids) for name, ids in windows.items()}


def statistics(opened: Opened, windows: Windows, cache: Path | None = None) -> dict[str, Metric]:
    """{layer: Metric(E‖g‖²/out, E[x xᵀ])}: the metric of recipe `weighted`, whose sides the others share.
    `cache` is a file to read it from, or to keep it in, for the same weights and data."""
    recipe, layers = recipes.weighted, select(opened.model)
    key = {
        "weights": weights_hash(opened.model),
        "data": windows.hash,
        "metric": recipe.to_json()["metric"],
        "seed": 0,
        "layers": list(layers),
    }
    if cache is not None and cache.exists():
        return load_metrics(cache, key)
    metrics = calibrate(opened.model, recipe, layers, windows.input_ids, seed=0, progress=said)
    if cache is not None:
        save_metrics(metrics, cache, key)
    return metrics


def said(stage: str, done: int, total: int | None) -> None:
    """Progress to stderr, now and then."""
    import sys

    if total and done % max(total // 4, 1) == 0:
        print(f"  {stage} {done}/{total}", file=sys.stderr, flush=True)


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; floats in four digits."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *([_cell(c) for c in row] for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}" if 10 <= value < 1e4 else f"{value:.3g}"
    return str(value)


def machine(threads: int) -> dict[str, Any]:
    """Versions, threads and load: what a ratio needs beside it."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": threads,
        "load": [round(load, 1) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "versions": versions(),
    }


def finish(title: str, facts: dict[str, Any], text: str, chosen: argparse.Namespace) -> None:
    """Print the tables and the machine line; write the JSON."""
    facts["machine"] = machine(chosen.threads)
    where = facts["machine"]
    line = ", ".join(f"{key} {value}" for key, value in where["versions"].items())
    print(f"\n### {title}\n\n{text}\n")
    print(f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads, load {where['load']}; {line}")
    if chosen.out is not None:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
