"""From text to ids: a wordpiece vocabulary trained on one's own texts, or word vectors from a file.

Both tokenizers add no tokens of their own, know each token's offsets in the text, and split alike: runs of
letters, marks and digits; every Chinese or Japanese character; any other sign as a reader sees it, so that an
emoji of several code points is one. Text is composed (NFC): the offsets of a letter whose mark stands apart
cover the letter alone. [PAD] is 0 and [UNK] is 1.
"""

from __future__ import annotations

import gzip
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rankfold.structure import is_size

SPECIAL = ["[PAD]", "[UNK]"]

_ALONE = r"[\p{Han}\p{Hiragana}\p{Katakana}]"  # words are not separated by spaces
_LETTER = rf"(?:(?!{_ALONE})[\p{{L}}\p{{M}}\p{{N}}_\x{{200c}}\x{{200d}}])"
_PLAIN = rf"{_LETTER}+|\X"
_WHOLE = rf"{_LETTER}+(?:'{_LETTER}+)*|\X"  # don't
_PARTED = rf"(?i:{_LETTER}+?(?=n't(?!{_LETTER}))|n't(?!{_LETTER})|'(?:s|re|ve|ll|d|m)(?!{_LETTER}))|{_PLAIN}"


@dataclass(frozen=True, eq=False)
class WordVectors:
    """Words of a file in its order, and their vectors (n, e) in float32. `repeated` counts the lines left out
    because their word had been there."""

    words: list[str]
    vectors: Tensor
    repeated: int = 0


def train_wordpiece(
    texts: Iterable[str], size: int = 8000, *, lowercase: bool = True, max_length: int = 512
) -> PreTrainedTokenizerFast:
    """A wordpiece tokenizer of at most `size` tokens; the same for the same texts, in any process.

    lowercase   fold case
    max_length  tokens above which `truncation=True` cuts a text

    Of very many different characters the most frequent are kept; a word with another one is [UNK]. Raises
    ValueError for sizes out of range and where no text has a word in it.
    """
    for name, value, least in (("size", size, 16), ("max_length", max_length, 1)):
        if not is_size(value) or value < least:
            raise ValueError(f"{name}={value!r} of a vocabulary must be an integer of at least {least}")
    texts = checked(texts)
    draft = splitting(Tokenizer(models.WordPiece({}, unk_token="[UNK]")), _PLAIN, lowercase)
    counts = Counter(letter for text in texts for word in split(draft, text) for letter in word)
    if not counts:
        raise ValueError(f"no word in {len(texts)} texts: a vocabulary is learned from text")
    kept = sorted(counts, key=lambda letter: (-counts[letter], letter))[: (size - len(SPECIAL)) // 2]
    # The trainer numbers letters in the order of a hash map, which differs between processes, and breaks ties
    # by number. Special tokens get their numbers first; the tokenizer that is returned has only two of them.
    letters = sorted(kept) + ["##" + letter for letter in sorted(kept)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=2,
        show_progress=False,
        special_tokens=SPECIAL + letters,
        initial_alphabet=sorted(kept),
        limit_alphabet=len(kept),
    )
    draft.train_from_iterator(texts, trainer)
    trained = draft.get_vocab()
    ids = {token: i for i, token in enumerate(sorted(trained, key=lambda token: trained[token]))}
    model = models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=200)
    tokenizer = splitting(Tokenizer(model), _PLAIN, lowercase)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return finished(tokenizer, max_length)


