"""What the pooling of a classifier read: the weight of every word of a text, head by head.

    weight of a word = sum of the weights of its pieces        words + elsewhere = 1 for every head
    ratio of a word  = T · weight / its number of pieces       1 = as much as if all T pieces were read alike

The ratio is what may be compared: between a word of one piece and one of five, between texts and models. At
temperature 1 LAMA's logits lie in [-1, 1], so no piece weighs more than e²/(e² + T - 1) and no ratio exceeds
e²: its readings are soft by construction. A weight says what was read, not what the answer came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.generate import device_of, evaluating

_UNBOUNDED = 10**9  # a tokenizer without a maximum has one beyond this
_NEEDS = (
    "Explain shows what a pooling read: one tensor (batch, heads, length), which the classifiers of rankfold "
    "with the pooler lama, self_attentive, multihead, additive or mean give. Self-attention between words, "
    "which other models give, is not that"
)


@dataclass(frozen=True, eq=False)
class Explanation:
    """What was read of one text, and what was answered.

    text           as it was given
    words          (start, end) of each word read, in characters of `text`; whole grapheme clusters
    pieces         the number of pieces of each word, as many numbers as words
    weights        (heads, words) float32: the sum over a word's pieces of what each head gave them
    elsewhere      (heads,) float32: what the heads gave to special tokens and to pieces that are only space
    read           (start, end) of the part of `text` that was read; the rest is beyond the maximum length
    length         T, the pieces read, special tokens included
    label          the class with the highest probability, None if the model gave no finite one
    probabilities  class name: probability, in the order of the classes
    truth          the true class, None if it was not given
    bound          the largest weight that one piece can have at this length, None where none is known
    reason         why there are no words, empty otherwise
    """

    text: str
    words: tuple[tuple[int, int], ...]
    pieces: tuple[int, ...]
    weights: Tensor
    elsewhere: Tensor
    read: tuple[int, int]
    length: int
    label: str | None
    probabilities: dict[str, float]
    truth: str | None = None
    bound: float | None = None
    reason: str = ""

    @property
    def uniform(self) -> float:
        """1/T, the weight of a piece if all were read alike; 0 where nothing was read."""
        return 1 / self.length if self.length else 0.0

    @property
    def ratios(self) -> Tensor:
        """(heads, words) float32: the weight of a word over n/T, what uniform reading gives its n pieces."""
        return self.weights * self.length / torch.tensor(self.pieces, dtype=torch.float32)

    def moved(self, weights: Tensor, elsewhere: Tensor) -> Tensor:
        """The part of weights (…, words) and `elsewhere` (…) that does not lie where uniform reading puts it:
        half of their distance in the l1 norm, 0 to 1."""
        uniform = torch.tensor(self.pieces, dtype=torch.float32) * self.uniform
        rest = 1 - uniform.sum()
        return (weights - uniform).clamp_min(0).sum(-1) + (elsewhere - rest).clamp_min(0)


def explanations(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    labels: Sequence[str | int] | None = None,
    max_length: int | None = None,
    batch_size: int = 16,
) -> list[Explanation]:
    """An `Explanation` of each text, in the order given; neither order nor batch size changes them.

    labels      the true classes, names or numbers of the model's config
    max_length  the pieces that are read of a text; by default the maximum of model and tokenizer

    Raises ValueError, before the texts are run, for a tokenizer that is not fast (it has no offsets), a label
    that is no class of the model, as many labels as not texts, a max_length beyond the model's positions, and
    a model that gives no weights of a pooling.
    """
    texts = list(texts)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"explain needs a fast tokenizer, which has offsets; {type(tokenizer).__name__} has none"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    names = _names(model)
    truths = _truths(labels, names, len(texts))
    limit = _limit(model, tokenizer, max_length)
    if not texts:
        return []
    parts = [_encoded(tokenizer, text, limit) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: len(parts[i].ids))
    done: dict[int, Explanation] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        weights, chances = _read(model, tokenizer, [parts[i] for i in rows])
        names = names or [str(j) for j in range(chances.shape[1])]
        for i, weight, chance in zip(rows, weights, chances, strict=True):
            done[i] = _explanation(
                texts[i], parts[i], weight, chance, names, truths[i], _bound(model, parts[i])
            )
    return [done[i] for i in range(len(texts))]


def _names(model: nn.Module) -> list[str]:
    """Class names in their order, empty for a model without a config."""
    table = getattr(getattr(model, "config", None), "id2label", None) or {}
    return [str(table[key]) for key in sorted(table, key=int)]


def _truths(labels: Sequence[str | int] | None, names: list[str], count: int) -> list[str | None]:
    if labels is None:
        return [None] * count
    if len(labels) != count:
        raise ValueError(f"{count} texts have {len(labels)} labels; give one label a text, or none at all")
    known = set(names)
    truths: list[str | None] = []
    for number, label in enumerate(labels, 1):
        if isinstance(label, int) and 0 <= label < len(names):
            label = names[label]
        if str(label) not in known:
            raise ValueError(
                f"label {number} is {label!r}, which is no class of the model: {', '.join(names)}"
            )
        truths.append(str(label))
    return truths


def _limit(model: nn.Module, tokenizer: Any, asked: int | None) -> int | None:
    """The most pieces that are read of a text, None for a model that reads any length."""
    config = getattr(model, "config", None)
    places = [getattr(c, "max_position_embeddings", None) for c in (config, getattr(config, "encoder", None))]
    positions = min((n for n in places if isinstance(n, int) and n > 0), default=None)
    frame = tokenizer.num_special_tokens_to_add()
    if asked is not None:
        if asked <= frame or (positions is not None and asked > positions):
            most = f" and at most {positions}, the positions of the model" if positions else ""
            raise ValueError(
                f"max_length={asked} must be at least {frame + 1} ({frame} special tokens and a piece){most}"
            )
        return asked
    known = [n for n in (positions, getattr(tokenizer, "model_max_length", None)) if n and n < _UNBOUNDED]
    return min(known, default=None)


def _encoded(tokenizer: Any, text: str, limit: int | None) -> Any:
    """The `tokenizers.Encoding` of a text. A lone surrogate, which no tokenizer takes, is read as U+FFFD."""
    text = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
    batch = tokenizer([text], truncation=limit is not None, max_length=limit, verbose=False)
    return batch.encodings[0]


def _read(model: nn.Module, tokenizer: Any, parts: list[Any]) -> tuple[list[Tensor], Tensor]:
    """What each text's pieces weigh, (heads, T) float32, and the probabilities (texts, classes) float32."""
    width = max(1, *(len(part.ids) for part in parts))
    pad = tokenizer.pad_token_id or 0
    columns = {"input_ids": ("ids", pad), "attention_mask": ("attention_mask", 0)}
    if "token_type_ids" in tokenizer.model_input_names:
        columns["token_type_ids"] = ("type_ids", 0)
    inputs = {
        key: torch.tensor(
            [(row := list(getattr(part, field))) + [fill] * (width - len(row)) for part in parts]
        ).to(device_of(model))
        for key, (field, fill) in columns.items()
    }
    with evaluating(model):
        output = model(**inputs, output_attentions=True)
    found = getattr(output, "attentions", None)
    weights = found[0] if isinstance(found, tuple | list) and len(found) == 1 else None
    if not isinstance(weights, Tensor) or weights.dim() != 3 or weights.shape[::2] != (len(parts), width):
        shapes = [str(tuple(x.shape)) for x in found or () if isinstance(x, Tensor)]
        seen = f"attentions of shape {', '.join(shapes)}" if shapes else "no attentions"
        raise ValueError(f"{type(model).__name__} gives {seen}. {_NEEDS}")
    if output.logits.shape[-1] < 2:
        raise ValueError(
            f"{type(model).__name__} has {output.logits.shape[-1]} class; explain needs at least 2"
        )
    weights = weights.float().cpu()
    cut = [weights[i, :, : len(part.ids)] for i, part in enumerate(parts)]
    return cut, output.logits.float().softmax(-1).cpu()


