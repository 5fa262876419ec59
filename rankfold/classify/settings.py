"""What is trained and how, checked before anything is read: an option that a model has not is refused.

Sizes that are not given are those of DEFAULTS, found on the movie snippets (docs/classification.md); they are
ours and no paper's.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rankfold.linformer import SHARING
from rankfold.poolers import pooler

RECURRENT, TRANSFORMERS = ("lama", "gru"), ("dense", "linformer", "lrt")
SCRATCH = (*RECURRENT, *TRANSFORMERS)
_POOLING = ("heads", "rank_per_head", "context", "temperature")
_SIZES = ("vocabulary", "width", "layers", "dropout")
_WORDS = ("vectors", "embedding", "word_dropout")
_OPTIONS = {
    "lama": {*_POOLING, *_SIZES, *_WORDS},
    "gru": {"pooler", *_POOLING, *_SIZES, *_WORDS},
    "dense": {"pooler", *_POOLING, *_SIZES},
    "linformer": {"pooler", *_POOLING, *_SIZES, "k", "sharing"},
    "lrt": {"pooler", *_POOLING, *_SIZES, "rank"},
    "": {"pooler", *_POOLING},  # a model that is trained already
}


def options_of(model: str) -> set[str]:
    """The options of `Choice` that a model has."""
    return _OPTIONS.get(model, _OPTIONS[""])


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A model by name, and its options; None is the default of that model.

    model          one of SCRATCH, "minilm", a folder or a hub id
    pooler         of the states: a name in POOLERS. None: LAMA in "lama", else the mean; of a pretrained
                   model, its own head
    heads, rank_per_head, context, temperature  of that pooler
    rank           of "lrt", in every projection: an integer, or a share of break-even below 1
    k, sharing     of "linformer": how many positions are left, and what shares their projection
    vocabulary     entries of the wordpiece vocabulary that is trained on the training texts; with `vectors`
                   from a file: how many of its first words are kept beside those of the training texts
    vectors        word vectors to start from: a text file, or a model whose tokenizer and embedding table
                   are taken
    width          features of a state: per direction in "lama" and "gru"
    layers, embedding, dropout, word_dropout  sizes and shares
    """

    model: str = "lama"
    pooler: str | None = None
    heads: int | None = None
    rank_per_head: int | None = None
    context: str | None = None
    temperature: float | None = None
    rank: int | float | None = None
    k: int | None = None
    sharing: str | None = None
    vocabulary: int | None = None
    vectors: str | None = None
    width: int | None = None
    layers: int | None = None
    embedding: int | None = None
    dropout: float | None = None
    word_dropout: float | None = None

    def __post_init__(self) -> None:
        takes = options_of(self.model)
        for field in fields(self):
            name = field.name
            if name != "model" and getattr(self, name) is not None and name not in takes:
                known = ", ".join(_flag(item) for item in sorted(takes))
                raise ValueError(f"model {self.model!r} has no {_flag(name)}; it has {known}")
        for name in ("width", "layers", "embedding", "k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{_flag(name)} {value}: at least 1")
        for name in ("dropout", "word_dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{_flag(name)} {value}: a share, at least 0 and below 1")
        if self.vocabulary is not None and self.vocabulary < 100:
            raise ValueError(f"--vocabulary {self.vocabulary}: at least 100 entries")
        if self.sharing is not None and self.sharing not in SHARING:
            raise ValueError(f"--sharing {self.sharing!r}: one of {', '.join(SHARING)}")
        if self.embedding is not None and self.vectors is not None:
            raise ValueError("--embedding and --vectors: the vectors decide the size of an embedding")
        if self.vectors is not None and self.vectors.endswith((".bin", ".npy", ".pkl", ".pt")):
            raise ValueError(
                f"--vectors {self.vectors!r}: text files alone are read (GloVe, word2vec, fastText)"
            )
        if self.vectors is not None and self.vectors_file and not Path(self.vectors).is_file():
            raise ValueError(f"--vectors: no file '{self.vectors}'")
        if self.pooling is None:
            if given := [_flag(name) for name in _POOLING if getattr(self, name) is not None]:
                raise ValueError(f"{', '.join(given)}: of a pooler; name one with --pooler lama")
        else:
            pooler(self.pooling, 64, **self.pooler_options)  # says what is wrong with them
        near = difflib.get_close_matches(self.model, SCRATCH, 1, 0.75)
        if near and not self.scratch and not Path(self.model).exists():
            raise ValueError(f"no model {self.model!r}. Did you mean {near[0]!r}?")

    @property
    def scratch(self) -> bool:
        """Whether it is trained from random weights."""
        return self.model in SCRATCH

    @property
    def pooling(self) -> str | None:
        """The pooler's name; None: the head that a pretrained model has itself."""
        if self.pooler is not None or not self.scratch:
            return self.pooler
        return "lama" if self.model == "lama" else "mean"

    @property
    def pooler_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _POOLING if getattr(self, name) is not None}

    @property
    def vectors_file(self) -> bool:
        """Whether the vectors are a text file (a model's table otherwise)."""
        assert self.vectors is not None
        return self.vectors.endswith((".txt", ".vec", ".gz"))

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a classifier is trained. None is the default of its kind of model.

    length    tokens that a text is cut at; None: of images
    warmup    share of the steps in which the rate rises from 0; it then falls by a cosine to a tenth of `lr`
    best      which epoch is kept: "accuracy", the last one within a standard error of the highest (a smaller
              difference is none, and the later epoch had the smaller rate), or "loss", the lowest
    patience  epochs without a better one after which training ends; 0: never
    clip      norm that the gradients are clipped to; 0: not
    workers   processes that prepare batches beside the one that trains; they change no number
    """

    epochs: int
    lr: float
    batch_size: int
    length: int | None
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float = 1.0
    best: str = "accuracy"
    patience: int = 3
    seed: int = 0
    device: str = "cpu"
    workers: int = 0

    def __post_init__(self) -> None:
        lows = {"epochs": 1, "batch_size": 1, "length": 2, "patience": 0, "workers": 0}
        for name, low in lows.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{_flag(name)} {value}: at least {low}")
        for name, open_ in (("lr", True), ("weight_decay", False), ("clip", False)):
            value = getattr(self, name)
            if not (0 < value < math.inf or (value == 0 and not open_)):
                raise ValueError(
                    f"{_flag(name)} {value}: a finite number {'above' if open_ else 'of at least'} 0"
                )
        if not 0 <= self.warmup < 1:
            raise ValueError(f"--warmup {self.warmup}: the share of the steps, at least 0 and below 1")
        if self.best not in ("accuracy", "loss"):
            raise ValueError(f"--best {self.best!r}: accuracy or loss")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed {self.seed}: from 0 to 2^32 - 1")

    def to_json(self) -> dict[str, Any]:
        """What identifies the training: all that changes its losses."""
        return {key: value for key, value in asdict(self).items() if key != "workers"}


# By kind of model: from random weights, and from trained ones.
DEFAULTS: dict[bool, dict[str, Any]] = {
    True: {"epochs": 12, "lr": 2e-3, "batch_size": 32, "length": 256},
    False: {"epochs": 3, "lr": 5e-5, "batch_size": 32, "length": 128},
}


def training(choice: Choice, **given: Any) -> Training:
    """The settings that were given, and the defaults of that model for those that are None."""
    return Training(**DEFAULTS[choice.scratch] | {k: v for k, v in given.items() if v is not None})


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
