"""rankfold: factorized weights for PyTorch. Compress a trained network, reload it anywhere, see what it cost.

    import rankfold
    report = rankfold.factorize_(model, rankfold.recipes.best, budget=0.8, batches=ids)
    rankfold.save(model, "out", report=report)

Importing this does no work: every name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Structure": "structure",
    "build": "structure",
    "Dense": "structures",
    "LowRank": "structures",
    "Sum": "structures",
    "Sparse": "sparse",
    "SparseCode": "sparse_code",
    "Layer": "layers",
    "select": "layers",
    "replace_": "layers",
    "Metric": "metric",
    "Method": "method",
    "Curve": "method",
    "DecompositionError": "method",
    "SVD": "methods",
    "Dictionary": "methods",
    "Scratch": "methods",
    "Frobenius": "metrics",
    "Activation": "metrics",
    "AbsMean": "metrics",
    "Fisher": "metrics",
    "KFAC": "metrics",
    "Calibration": "metrics",
    "Groups": "groups",
    "Recipe": "recipe",
    "store_values_": "storage",
    "Regime": "regime",
    "OrderedDropout": "ordered_dropout",
    "Truncate": "truncate",
    "StraightThrough": "straight_through",
    "StepInBackward": "step_in_backward",
    "recalibrate_": "batch_norm",
    "cut_": "cut",
    "auto_": "automatic",
    "LinformerAttention": "linformer",
    "calibrate": "factorize",
    "factorize_": "factorize",
    "Report": "report",
    "save": "checkpoint",
    "load_": "checkpoint",
    "to_dense_": "checkpoint",
    "verify": "checkpoint",
}
_MODULES = ("allocate", "checkpoint", "evaluate", "hf", "metrics", "recipes", "report", "testing", "data")

if TYPE_CHECKING:
    from rankfold import allocate, checkpoint, data, evaluate, hf, metrics, recipes, report, testing
    from rankfold.automatic import auto_
    from rankfold.batch_norm import recalibrate_
    from rankfold.checkpoint import load_, save, to_dense_, verify
    from rankfold.cut import cut_
    from rankfold.factorize import calibrate, factorize_
    from rankfold.groups import Groups
    from rankfold.layers import Layer, replace_, select
    from rankfold.linformer import LinformerAttention
    from rankfold.method import Curve, DecompositionError, Method
    from rankfold.methods import SVD, Dictionary, Scratch
    from rankfold.metric import Metric
    from rankfold.metrics import KFAC, AbsMean, Activation, Calibration, Fisher, Frobenius
    from rankfold.ordered_dropout import OrderedDropout
    from rankfold.recipe import Recipe
    from rankfold.regime import Regime
    from rankfold.report import Report
    from rankfold.sparse import Sparse
    from rankfold.sparse_code import SparseCode
    from rankfold.step_in_backward import StepInBackward
    from rankfold.storage import store_values_
    from rankfold.straight_through import StraightThrough
    from rankfold.structure import Structure, build
    from rankfold.structures import Dense, LowRank, Sum
    from rankfold.truncate import Truncate

__all__ = [
    "KFAC",
    "SVD",
    "AbsMean",
    "Activation",
    "Calibration",
    "Curve",
    "DecompositionError",
    "Dense",
    "Dictionary",
    "Fisher",
    "Frobenius",
    "Groups",
    "Layer",
    "LinformerAttention",
    "LowRank",
    "Method",
    "Metric",
    "OrderedDropout",
    "Recipe",
    "Regime",
    "Report",
    "Scratch",
    "Sparse",
    "SparseCode",
    "StepInBackward",
    "StraightThrough",
    "Structure",
    "Sum",
    "Truncate",
    "allocate",
    "auto_",
    "build",
    "calibrate",
    "checkpoint",
    "cut_",
    "data",
    "evaluate",
    "factorize_",
    "hf",
    "load_",
    "metrics",
    "recalibrate_",
    "recipes",
    "replace_",
    "report",
    "save",
    "select",
    "store_values_",
    "testing",
    "to_dense_",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"rankfold.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"rankfold.{_HOME[name]}"), name)
    raise AttributeError(f"module 'rankfold' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})