def _bound(model: nn.Module, part: Any) -> float | None:
    """The largest possible weight of a piece of this text, for a pooler that knows it."""
    bound = getattr(getattr(model, "pooler", None), "weight_bound", None)
    return float(bound(len(part.ids))) if bound is not None and part.ids else None


def _explanation(
    text: str,
    part: Any,
    weights: Tensor,
    chances: Tensor,
    names: list[str],
    truth: str | None,
    bound: float | None,
) -> Explanation:
    readable = bool(weights.isfinite().all())
    words, members = words_of(text, part.offsets, part.word_ids) if readable else ((), [])
    owner = torch.full((len(part.ids),), len(words))  # of each piece: its word, or what comes after the words
    for word, pieces in enumerate(members):
        owner[pieces] = word
    summed = torch.zeros(len(weights), len(words) + 1).index_add_(1, owner, weights)
    finite = bool(chances.isfinite().all())
    return Explanation(
        text=text,
        words=words,
        pieces=tuple(len(pieces) for pieces in members),
        weights=summed[:, :-1],
        elsewhere=summed[:, -1],
        read=_part_read(text, part, words),
        length=len(part.ids),
        label=names[int(chances.argmax())] if finite else None,
        probabilities=dict(zip(names, chances.tolist(), strict=True)),
        truth=truth,
        bound=bound,
        reason="" if words else _reason(text, part, readable),
    )


