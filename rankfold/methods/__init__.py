"""Methods: one file for each way of turning a weight into a structure."""

from rankfold.methods.adapter import Adapter, LoRA, PiSSA
from rankfold.methods.at_ranks import AtRanks
from rankfold.methods.class_pca import ClassPCA
from rankfold.methods.dictionary import Dictionary
from rankfold.methods.scratch import Scratch
from rankfold.methods.svd import SVD
from rankfold.methods.wavelets import TinyWaRA, WaRA, WaveFT

__all__ = [
    "SVD",
    "Adapter",
    "AtRanks",
    "ClassPCA",
    "Dictionary",
    "LoRA",
    "PiSSA",
    "Scratch",
    "TinyWaRA",
    "WaRA",
    "WaveFT",
]
