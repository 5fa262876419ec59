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
    "Wavelet": "wavelet",
    "LoRA": "methods",
    "WaRA": "methods",
    "TinyWaRA": "methods",
    "WaveFT": "methods",
    "ClassPCA": "methods",
    "PiSSA": "methods",
    "freeze_": "adapters",
    "trainable": "adapters",
    "merge_": "adapters",
    "TokenWara": "token_wavelet",
    "token_wara_": "token_wavelet",
    "save_adapter": "adapter_file",
    "load_adapter_": "adapter_file",
    "save_as_lora": "lora",
    "load_lora_": "lora_load",
    "extract_lora_": "extract",
    "convert_": "convert",
    "LamaPooling": "pooling",
    "Pooling": "pooling",
    "diversity_penalty": "pooling",
    "pooler": "poolers",
    "export_onnx": "onnx",
}
_MODULES = ("allocate", "checkpoint", "evaluate", "hf", "metrics", "recipes", "report", "testing", "data")

if TYPE_CHECKING:
    from rankfold import allocate, checkpoint, data, evaluate, hf, metrics, recipes, report, testing
    from rankfold.adapter_file import load_adapter_, save_adapter
    from rankfold.adapters import freeze_, merge_, trainable
    from rankfold.automatic import auto_
    from rankfold.batch_norm import recalibrate_
    from rankfold.checkpoint import load_, save, to_dense_, verify
    from rankfold.convert import convert_
    from rankfold.cut import cut_
    from rankfold.extract import extract_lora_
    from rankfold.factorize import calibrate, factorize_
    from rankfold.groups import Groups
    from rankfold.layers import Layer, replace_, select
    from rankfold.linformer import LinformerAttention
    from rankfold.lora import save_as_lora
    from rankfold.lora_load import load_lora_
    from rankfold.method import Curve, DecompositionError, Method
    from rankfold.methods import SVD, ClassPCA, Dictionary, LoRA, PiSSA, Scratch, TinyWaRA, WaRA, WaveFT
    from rankfold.metric import Metric
    from rankfold.metrics import KFAC, AbsMean, Activation, Calibration, Fisher, Frobenius
    from rankfold.onnx import export_onnx
    from rankfold.ordered_dropout import OrderedDropout
    from rankfold.poolers import pooler
    from rankfold.pooling import LamaPooling, Pooling, diversity_penalty
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
    from rankfold.token_wavelet import TokenWara, token_wara_
    from rankfold.truncate import Truncate
    from rankfold.wavelet import Wavelet

__all__ = [
    "KFAC",
    "SVD",
    "AbsMean",
    "Activation",
    "Calibration",
    "ClassPCA",
    "Curve",
    "DecompositionError",
    "Dense",
    "Dictionary",
    "Fisher",
    "Frobenius",
    "Groups",
    "LamaPooling",
    "Layer",
    "LinformerAttention",
    "LoRA",
    "LowRank",
    "Method",
    "Metric",
    "OrderedDropout",
    "PiSSA",
    "Pooling",
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
    "TinyWaRA",
    "TokenWara",
    "Truncate",
    "WaRA",
    "WaveFT",
    "Wavelet",
    "allocate",
    "auto_",
    "build",
    "calibrate",
    "checkpoint",
    "convert_",
    "cut_",
    "data",
    "diversity_penalty",
    "evaluate",
    "export_onnx",
    "extract_lora_",
    "factorize_",
    "freeze_",
    "hf",
    "load_",
    "load_adapter_",
    "load_lora_",
    "merge_",
    "metrics",
    "pooler",
    "recalibrate_",
    "recipes",
    "replace_",
    "report",
    "save",
    "save_adapter",
    "save_as_lora",
    "select",
    "store_values_",
    "testing",
    "to_dense_",
    "token_wara_",
    "trainable",
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