def word_tokenizer(
    words: Collection[str], *, lowercase: bool | None = None, max_length: int = 512
) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a word, for the words of a vector file; any other word is [UNK].

    words      get ids from 2 on in their order ("[PAD]" and "[UNK]" keep 0 and 1)
    lowercase  fold case; None: where no word has a capital in it

    Contractions are split ("do n't") if the words hold "n't", else they stay whole. Raises ValueError where
    there is no word, and for a length out of range.
    """
    if isinstance(words, str) or not words:
        raise ValueError("a word tokenizer needs at least one word, in a list")
    if not is_size(max_length):
        raise ValueError(f"max_length={max_length!r} of a vocabulary must be an integer of at least 1")
    ids = {token: i for i, token in enumerate(SPECIAL)}
    for word in words:
        ids.setdefault(word, len(ids))
    if lowercase is None:
        lowercase = all(word == word.lower() for word in words if word not in SPECIAL)
    pattern = _PARTED if "n't" in ids else _WHOLE
    tokenizer = splitting(Tokenizer(models.WordLevel(ids, unk_token="[UNK]")), pattern, lowercase)
    return finished(tokenizer, max_length)


def text_words(texts: Iterable[str], *, lowercase: bool) -> set[str]:
    """The words that a `word_tokenizer` may look up in these texts: what to read of a large vector file."""
    splitters = [
        splitting(Tokenizer(models.WordLevel({})), pattern, lowercase) for pattern in (_PARTED, _WHOLE)
    ]
    return {word for text in checked(texts) for splitter in splitters for word in split(splitter, text)}


def read_vectors(
    path: str | Path, *, words: Collection[str] | None = None, limit: int | None = None
) -> WordVectors:
    """Word vectors from text: a word and its e numbers on a line (GloVe), with or without a first line "n e"
    (word2vec, fastText .vec), plain or gzip, in UTF-8.

    words  keep only these; lines of others are counted but their numbers not read
    limit  keep at most so many, from the start: files have frequent words first

    Of a word that comes twice the first vector is kept. Raises ValueError, with the number of the line, for
    another count of numbers, for what is no finite float32 and for what is not UTF-8; for a file that is
    empty, cut off or binary; and where none of `words` is in it.
    """
    path = Path(path)
    if limit is not None and not is_size(limit):
        raise ValueError(f"limit={limit!r} of word vectors must be a positive integer, or None for all")
    wanted = None if words is None else frozenset([words] if isinstance(words, str) else words)
    found: dict[str, int] = {}
    numbers, width, promised, seen, repeated = array("f"), 0, None, 0, 0
    for line, text in lines(path):
        fields = [field for field in text.split(" ") if field]
        if line == 1 and len(fields) == 2 and all(re.fullmatch("[0-9]{1,9}", field) for field in fields):
            promised, width = (int(field) for field in fields)
            continue
        width = width or len(list(takewhile(is_number, reversed(fields[1:]))))
        at = len(fields) - width
        # Fields between the word and its numbers belong to the word: some have a space in them.
        if width < 1 or at < 1 or text[0] == " " or any(map(is_number, fields[1:at])):
            raise ValueError(
                f"'{path}', line {line}: {len(fields) - 1} fields after the word {fields[0][:40]!r}, where "
                f"{width or 'some'} numbers are expected"
            )
        word, seen = " ".join(fields[:at]), seen + 1
        if wanted is not None and word not in wanted:
            continue
        if word in found:
            repeated += 1
            continue
        try:
            numbers.extend([float(field) for field in fields[at:]])
        except ValueError as error:
            raise ValueError(f"'{path}', line {line}: {error}") from error
        found[word] = line
        if len(found) == limit:
            break
    else:
        if promised is not None and seen != promised:
            raise ValueError(f"'{path}' holds {seen} vectors, its first line says {promised}: is it cut off?")
    if not seen:
        raise ValueError(f"'{path}' is empty: give a file with word vectors in it")
    if not found:
        raise ValueError(f"none of the {len(wanted or ())} wanted words is among the {seen} of '{path}'")
    vectors = torch.frombuffer(numbers, dtype=torch.float32).clone().view(-1, width)
    unfit = (~vectors.isfinite()).any(1).nonzero()
    if len(unfit):
        word = list(found)[int(unfit[0])]
        raise ValueError(f"'{path}', line {found[word]}: {word[:40]!r} has NaN, infinity or no float32")
    return WordVectors(list(found), vectors, repeated)


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines of a file that are not blank, unpacked if it is gzip. They end at a line
    feed alone, for words may hold what else Unicode counts as a line's end."""
    line = 0
    try:
        with path.open("rb") as file:
            start = file.read(2)
        if start == b"PK":
            raise ValueError(f"'{path}' is a zip archive; unpack it and give the text file in it")
        with gzip.open(path) if start == b"\x1f\x8b" else path.open("rb") as file:
            for line, raw in enumerate(file, 1):
                text = raw.decode("utf-8").replace("\t", " ").rstrip(" \r\n")
                text = text.removeprefix("\ufeff") if line == 1 else text
                if text:
                    yield line, text
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}', line {line}: not UTF-8; word vectors are text") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"'{path}' cannot be read, after line {line}: {error}") from error


def is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def splitting(tokenizer: Tokenizer, pattern: str, lowercase: bool) -> Tokenizer:
    """The tokenizer with our normalizer, and words where `pattern` finds them."""
    steps = [normalizers.NFC(), *([normalizers.Lowercase()] if lowercase else [])]
    if pattern is not _PLAIN:
        steps.append(normalizers.Replace("\u2019", "'"))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(pattern), "isolated")]
    )
    return tokenizer


def split(tokenizer: Tokenizer, text: str) -> list[str]:
    """The words of a text, as `tokenizer` normalizes and splits it."""
    normal = tokenizer.normalizer.normalize_str(text)
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]


def finished(tokenizer: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


def checked(texts: Iterable[str]) -> list[str]:
    texts = [texts] if isinstance(texts, str) else list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"text {i} is {type(text).__name__}, not a string")
    return texts
