"""Methods: one file for each way of turning a weight into a structure."""

from rankfold.methods.dictionary import Dictionary
from rankfold.methods.svd import SVD

__all__ = ["SVD", "Dictionary"]
