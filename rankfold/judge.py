"""One model measured, or two side by side: what `rankfold eval` prints, and a report's evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankfold import data as texts
from rankfold.batches import Batch
from rankfold.evaluate import (
    accuracy,
    bytes_on_disk,
    compare,
    latency,
    macs_per_token,
    params,
    peak_memory,
    perplexity,
)
from rankfold.inputs import TEST, read_batches
from rankfold.loading import Opened, open_model
from rankfold.metrics import Progress

Bars = Callable[[], AbstractContextManager[Progress]]


def evaluate(
    model: str,
    against: str | None,
    *,
    data: str | None,
    dtype: str | None,
    device: str | None,
    batch_size: int,
    timed: bool,
    progress: Bars,
) -> dict[str, Any]:
    """Measure one model, or two of them side by side (`against` is the reference). Raises ValueError where
    the two cannot be compared: tokens or dtypes differ."""
    if data is not None:
        texts.Spec.parse(data)
    opened = open_model(model, dtype=dtype, device=device)
    batches, facts = read_batches(opened, data or TEST, batch_size, 0, False, spread="even")
    if against is None:
        with progress() as tell:
            return {"model": model, "data": facts, "measured": _measure(opened, batches, batch_size, tell)}
    other = open_model(against, dtype=dtype, device=device)
    _, other_facts = read_batches(other, data or TEST, batch_size, 0, False, spread="even")
    if (facts or {}).get("hash") != (other_facts or {}).get("hash"):
        raise ValueError(
            f"{model} and {against} tokenize the data differently (token hashes "
            f"{(facts or {}).get('hash', '')[:12]} and "
            f"{(other_facts or {}).get('hash', '')[:12]}), so their perplexities cannot be compared"
        )
    with progress() as tell:
        result = side_by_side(opened, other.model, batches, facts, tell, timed=timed)
    for row, name in (("dense", against), ("compressed", model)):
        if Path(name).is_dir():
            result[row]["bytes_on_disk"] = bytes_on_disk(name)["payload"]
    return {"model": model, "against": against, **result}


def side_by_side(
    opened: Opened, dense: nn.Module, batches: Sequence[Batch], facts: Any, tell: Progress, timed: bool = True
) -> dict[str, Any]:
    if opened.causal:
        windows = torch.cat([batch["input_ids"] for batch in batches if isinstance(batch, Mapping)])
        result = compare(
            dense,
            opened.model,
            windows,
            opened.tokenizer,
            data=facts,
            timing={"progress": lambda done, total: tell("speed", done, total)} if timed else None,
            memory=torch.cuda.is_available(),  # on a CPU, two models in one process hide each other's peak
            progress=lambda done, total: tell("evaluate", done, total),
        )
    else:
        rows = {}
        for done, (name, net) in enumerate((("dense", dense), ("compressed", opened.model))):
            tell("evaluate", done, 2)
            rows[name] = {"params": params(net), **_scored(net, batches)}
        tell("evaluate", 2, 2)
        result = {"data": facts, **rows, "warnings": []}
    for row, net in (("dense", dense), ("compressed", opened.model)):
        result[row].setdefault("bytes", sum(p.numel() * p.element_size() for p in net.parameters()))
    return result


def _measure(opened: Opened, batches: Sequence[Batch], batch_size: int, tell: Progress) -> dict[str, Any]:
    net = opened.model
    row: dict[str, Any] = {
        "params": params(net),
        "bytes": sum(p.numel() * p.element_size() for p in net.parameters()),
    }
    if opened.causal:
        windows = torch.cat([batch["input_ids"] for batch in batches if isinstance(batch, Mapping)])
        row["macs_per_token"] = macs_per_token(net, example=windows[:1])
        scored = lambda done, total: tell("evaluate", done, total)  # noqa: E731
        peak = peak_memory(
            lambda: perplexity(net, windows, batch_size=batch_size, progress=scored),
            device=next(net.parameters()).device,
        )
        row["perplexity"], row["peak_memory_bytes"] = peak.result, peak.bytes
        timing = latency({"model": net}, progress=lambda done, total: tell("speed", done, total))["rows"][0]
        row |= {key: timing[key] for key in ("prefill_ms", "decode_ms_per_token", "decode_tokens_per_s")}
    else:
        row |= _scored(net, batches)
    if Path(opened.name).is_dir():
        row["bytes_on_disk"] = bytes_on_disk(opened.name)["payload"]
    return row


def _scored(net: nn.Module, batches: Sequence[Batch]) -> dict[str, Any]:
    labelled = [batch for batch in batches if isinstance(batch, Mapping) and "labels" in batch]
    return accuracy(net, labelled) if labelled else {}


def print_evaluation(result: Mapping[str, Any], console: Any) -> None:
    """A table of what `evaluate` measured."""
    from rich.table import Table

    rows = {name: result[name] for name in ("dense", "compressed", "measured") if name in result}
    names = {"dense": result.get("against", ""), "compressed": result["model"], "measured": result["model"]}
    table = Table(box=None, pad_edge=False)
    for heading in ("", *(names[row] for row in rows)):
        table.add_column(heading, justify="right" if heading else "left")
    for key in dict.fromkeys(key for row in rows.values() for key in row):
        cells = [row.get(key) for row in rows.values()]
        table.add_row(key.replace("_", " "), *(_cell(cell) for cell in cells))
    console.print(table)
    for warning in result.get("warnings", []):
        console.print(f"[yellow]warning:[/yellow] {warning}")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
    )
