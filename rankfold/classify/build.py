"""The model that is trained, and its tokenizer: from random weights, from word vectors, or trained before.

lama, gru                a packed bidirectional GRU and a pooler
dense, linformer, lrt    a small transformer encoder and a pooler; "lrt" is low-rank from its first step
minilm, folder, hub id   a pretrained model, with a head for the classes at hand
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankfold import recipes
from rankfold.attention import SplitProjections
from rankfold.classify.settings import RECURRENT, Choice
from rankfold.factorize import factorize_
from rankfold.gguf import PACKAGED, packaged_model
from rankfold.models import (
    ClassifierConfig,
    PooledForSequenceClassification,
    RecurrentConfig,
    TransformerConfig,
)
from rankfold.models.vocabulary import read_vectors, text_words, train_wordpiece, word_tokenizer

# Sizes of what starts from random weights: ours, found on the movie snippets.
_RECURRENT = {"embedding": 200, "width": 100, "layers": 1, "dropout": 0.5, "word_dropout": 0.3}
_TRANSFORMER = {"width": 128, "layers": 2, "dropout": 0.2}
_VOCABULARY, _KEPT = 8000, 20_000
_RANK, _K = 0.25, 32
_RMS = 0.5  # of the entries of word vectors, given or drawn: one learning rate serves all of them


@dataclass
class Words:
    """A tokenizer, and what is known of its words: vectors (n, e) float32 for the ids (n,)."""

    tokenizer: Any
    vectors: Tensor | None = None
    ids: list[int] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def words(choice: Choice, texts: Sequence[str], length: int) -> Words:
    """The tokenizer of a model: trained on `texts`, that of its word vectors, or its own.

    Raises ValueError where there is none, or where it has nothing to pad with.
    """
    if not choice.scratch:
        return Words(_opened_tokenizer(choice.model))
    if choice.vectors is None:
        size = choice.vocabulary or _VOCABULARY
        tokenizer = train_wordpiece(texts, size=size, max_length=length)
        return Words(tokenizer, facts={"tokenizer": f"wordpiece, {len(tokenizer)} entries, trained here"})
    if choice.vectors_file:
        return _words_of_file(choice, texts, length)
    from transformers import AutoModel

    tokenizer = _opened_tokenizer(choice.vectors)
    try:
        table = AutoModel.from_pretrained(source(choice.vectors)).get_input_embeddings()
    except OSError as error:
        raise ValueError(f"--vectors {choice.vectors!r}: no model there ({_first(error)})") from error
    weight = table.weight if isinstance(table.weight, Tensor) else None
    if weight is None:
        raise ValueError(
            f"--vectors {choice.vectors!r}: its embedding table is factorized; name the original"
        )
    rows = min(len(tokenizer), len(weight))
    facts = {"tokenizer": f"that of {choice.vectors}", "vectors": rows, "vector_size": weight.shape[1]}
    return Words(tokenizer, _scaled(weight[:rows]), list(range(rows)), facts)


def _words_of_file(choice: Choice, texts: Sequence[str], length: int) -> Words:
    """Of a file, which may be large: its first words, the most frequent ones, and those of the texts."""
    assert choice.vectors is not None
    first = read_vectors(choice.vectors, limit=choice.vocabulary or _KEPT)
    lowercase = all(word == word.lower() for word in first.words)
    seen = text_words(texts, lowercase=lowercase)
    more = read_vectors(choice.vectors, words=seen)
    there = set(first.words)
    extra = [row for row, word in enumerate(more.words) if word not in there]
    every = [*first.words, *(more.words[row] for row in extra)]
    vectors = torch.cat([first.vectors, more.vectors[extra]]) if extra else first.vectors
    tokenizer = word_tokenizer(every, lowercase=lowercase, max_length=length)
    known = tokenizer.get_vocab()
    facts = {
        "tokenizer": f"words of {choice.vectors}",
        "vectors": len(every),
        "vector_size": vectors.shape[1],
        "training_words_known": len(more.words) / len(seen),
    }
    return Words(tokenizer, _scaled(vectors), [known[word] for word in every], facts)


def _scaled(vectors: Tensor) -> Tensor:
    return vectors.detach().float() * (_RMS / vectors.detach().float().square().mean().sqrt().clamp(min=1e-9))


def source(model: str) -> str:
    """The path or hub id of a pretrained model by its name."""
    if model not in PACKAGED:
        return model
    path = packaged_model(model)
    if Path(path).suffix == ".gguf":
        raise ValueError(f"model {model!r} writes text and is no encoder; 'minilm' is the packaged one")
    return str(path)


def _opened_tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source(model))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"no tokenizer for {model!r}: not a folder with one, not packaged, and the hub has none or could "
            f"not be asked ({_first(error)})"
        ) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {model!r} has no padding token, and no end token to pad with")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build(
    choice: Choice, known: Words, names: Sequence[str], *, seed: int, length: int, new_head: bool = False
) -> nn.Module:
    """The untrained classifier (or the trained one with a new head where its classes differ in number, or
    `new_head` says so), in float32.

    The same seed gives the same weights; torch's global random state is left as it was. Raises ValueError for
    a model that cannot be read or has no room for `length` tokens.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not choice.scratch:
            return _pretrained(choice, known.tokenizer, names, length, new_head)
        labels = {number: name for number, name in enumerate(names)}
        defaults = _RECURRENT if choice.model in RECURRENT else _TRANSFORMER
        sizes = {
            key: value if (given := getattr(choice, key)) is None else given
            for key, value in defaults.items()
        }
        pad = known.tokenizer.pad_token_id
        if choice.model in RECURRENT:
            wide = sizes["embedding"] if known.vectors is None else known.vectors.shape[1]
            encoder: Any = RecurrentConfig(
                vocab_size=len(known.tokenizer),
                embedding_size=wide,
                hidden_size=sizes["width"],
                num_layers=sizes["layers"],
                dropout=sizes["dropout"],
                word_dropout=sizes["word_dropout"],
                pad_token_id=pad,
                initializer_range=_RMS,
            )
        else:
            encoder = TransformerConfig(
                vocab_size=len(known.tokenizer),
                hidden_size=sizes["width"],
                intermediate_size=4 * sizes["width"],
                num_hidden_layers=sizes["layers"],
                num_attention_heads=heads_of(sizes["width"]),
                max_position_embeddings=length,
                dropout=sizes["dropout"],
                attention="linformer" if choice.model == "linformer" else "dense",
                k=min(choice.k or _K, length),
                sharing=choice.sharing or "headwise",
                pad_token_id=pad,
            )
        config = ClassifierConfig(
            encoder=encoder,
            pooler=choice.pooling or "mean",
            pooler_options=choice.pooler_options,
            dropout=sizes["dropout"],
            id2label=labels,
            label2id={name: number for number, name in labels.items()},
        )
        model = PooledForSequenceClassification(config)
        if known.vectors is not None:
            model.encoder.load_vectors_(known.vectors, known.ids)  # type: ignore[operator]
        if choice.model == "lrt":
            recipe = recipes.lrt(rank=_RANK if choice.rank is None else choice.rank)
            factorize_(model, recipe, targets=["encoder.layers.*"], seed=seed)
        return model


