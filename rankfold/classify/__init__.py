"""Text classification from labelled examples to a model folder: train, predict, compare.

`rankfold classify` runs these; here they are functions with the same names and options.
"""

from __future__ import annotations

from rankfold.classify.comparing import compare
from rankfold.classify.examples import Examples, read
from rankfold.classify.predicting import Classifier, open_classifier, predict
from rankfold.classify.scores import confusion, scores
from rankfold.classify.settings import Choice, Training
from rankfold.classify.training import train

__all__ = [
    "Choice",
    "Classifier",
    "Examples",
    "Training",
    "compare",
    "confusion",
    "open_classifier",
    "predict",
    "read",
    "scores",
    "train",
]
