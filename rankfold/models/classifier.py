"""A text classifier from any encoder: pool its states into one vector, then classify that.

    H = encoder(words)      s, A = pooler(H, mask)      logits = W₂ relu(W₁ s + b₁) + b₂

s is heads-major: s[:, i·d:(i+1)·d] is what head i saw. With a `RecurrentModel` and LAMA this is the whole
classifier of arXiv 1912.00835; the width of W₁ is not known from it, and is d here. The weights A over words
come back as `attentions`.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import SequenceClassifierOutput

from rankfold.hosts import hosts
from rankfold.manifest import recipe_of, stamp_
from rankfold.models.initial import draw_
from rankfold.models.reading import (
    check_ids,
    check_length,
    check_rates,
    check_sizes,
    traced,
    vocabulary_of,
    word_mask,
)
from rankfold.poolers import pooler


class ClassifierConfig(PreTrainedConfig):
    """An encoder, a pooler and a head.

    encoder           config of any encoder that `AutoModel` knows, or its dict
    pooler            "lama", or another name of `rankfold.poolers.POOLERS`, with `pooler_options`
    classifier_width  of the hidden layer; None: the encoder's width d; 0: no hidden layer
    dropout           of what was pooled, and of the hidden layer

    Labels are `num_labels`, or `id2label` and `label2id`.
    """

    model_type = "rankfold_classifier"
    sub_configs_defaults = {  # noqa: RUF012  transformers reads a dict
        "encoder": SubConfigSpec(AutoConfig, model_type="rankfold_gru")
    }

    encoder: Any = None
    pooler: str = "lama"
    pooler_options: dict[str, Any] | None = None
    classifier_width: int | None = None
    dropout: float = 0.0
    initializer_range: float = 0.02


class PooledForSequenceClassification(PreTrainedModel):
    """The classifier of `ClassifierConfig`.

    Raises ValueError for an unknown pooler and its options, fewer than two classes, another problem than one
    label for each text, and an encoder that is half of an encoder and decoder or does not say how wide it is.
    """

    config_class = ClassifierConfig
    base_model_prefix = "encoder"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # Trainer says how many labels a step has, over all it accumulates
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ClassifierConfig, encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        _check_labels(config)
        check_rates(dropout=config.dropout)
        width = _width(config.encoder)
        self.pooler = pooler(config.pooler, width, **(config.pooler_options or {}))
        hidden = width if config.classifier_width is None else config.classifier_width
        self.dense = None
        if hidden != 0:
            check_sizes(classifier_width=hidden)
            self.dense = nn.Linear(self.pooler.out_features, hidden)
        self.classifier = nn.Linear(hidden or self.pooler.out_features, cast(int, config.num_labels))
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = AutoModel.from_config(config.encoder) if encoder is None else encoder
        self.post_init()

    @classmethod
    def from_encoder(
        cls,
        encoder: PreTrainedModel,
        pooler: str = "lama",
        num_labels: int = 2,
        *,
        pooler_options: dict[str, Any] | None = None,
        classifier_width: int | None = None,
        dropout: float = 0.0,
        id2label: dict[int, str] | None = None,
        **options: Any,
    ) -> PooledForSequenceClassification:
        """A classifier on `encoder`, which it holds and does not copy: pretrained weights stay as they are.
        `id2label` names the classes and says how many. Raises ValueError as the constructor, and for a model
        that `AutoModel` would not make from its config, such as one with a head."""
        written = copy.deepcopy(encoder.config)
        vars(written).pop("quantization_config", None)  # which structures there are, the whole model says
        with torch.device("meta"):
            known = type(written) in MODEL_MAPPING
            found = type(AutoModel.from_config(copy.deepcopy(written))) if known else None
        if type(encoder) is not found:
            raise ValueError(
                f"{type(encoder).__name__} is not what AutoModel makes of its config; open the encoder with "
                "AutoModel.from_pretrained, or give the .base_model of a model with a head"
            )
        if id2label is not None:
            options |= {"id2label": id2label, "label2id": {name: i for i, name in id2label.items()}}
        else:
            options["num_labels"] = num_labels
        config = ClassifierConfig(
            encoder=written,
            pooler=pooler,
            pooler_options=pooler_options,
            classifier_width=classifier_width,
            dropout=dropout,
            **options,
        )
        for module in encoder.modules():  # post_init starts every module that is not marked
            cast(Any, module)._is_hf_initialized = True
        model = cls(config, encoder)
        if hosts(encoder):
            stamp_(model, recipe_of(encoder))
        return model

    def _init_weights(self, module: nn.Module) -> None:
        draw_(module, self.config.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **encoder_inputs: Any,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Logits (batch, classes) of input_ids (batch, length) or inputs_embeds (batch, length, e).

        attention_mask      (batch, length), not 0 at words; None: where the id is not the encoder's padding
        labels              (batch,) classes; the loss is their mean cross-entropy
        num_items_in_batch  divide the sum by this instead: what Trainer accumulates over several batches
        output_attentions   `attentions` is one tensor, the pooler's weights (batch, heads, length)
        encoder_inputs      passed on, such as token_type_ids

        A text without words pools to zeros: its logits are the head's own, the same for every such text.
        Raises ValueError for ids outside the vocabulary, a batch longer than the encoder reads, labels that
        are no class, and shapes that do not agree.
        """
        if input_ids is not None and input_ids.dim() == 2 and not input_ids.shape[1]:
            # A tokenizer makes this of a batch of empty texts, and not even of integers.
            pad = self.config.encoder.pad_token_id or 0
            input_ids = input_ids.new_full((input_ids.shape[0], 1), pad, dtype=torch.long)
            attention_mask, encoder_inputs = torch.zeros_like(input_ids), {}
        mask = word_mask(input_ids, inputs_embeds, attention_mask, self.config.encoder.pad_token_id)
        check_length(mask.shape[1], getattr(self.config.encoder, "max_position_embeddings", None))
        table = self.get_input_embeddings()
        if input_ids is not None and (size := vocabulary_of(table)) is not None:
            check_ids(input_ids, size)
        if labels is not None:
            self._check_classes(labels, mask.shape[0])
        if self.pooler.reads_embeddings and inputs_embeds is None:
            inputs_embeds, input_ids = table(input_ids), None
        # A softmax in the encoder needs something to see in a text without words; the pooler leaves it out.
        seen = (mask | ~mask.any(1, keepdim=True)).long()
        words = {"input_ids": input_ids} if input_ids is not None else {"inputs_embeds": inputs_embeds}
        states = self.encoder(**words, attention_mask=seen, **encoder_inputs)[0]
        pooled, weights = self.pooler(states, mask, inputs_embeds)
        hidden = self.dropout(pooled)
        if self.dense is not None:
            hidden = self.dropout(F.relu(self.dense(hidden)))
        logits = self.classifier(hidden)
        loss = None
        if labels is not None:
            count = labels.shape[0] if num_items_in_batch is None else num_items_in_batch
            loss = F.cross_entropy(logits.float(), labels, reduction="sum") / count
        shown = self.config.output_attentions if output_attentions is None else output_attentions
        out = SequenceClassifierOutput(
            loss=cast(Any, loss), logits=logits, attentions=(weights,) if shown else None
        )
        return cast(Any, out.to_tuple()) if return_dict is False else out

    def _check_classes(self, labels: Tensor, batch: int) -> None:
        if labels.shape != (batch,) or labels.is_floating_point():
            raise ValueError(
                f"labels are {labels.dtype} of shape {tuple(labels.shape)}; this model takes one integer for "
                f"each of {batch} texts"
            )
        if traced():
            return
        least, most = (int(x) for x in labels.aminmax())
        classes = self.classifier.out_features
        if least < 0 or most >= classes:
            raise ValueError(
                f"label {least if least < 0 else most}, but the model has {classes} classes, 0 to "
                f"{classes - 1}"
            )


def _check_labels(config: ClassifierConfig) -> None:
    if cast(int, config.num_labels) < 2:
        raise ValueError(
            f"num_labels={config.num_labels}: one class only, so there is nothing to tell apart; a "
            "classifier needs at least 2"
        )
    if config.problem_type not in (None, "single_label_classification"):
        raise ValueError(
            f"problem_type={config.problem_type!r}; this model gives each text one class "
            "('single_label_classification')"
        )


def _width(encoder: Any) -> int:
    """Features of the encoder's states."""
    if encoder.is_encoder_decoder:
        raise ValueError(f"{encoder.model_type!r} is an encoder and a decoder; give an encoder alone")
    width = getattr(encoder, "output_size", None) or getattr(encoder, "hidden_size", None)
    if not isinstance(width, int):
        raise ValueError(
            f"the config of {encoder.model_type!r} has no hidden_size, so its width is not known"
        )
    return width


__all__ = ["ClassifierConfig", "PooledForSequenceClassification"]