def heads_of(width: int) -> int:
    """Heads of a transformer of that width: of 32 features each, or as near as they divide it."""
    return max((n for n in range(1, max(width // 32, 1) + 1) if width % n == 0), default=1)


def _pretrained(
    choice: Choice, tokenizer: Any, names: Sequence[str], length: int, new_head: bool
) -> nn.Module:
    import transformers

    import rankfold.hf  # noqa: F401  folders that rankfold wrote load, whether or not autoload is on

    place = source(choice.model)
    try:
        config = transformers.AutoConfig.from_pretrained(place)
        check_fits(choice.model, config, length)
        if choice.pooler is not None:
            encoder = transformers.AutoModel.from_pretrained(place, dtype=torch.float32)
            labels: Any = {number: name for number, name in enumerate(names)}
            return PooledForSequenceClassification.from_encoder(
                encoder, choice.pooler, pooler_options=choice.pooler_options, id2label=labels
            )
    except OSError as error:
        raise _absent(choice.model, error) from error
    model = with_head(transformers.AutoModelForSequenceClassification, choice.model, names, new_head=new_head)
    if getattr(model.config, "pad_token_id", 0) is None:  # one that finds the end of a text by its padding
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


def with_head(auto: Any, model: str, names: Sequence[str], *, new_head: bool = False) -> Any:
    """A pretrained model with a head for `names`, in float32.

    auto      the class of transformers that opens it, such as AutoModelForImageClassification
    new_head  the head that it has is replaced by one from random numbers; False: it stays where it has as
              many classes, and only a missing one, or one of another size, is drawn

    Raises ValueError where there is no such model.
    """
    import rankfold.hf  # noqa: F401  see `_pretrained`

    labels: dict[int, str] = dict(enumerate(names))
    mapped = {"id2label": labels, "label2id": {name: number for number, name in labels.items()}}
    # A head is read as it is and replaced then: a folder with structures in it has no tensor of another
    # shape.
    own: dict[str, Any] = {} if new_head else {**mapped, "ignore_mismatched_sizes": True}
    try:
        net = auto.from_pretrained(source(model), dtype=torch.float32, **own)
    except OSError as error:
        raise _absent(model, error) from error
    if new_head:
        if net.base_model is net:
            raise ValueError(
                f"{model!r}: its head cannot be told from its other layers, to put a new one there"
            )
        net.config.id2label, net.config.label2id = mapped["id2label"], mapped["label2id"]
        fresh = auto.from_config(copy.deepcopy(net.config))
        for name, child in fresh.named_children():
            if name != net.base_model_prefix:
                setattr(net, name, child.float())
        net.num_labels = len(labels)
    net.config.problem_type = "single_label_classification"
    return net


def _absent(model: str, error: OSError) -> ValueError:
    return ValueError(
        f"no model {model!r}: not one that is trained here, not a folder with config.json, not packaged "
        f"({', '.join(PACKAGED)}), and the hub could not be asked ({_first(error)})"
    )


def check_fits(name: str, config: Any, length: int) -> None:
    """Raise ValueError where the model reads fewer than `length` tokens."""
    config = getattr(config, "encoder", None) or config
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and length > longest:
        raise ValueError(f"--length {length}: {name!r} reads at most {longest} tokens")


def attention_params(model: nn.Module) -> int | None:
    """Parameters that decide what attends to what: q, k, v, out (and Linformer's E and F) of every layer, and
    the pooler's own; None for a model whose attention is not of this package."""
    layers = [module for module in model.modules() if isinstance(module, SplitProjections)]
    own = getattr(model, "pooler", None)
    if not isinstance(model, PooledForSequenceClassification):
        return None
    unique = {id(p): p.numel() for module in layers for p in module.parameters()}
    return sum(unique.values()) + own.attention_params()  # type: ignore[union-attr]


def _first(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