def _reason(text: str, part: Any, readable: bool) -> str:
    if not readable:
        return "the weights that the model gave are not finite"
    what = "empty" if not text else "without words" if text.strip() else "blank"
    answer = "only the tokens that frame every text" if part.ids else "nothing"
    return f"the text is {what}: the model read {answer}, and there is no word to explain"


def _part_read(text: str, part: Any, words: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The part of the text that was read: all of it, unless pieces were cut off on one side."""
    if not part.overflowing:
        return 0, len(text)
    if not words:
        return 0, 0
    left = any(end <= words[0][0] for other in part.overflowing for _, end in other.offsets if end)
    return (words[0][0], len(text)) if left else (0, words[-1][1])


def words_of(
    text: str, offsets: Sequence[tuple[int, int]], word_ids: Sequence[int | None]
) -> tuple[tuple[tuple[int, int], ...], list[list[int]]]:
    """The words of a text as (start, end), and the pieces that each is made of.

    offsets and word_ids are those of a fast tokenizer, one of each a piece. Space around a word is left out.
    A word grows to whole grapheme clusters, and words that then overlap are one: an emoji of several code
    points is not torn, nor a letter from its accents. Special tokens and mere space belong to no word.
    """
    import regex  # here: comes with transformers, which the core does without

    starts = [0] * len(text)  # of the cluster that holds each character
    ends = [0] * len(text)
    for cluster in regex.finditer(r"\X", text):
        for i in range(*cluster.span()):
            starts[i], ends[i] = cluster.span()
    spans: list[tuple[int, int]] = []
    members: list[list[int]] = []
    last: int | None = None
    for piece, ((start, end), word) in enumerate(zip(offsets, word_ids, strict=True)):
        start, end = _bare(text, start, end)
        if word is None or start == end:
            continue
        start, end = _bare(text, starts[start], ends[end - 1])  # a joiner after a space clings to the space
        if spans and (word == last or start < spans[-1][1]):
            spans[-1] = (min(spans[-1][0], start), max(spans[-1][1], end))
            members[-1].append(piece)
        else:
            spans.append((start, end))
            members.append([piece])
        last = word
    return tuple(spans), members


def _bare(text: str, start: int, end: int) -> tuple[int, int]:
    """A span without the space around it."""
    part = text[start:end]
    start += len(part) - len(part.lstrip())
    return start, start + len(part.strip())
