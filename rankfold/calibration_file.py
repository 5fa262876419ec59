"""Metrics on disk: one calibration serves every budget, and every method of the same metric.

One safetensors file. Layers that share a moment share its tensor. The key (hash of weights and data, metric,
seed, layers) is stored with it, and a file with another key is refused with the difference named: stale
statistics are never used silently.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rankfold.atomic import writing_file
from rankfold.metric import Metric

FORMAT = 1


def save_metrics(metrics: Mapping[str, Metric], path: str | os.PathLike[str], key: Mapping[str, Any]) -> Path:
    """Write metrics and their key (JSON) to `path`, whole or not at all."""
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    index: dict[str, list[str | None]] = {}
    for layer, metric in metrics.items():
        row: list[str | None] = []
        for side in (metric.left, metric.right):
            if side is None:
                row.append(None)
                continue
            if id(side) not in names:
                names[id(side)] = str(len(names))
                tensors[names[id(side)]] = side.detach().contiguous().cpu()
            row.append(names[id(side)])
        index[layer] = row
    body = {"format": FORMAT, "key": dict(key), "layers": index}
    with writing_file(path) as beside:
        save_file(tensors, beside, metadata={"rankfold": json.dumps(body)})
    return path


def load_metrics(path: str | os.PathLike[str], key: Mapping[str, Any]) -> dict[str, Metric]:
    """The metrics that `save_metrics` wrote under the same key.

    Raises ValueError where the file is not such a file, or was made from other weights, data or options: the
    message names the field and both values.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            body = json.loads((handle.metadata() or {}).get("rankfold", "null"))
            if not isinstance(body, dict) or body.get("format") != FORMAT:
                raise ValueError(
                    f"{path} does not hold rankfold metrics of format {FORMAT}; delete it, or name another "
                    f"file"
                )
            for field, wanted in key.items():
                held = body["key"].get(field)
                if held != json.loads(json.dumps(wanted)):
                    raise ValueError(
                        f"{path} was calibrated with another {field}: {_short(held)} in the file, "
                        f"{_short(wanted)} now. "
                        "Delete it, or name another file"
                    )
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}); delete it, or name another"
        ) from error
    return {
        layer: Metric(*(None if name is None else tensors[name] for name in row))
        for layer, row in body["layers"].items()
    }


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
