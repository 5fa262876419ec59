"""Encoders and a classifier that transformers opens by name, once this is imported.

    AutoModelForSequenceClassification.from_pretrained("out")    # with rankfold installed, no import

`rankfold.autoload` imports this the first time transformers meets one of these model types.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from rankfold.models.classifier import ClassifierConfig, PooledForSequenceClassification
from rankfold.models.recurrent import RecurrentConfig, RecurrentModel
from rankfold.models.transformer import TransformerConfig, TransformerModel

MODELS = {
    model.__name__: model for model in (RecurrentModel, TransformerModel, PooledForSequenceClassification)
}


def register() -> None:
    """Make the Auto classes know these models. Idempotent."""
    for model in MODELS.values():
        auto = AutoModelForSequenceClassification if model is PooledForSequenceClassification else AutoModel
        config: Any = model.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        auto.register(config, model, exist_ok=True)


register()

__all__ = [
    "MODELS",
    "ClassifierConfig",
    "PooledForSequenceClassification",
    "RecurrentConfig",
    "RecurrentModel",
    "TransformerConfig",
    "TransformerModel",
    "register",
]
