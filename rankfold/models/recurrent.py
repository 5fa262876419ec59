"""A bidirectional GRU over word vectors, as an encoder that the Auto classes know.

    H[t] = [ GRU→(x₁ … x_t) ; GRU←(x_n … x_t) ]        H (B, T, 2h), zeros at padding

The backward direction starts at the last word of its own row, so padding on either side changes nothing. One
layer has 2(3he + 3h² + 6h) parameters. On a GPU the rows are packed. On a CPU, where that takes longer
(benchmarks/recurrent.py), and for export, which knows no packing, the backward direction reads each row's
words in reverse order: the same weights, the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from rankfold.models.initial import draw_
from rankfold.models.reading import check_ids, check_rates, check_sizes, moved, word_mask, words_first


class RecurrentConfig(PreTrainedConfig):
    """Sizes of a `RecurrentModel`.

    embedding_size     e of a word vector
    hidden_size        h of each direction: a state has 2h features (`output_size`)
    dropout            of word vectors and of states, and between layers
    word_dropout       of whole words, in training
    initializer_range  s.d. of fresh word vectors
    """

    model_type = "rankfold_gru"

    vocab_size: int = 8000
    embedding_size: int = 300
    hidden_size: int = 100
    num_layers: int = 1
    dropout: float = 0.0
    word_dropout: float = 0.0
    pad_token_id: int | None = 0
    initializer_range: float = 0.1

    @property
    def output_size(self) -> int:
        """Features of a state: both directions."""
        return 2 * self.hidden_size


class RecurrentModel(PreTrainedModel):
    """The encoder of `RecurrentConfig`. Raises ValueError for sizes and probabilities out of range."""

    config_class = RecurrentConfig
    base_model_prefix = "encoder"
    main_input_name = "input_ids"

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__(config)
        check_sizes(
            vocab_size=config.vocab_size,
            embedding_size=config.embedding_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
        )
        check_rates(dropout=config.dropout, word_dropout=config.word_dropout)
        self.embeddings = nn.Embedding(
            config.vocab_size, config.embedding_size, padding_idx=config.pad_token_id
        )
        between = config.dropout if config.num_layers > 1 else 0.0
        self.rnn = nn.GRU(
            config.embedding_size,
            config.hidden_size,
            config.num_layers,
            batch_first=True,
            dropout=between,
            bidirectional=True,
        )
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        draw_(module, self.config.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    @torch.no_grad()
    def load_vectors_(self, vectors: Tensor, ids: Sequence[int] | Tensor) -> RecurrentModel:
        """Write `vectors` (n, e) into the rows `ids` (n) of the table, in place; returns the model. Raises
        ValueError for another width or count, for NaN or infinite numbers and for ids outside the vocabulary.
        """
        table = self.embeddings.weight
        if not isinstance(table, Tensor):
            raise ValueError("the word vectors are factorized; load vectors first, and factorize then")
        ids = torch.as_tensor(ids, dtype=torch.long, device=table.device)
        if vectors.dim() != 2 or vectors.shape[1] != table.shape[1]:
            raise ValueError(
                f"vectors have shape {tuple(vectors.shape)}; the table of this model is {table.shape[1]} "
                "wide (embedding_size)"
            )
        if ids.shape != vectors.shape[:1]:
            raise ValueError(f"{vectors.shape[0]} vectors for {ids.numel()} ids")
        if not bool(vectors.isfinite().all()):
            raise ValueError("the vectors hold NaN or infinite numbers")
        check_ids(ids, table.shape[0])
        table[ids] = vectors.to(table)
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
        **ignored: Any,
    ) -> BaseModelOutput | tuple[Tensor]:
        """States (batch, length, 2h) of input_ids (batch, length) or inputs_embeds (batch, length, e).

        attention_mask  (batch, length), not 0 at words; None: where the id is not `pad_token_id`
        ignored         what tokenizers give other models, such as token_type_ids

        A row without a word is zeros. Raises ValueError for ids outside the vocabulary and for shapes that do
        not agree.
        """
        mask = word_mask(input_ids, inputs_embeds, attention_mask, self.config.pad_token_id)
        if inputs_embeds is None:
            assert input_ids is not None
            check_ids(input_ids, self.config.vocab_size)
            inputs_embeds = cast(Tensor, self.embeddings(input_ids))
        x = self.dropout(self._words_dropped(inputs_embeds))
        if not x.shape[1]:
            states = x.new_zeros(*x.shape[:2], self.config.output_size)
        else:
            place, order = words_first(mask)
            run = self._packed if x.is_cuda and not torch.compiler.is_exporting() else self._gathered
            states = moved(run(moved(x, order), mask.sum(1)), place)
            states = self.dropout(states) * mask.unsqueeze(-1)
        return (states,) if return_dict is False else BaseModelOutput(last_hidden_state=cast(Any, states))

    def _words_dropped(self, x: Tensor) -> Tensor:
        if not self.training or not self.config.word_dropout:
            return x
        return x * F.dropout(x.new_ones(*x.shape[:2], 1), self.config.word_dropout)

    def _packed(self, x: Tensor, lengths: Tensor) -> Tensor:
        """States of rows whose words come first. A packed row has at least one word: an empty one reads its
        padding, and the mask makes that zeros."""
        # The lengths of a packed sequence live on the CPU, whatever the model is on.
        packed = pack_padded_sequence(x, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
        self.rnn.flatten_parameters()
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])[0]

    def _gathered(self, x: Tensor, lengths: Tensor) -> Tensor:
        """The same without packing: backward is forward over each row's words reversed."""
        here = torch.arange(x.shape[1], device=x.device)
        ends = lengths.unsqueeze(1)
        reverse = torch.where(here < ends, ends - 1 - here, here)
        for layer in range(self.config.num_layers):
            if layer:
                x = F.dropout(x, self.rnn.dropout, self.training)
            there = self._direction(x, f"l{layer}")
            back = moved(self._direction(moved(x, reverse), f"l{layer}_reverse"), reverse)
            x = torch.cat([there, back], -1)
        return x

    def _direction(self, x: Tensor, suffix: str) -> Tensor:
        weights = [
            cast(Tensor, getattr(self.rnn, f"{kind}_{suffix}"))
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ]
        if torch.compiler.is_exporting():
            return torch.ops.rankfold.gru_direction(x, *weights)
        return _run(x, weights)


def _run(x: Tensor, weights: list[Tensor]) -> Tensor:
    start = x.new_zeros(1, x.shape[0], weights[1].shape[1])
    return torch.gru(x, start, weights, True, 1, 0.0, False, False, True)[0]


@torch.library.custom_op("rankfold::gru_direction", mutates_args=())
def gru_direction(
    x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor
) -> Tensor:
    """States (batch, length, h) of one layer in one direction, from zero: one node of an exported graph, for
    any length. (Export would unroll torch's own, word by word.)"""
    return _run(x, [weight_ih, weight_hh, bias_ih, bias_hh]).contiguous()


@gru_direction.register_fake
def _(x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], weight_hh.shape[1])
