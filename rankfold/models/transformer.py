"""A transformer encoder for classification: dense or Linformer attention, and low rank where it is asked for.

    x ← x + attention(norm(x))        x ← x + W₂ gelu(W₁ norm(x))        positions are learned vectors

q, k, v and out are four linear layers, so that the Low-Rank Transformer is this model and one call before it
is trained: `factorize_(model, recipes.lrt(rank=…))`. A layer of width d and ffn f has
4d² + 2df + 9d + f parameters; with Linformer attention, E and F of at most 2nk more, or as they are shared.
[Low-Rank Transformer: arXiv 1910.13923; Linformer: arXiv 2006.04768]
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput

from rankfold.attention import MultiheadAttention
from rankfold.linformer import LinformerAttention, share_positions_
from rankfold.models.initial import draw_
from rankfold.models.reading import (
    check_ids,
    check_length,
    check_rates,
    check_sizes,
    moved,
    word_mask,
    words_first,
)

ATTENTIONS = ("dense", "linformer")


class TransformerConfig(PreTrainedConfig):
    """Sizes of a `TransformerModel`.

    attention          "dense", or "linformer": over k mixtures of the positions
    k, sharing         of Linformer attention only; sharing "none", "headwise", "kv" or "layerwise"
    dropout            of embeddings, attention weights and what each part adds
    initializer_range  s.d. of fresh word and position vectors
    """

    model_type = "rankfold_transformer"

    vocab_size: int = 8000
    hidden_size: int = 128
    intermediate_size: int = 512
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    max_position_embeddings: int = 512
    dropout: float = 0.1
    attention: str = "dense"
    k: int = 64
    sharing: str = "headwise"
    pad_token_id: int | None = 0
    initializer_range: float = 0.02


class TransformerLayer(GradientCheckpointingLayer):
    """Attention and a feed-forward network, each after a norm and added to its input."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d, heads = config.hidden_size, config.num_attention_heads
        self.self_attn: MultiheadAttention | LinformerAttention
        if config.attention == "linformer":
            self.self_attn = LinformerAttention(
                d,
                heads,
                config.max_position_embeddings,
                config.k,
                sharing=config.sharing,
                dropout=config.dropout,
                batch_first=True,
            )
        else:
            self.self_attn = MultiheadAttention(d, heads, config.dropout, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.fc1 = nn.Linear(d, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, d)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """x (batch, length, d), padding (batch, length) bool, True where no word is."""
        y = self.norm1(x)
        x = x + self.dropout(self.self_attn(y, y, y, key_padding_mask=padding, need_weights=False)[0])
        return x + self.dropout(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class TransformerModel(PreTrainedModel):
    """The encoder of `TransformerConfig`. Raises ValueError for sizes, attention and sharing out of range,
    and for a decoder."""

    config_class = TransformerConfig
    base_model_prefix = "encoder"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerLayer"]  # noqa: RUF012  transformers reads a list
    _tied_weights_keys = {  # noqa: RUF012
        r"layers\.(?:[1-9]\d*)\.self_attn\.E": "layers.0.self_attn.E"  # where sharing is layerwise
    }

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        if config.attention not in ATTENTIONS:
            raise ValueError(f"attention={config.attention!r} is not one of {', '.join(ATTENTIONS)}")
        if getattr(config, "is_decoder", False):
            raise ValueError(
                "is_decoder=True: this model reads a whole text at once and cannot be causal; use a causal "
                "language model"
            )
        check_sizes(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            max_position_embeddings=config.max_position_embeddings,
        )
        check_rates(dropout=config.dropout)
        d = config.hidden_size
        self.embeddings = nn.Embedding(config.vocab_size, d, padding_idx=config.pad_token_id)
        self.positions = nn.Embedding(config.max_position_embeddings, d)
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(d)
        self.dropout = nn.Dropout(config.dropout)
        if self._layerwise():
            share_positions_(self)
        self.post_init()

    def _layerwise(self) -> bool:
        return self.config.attention == "linformer" and self.config.sharing == "layerwise"

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """{key: the key of the same tensor}: the one E of layerwise sharing, and else nothing."""
        if all_submodels:
            return super().get_expanded_tied_weights_keys(all_submodels=True)
        if not self._layerwise():
            return {}
        first = "layers.0.self_attn.E"
        return {f"layers.{i}.self_attn.E": first for i in range(1, self.config.num_hidden_layers)}

    def _init_weights(self, module: nn.Module) -> None:
        draw_(module, self.config.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
        **ignored: Any,
    ) -> BaseModelOutput | tuple[Tensor]:
        """States (batch, length, d) of input_ids (batch, length) or inputs_embeds (batch, length, d).

        attention_mask  (batch, length), not 0 at words; None: where the id is not `pad_token_id`
        ignored         what tokenizers give other models, such as token_type_ids

        Padding is zeros, and so is a row without a word. Raises ValueError for ids outside the vocabulary, a
        batch longer than `max_position_embeddings`, and shapes that do not agree.
        """
        mask = word_mask(input_ids, inputs_embeds, attention_mask, self.config.pad_token_id)
        check_length(mask.shape[1], self.config.max_position_embeddings)
        if inputs_embeds is None:
            assert input_ids is not None
            check_ids(input_ids, self.config.vocab_size)
            inputs_embeds = cast(Tensor, self.embeddings(input_ids))
        place, order = words_first(mask)
        here = torch.arange(mask.shape[1], device=mask.device)
        x = self.dropout(moved(inputs_embeds, order) + self.positions(here))
        lengths = mask.sum(1, keepdim=True)
        # A softmax needs something to see: a row without a word sees its padding, and is made zeros below.
        padding = (here >= lengths) & (lengths > 0)
        for layer in self.layers:
            x = layer(x, padding)
        states = moved(self.norm(x), place) * mask.unsqueeze(-1)
        return (states,) if return_dict is False else BaseModelOutput(last_hidden_state=cast(Any, states))
