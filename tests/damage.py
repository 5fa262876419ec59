"""Folders with something wrong in them: what a stranger, a bad download or an editor may have done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


def damaged(folder: Path, out: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of a folder at `out` with its tensors changed in place by a function."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def edited(folder: Path, out: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a folder at `out` with its manifest changed in place by a function."""
    shutil.copytree(folder, out)
    path = next(p for p in (out / "rankfold.json", out / "config.json") if p.is_file())
    data = json.loads(path.read_text())
    change(data.get("quantization_config", data))
    path.write_text(json.dumps(data))
    return out


def manifest_of(structures: dict[str, Any]) -> dict[str, Any]:
    return {"quant_method": "rankfold", "version": 1, "structures": structures}


def nested(depth: int) -> dict[str, Any]:
    """The spec of sums of one term each, around a matrix of shape (128, 64)."""
    spec: dict[str, Any] = {"kind": "dense", "shape": [128, 64]}
    for _ in range(depth):
        spec = {"kind": "sum", "shape": [128, 64], "terms": [spec]}
    return spec
