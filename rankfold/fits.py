"""Fits kept on disk as they are made: a long factorization that was stopped goes on where it was.

    file name = hash of (method, size, weight, metric, versions)      content = the structure

The same question has the same answer, so the model that comes out has the same bytes as one fitted in a
single run. A file is written beside and renamed; one that is damaged is fitted again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rankfold.atomic import writing_file
from rankfold.method import Method
from rankfold.metric import Metric
from rankfold.structure import Structure, build


@dataclass(frozen=True)
class Fits:
    """A folder of fitted structures. `fit` is `method.fit`, remembered."""

    folder: Path

    def fit(self, method: Method, weight: Tensor, metric: Metric, size: Any) -> Structure:
        """`method.fit(weight, metric, size)`, or what it returned before. Raises what that raises, and
        OSError where the folder cannot be written."""
        file = self.folder / f"{key(method, weight, metric, size)}.safetensors"
        known = _read(file, weight.device) if file.exists() else None
        if known is not None:
            return known
        structure = method.fit(weight, metric, size)
        state = {name: t.detach().cpu().contiguous() for name, t in structure.state_dict().items()}
        with writing_file(file) as beside:
            save_file(state, beside, metadata={"spec": json.dumps(structure.spec())})
        return structure


def key(method: Method, weight: Tensor, metric: Metric, size: Any) -> str:
    """A name for the question: equal for equal bytes of everything that the answer depends on."""
    made = [version("rankfold"), torch.__version__, weight.device.type]
    digest = hashlib.sha256(json.dumps([*made, method.to_json(), size]).encode())
    for tensor in (weight, metric.left, metric.right):
        digest.update(f"{None if tensor is None else (str(tensor.dtype), *tensor.shape)}".encode())
        if tensor is not None:
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(file: Path, device: torch.device) -> Structure | None:
    try:
        with safe_open(file, framework="pt") as stored:
            structure = build(json.loads((stored.metadata() or {})["spec"]), device="meta")
            state = {name: stored.get_tensor(name).to(device) for name in stored.keys()}
        structure.load_state_dict(state, assign=True)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError):
        return None  # damaged, or written by another version: fitted again
    return structure
