"""Predictions of a whole set on disk: one safetensors file, written whole or not at all.

A pair of boxes stands once, however many interactions it has: 32 bytes a pair, and 10 a triplet. Beside the
numbers stand the class table, the names of the images, a checksum, and what the writer wants to keep (model,
split, detector). The rows of an image come back in their order, so an evaluation of the file and of what was
written agree, ties and all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rankfold.atomic import writing_file
from rankfold.hoi.classes import ClassTable
from rankfold.hoi.evaluation import Predicted

FORMAT = 1
_DTYPES = {
    "pairs": torch.float32,  # (p, 8) human and object box of each pair, image after image
    "pair_counts": torch.int32,  # (images,)
    "counts": torch.int32,  # (images,) triplets
    "pair": torch.int32,  # (t,) the pair of each triplet, from 0 within its image
    "interactions": torch.int16,  # (t,)
    "scores": torch.float32,  # (t,)
}


class Predictions(Sequence[Predicted]):
    """The images of a prediction file, in the order they were written. The boxes of an image are put
    together when it is asked for.

    table  the interactions the ids mean      facts  what the writer kept
    """

    def __init__(self, table: ClassTable, facts: dict[str, Any], names: list[str], held: dict[str, Tensor]):
        self.table, self.facts, self._names, self._held = table, facts, names, held
        self._pairs = [0, *held["pair_counts"].long().cumsum(0).tolist()]
        self._rows = [0, *held["counts"].long().cumsum(0).tolist()]
        self._at = {name: at for at, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self._names)

    @property
    def filenames(self) -> list[str]:
        return list(self._names)

    def of(self, filename: str) -> Predicted:
        """What was predicted in one image. Raises ValueError for one that is not in the file."""
        if filename not in self._at:
            raise ValueError(f"{filename} is not among the {len(self)} images that predictions were kept of")
        return self[self._at[filename]]

    @overload
    def __getitem__(self, index: int) -> Predicted: ...
    @overload
    def __getitem__(self, index: slice) -> list[Predicted]: ...
    def __getitem__(self, index: int | slice) -> Predicted | list[Predicted]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # counts from the end where it is negative
        held, rows = self._held, slice(self._rows[index], self._rows[index + 1])
        boxes = held["pairs"][self._pairs[index] : self._pairs[index + 1]][held["pair"][rows].long()]
        ids = held["interactions"][rows].long()
        return Predicted(self._names[index], boxes[:, :4], boxes[:, 4:], ids, held["scores"][rows])

    def __iter__(self) -> Iterator[Predicted]:
        return (self[i] for i in range(len(self)))


def save_predictions(
    predictions: Iterable[Predicted],
    path: str | os.PathLike[str],
    table: ClassTable,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write `predictions`, which may be a generator, and `facts` (JSON) to `path`.

    Raises ValueError for an image twice, for predictions that `Predicted.check` refuses, and for a table of
    more interactions than the format has room for.
    """
    path = Path(path)
    if len(table) > torch.iinfo(_DTYPES["interactions"]).max:
        raise ValueError(f"a prediction file holds ids of 16 bits; the table has {len(table)} interactions")
    names: dict[str, None] = {}
    parts: dict[str, list[Tensor]] = {
        name: [torch.zeros((0, 8) if name == "pairs" else (0,), dtype=dtype)]
        for name, dtype in _DTYPES.items()
    }
    for one in predictions:
        one.check(len(table))
        if one.filename in names:
            raise ValueError(f"{one.filename} is predicted twice")
        names[one.filename] = None
        pairs, pair = torch.cat([one.boxes_h, one.boxes_o], 1).float().unique(dim=0, return_inverse=True)
        sizes = torch.tensor([[len(pairs)], [len(one)]])
        found = (pairs, *sizes, pair, one.interactions, one.scores)
        for (name, dtype), part in zip(_DTYPES.items(), found, strict=True):
            parts[name].append(part.to(dtype))
    held = {name: torch.cat(parts.pop(name)) for name in _DTYPES}
    body = {
        "format": FORMAT,
        "table": table.to_json(),
        "filenames": list(names),
        "facts": dict(facts or {}),
        "checksum": _checksum(held, list(names)),
    }
    with writing_file(path) as beside:
        save_file(held, beside, metadata={"rankfold_predictions": json.dumps(body)})
    return path


def load_predictions(path: str | os.PathLike[str], table: ClassTable | None = None) -> Predictions:
    """What `save_predictions` wrote.

    Raises ValueError where the file is missing, is no such file, was damaged, or holds ids of another table
    than `table`: the message names what differs.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file of predictions")
    try:
        with safe_open(path, framework="pt") as handle:
            body = json.loads((handle.metadata() or {}).get("rankfold_predictions", "null"))
            held = {name: handle.get_tensor(name) for name in handle.keys()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); predict again") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT or set(held) != set(_DTYPES):
        raise ValueError(f"{path} does not hold rankfold predictions of format {FORMAT}")
    if _checksum(held, body["filenames"]) != body["checksum"]:
        raise ValueError(f"{path} was damaged: it has another checksum than when written; predict again")
    own = ClassTable.from_json(body["table"])
    if table is not None:
        table.check_same(own, f"the class table of {path}")
    return Predictions(own, body["facts"], body["filenames"], held)


def _checksum(held: Mapping[str, Tensor], names: list[str]) -> str:
    """SHA-256 (hex) of the names of the images and of all tensors."""
    sums = hashlib.sha256(json.dumps(names).encode())
    for name in sorted(held):
        sums.update(f"{name} {tuple(held[name].shape)} {held[name].dtype}".encode())
        sums.update(held[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return sums.hexdigest()
