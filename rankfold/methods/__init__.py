"""Methods: one file for each way of turning a weight into a structure."""

from rankfold.methods.adapter import Adapter, LoRA, PiSSA, WaRA
from rankfold.methods.at_ranks import AtRanks
from rankfold.methods.dictionary import Dictionary
from rankfold.methods.scratch import Scratch
from rankfold.methods.svd import SVD

__all__ = ["SVD", "Adapter", "AtRanks", "Dictionary", "LoRA", "PiSSA", "Scratch", "WaRA"]
