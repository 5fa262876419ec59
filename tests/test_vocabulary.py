"""Wordpiece vocabularies, word vectors from files, and what is wrong with a file."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from rankfold.models.vocabulary import read_vectors, text_words, train_wordpiece, word_tokenizer

TEXTS = [
    "A gripping film, and a good one! I'd see it again.",
    "Not a good film; I don't want to see it again 😀😀.",
    "Ein schöner Film über Züge und Zugvögel, über Berge.",
    "فيلم جميل جدا، مرحبا بِكَ في الفيلم",
    "סרט יפה מאוד, סרט מרגש מאוד",
    "这部电影很好看 この映画が好き",
    "The family 👨‍👩‍👧 liked the family film 👍🏽 👨‍👩‍👧 👍🏽",
]


def pieces(tokenizer: Any, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


def parts(tokenizer: Any, text: str) -> list[str]:
    """What the offsets cut out of the text."""
    return [text[a:b] for a, b in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]]


@pytest.fixture(scope="module")
def wordpiece() -> Any:
    return train_wordpiece(TEXTS, 300)


# --- Wordpiece -------------------------------------------------------------------------------------------


def test_wordpiece_ids(wordpiece: Any) -> None:
    vocabulary = wordpiece.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(wordpiece))) and len(wordpiece) <= 300
    assert (wordpiece.pad_token_id, wordpiece.unk_token_id) == (0, 1)
    assert sorted(wordpiece.all_special_tokens) == ["[PAD]", "[UNK]"]
    assert pieces(wordpiece, "Good FILM") == ["good", "film"]  # learned whole; nothing added around
    batch = wordpiece(["good", "a good film"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert wordpiece("")["input_ids"] == [] and wordpiece("  \n")["input_ids"] == []
    assert wordpiece("ŷ good")["input_ids"][0] == 1  # a letter that was not there
    assert wordpiece.decode(wordpiece("a good film again")["input_ids"]) == "a good film again"


def test_wordpiece_offsets(wordpiece: Any) -> None:
    """They tile every word of the text, whatever its script, composition and case."""
    for text in [*TEXTS, "ZÜGE\u00a0über", "İstanbul FILM", "a" * 300]:
        encoded = wordpiece(text, return_offsets_mapping=True)
        covered = "".join(text[a:b] for a, b in encoded["offset_mapping"])
        assert covered == "".join(text.split()), text
        assert encoded["offset_mapping"] == sorted(encoded["offset_mapping"])
    assert parts(wordpiece, "the FILM, again") == ["the", "FILM", ",", "again"]
    # Of a letter that is composed on reading, they cover the base: the mark is between two tokens.
    assert "".join(parts(wordpiece, "scho\u0308ner film")) == "schonerfilm"


def test_signs_and_scripts_survive(wordpiece: Any) -> None:
    for text in TEXTS:
        assert wordpiece.unk_token_id not in wordpiece(text)["input_ids"], text
    splitter = wordpiece.backend_tokenizer.pre_tokenizer

    def split(text: str) -> list[str]:
        return [word for word, _ in splitter.pre_tokenize_str(text)]

    assert split("great👨‍👩‍👧🎉👍🏽!!") == ["great", "👨‍👩‍👧", "🎉", "👍🏽", "!", "!"]
    assert split("🇩🇪🇫🇷") == ["🇩🇪", "🇫🇷"]
    assert split("שלום, مرحبا بِكَ می\u200cخواهم") == ["שלום", ",", "مرحبا", "بِكَ", "می\u200cخواهم"]  # noqa: RUF001
    assert split("我喜欢this映画が") == ["我", "喜", "欢", "this", "映", "画", "が"]
    assert split("don't <br/>") == ["don", "'", "t", "<", "br", "/", ">"]


def test_case_and_composition() -> None:
    folded, kept = train_wordpiece(TEXTS, 300), train_wordpiece(TEXTS, 300, lowercase=False)
    assert folded("Film")["input_ids"] == folded("film")["input_ids"]
    assert kept("Film")["input_ids"] != kept("film")["input_ids"]
    assert kept("scho\u0308ner")["input_ids"] == kept("sch\u00f6ner")["input_ids"]


PROBE = """
import hashlib, json, sys
from rankfold.models.vocabulary import train_wordpiece
tokenizer = train_wordpiece(json.load(sys.stdin), 200)
print(hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest())
"""


def test_same_texts_same_tokenizer() -> None:
    """In another process too, where hash maps have another order."""
    texts = [f"{a}{b}{c} {c}{b} {a}{c}{c}" for a in "abcdefg" for b in "hijklm" for c in "nopqrs"] + TEXTS
    found = {
        subprocess.run(
            [sys.executable, "-c", PROBE], input=json.dumps(texts), capture_output=True, text=True, check=True
        ).stdout.strip()
    }
    for _ in range(3):
        tokenizer = train_wordpiece(texts, 200)
        assert len(tokenizer) == 200
        found.add(hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest())
    assert len(found) == 1


@pytest.mark.parametrize("kind", ["wordpiece", "words"])
def test_reloads_to_the_same_ids(kind: str, tmp_path: Path) -> None:
    made = (
        train_wordpiece(TEXTS, 200, max_length=7) if kind == "wordpiece" else word_tokenizer(["film", "n't"])
    )
    made.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "I don\u2019t know [PAD]", ""]:
        one, two = (t(text, return_offsets_mapping=True) for t in (made, again))
        assert dict(one) == dict(two)
    assert again.model_max_length == made.model_max_length == (7 if kind == "wordpiece" else 512)
    assert (again.pad_token_id, again.unk_token_id, len(again)) == (0, 1, len(made))
    assert len(again(TEXTS[0], truncation=True)["input_ids"]) <= again.model_max_length
    assert again.padding_side == "right"


def test_the_size_holds_with_many_letters() -> None:
    many = "".join(chr(0x4E00 + i) for i in range(500)) + " 电电电电 aaa aab"
    tokenizer = train_wordpiece([many], 64)
    assert len(tokenizer) <= 64
    assert pieces(tokenizer, "电a")[0] == "电"  # the frequent ones are kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": []}, "no word in 0 texts"),
        ({"texts": ["", " \n\t"]}, "no word in 2 texts"),
        ({"texts": ["a", None]}, "text 1 is NoneType, not a string"),
        ({"size": 15}, "size=15 of a vocabulary must be an integer of at least 16"),
        ({"max_length": 0}, "max_length=0"),
    ],
)
def test_wordpiece_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_wordpiece(**{"texts": TEXTS, **options})


# --- Words -----------------------------------------------------------------------------------------------


def test_word_tokenizer() -> None:
    tokenizer = word_tokenizer(["the", "film", "do", "n't", "'s", ",", "😀", "[UNK]"])
    text = "The film, don\u2019t! film's😀 CAN'T"
    wanted = ["the", "film", ",", "do", "n't", "[UNK]", "film", "'s", "😀", "[UNK]", "n't"]
    assert pieces(tokenizer, text) == wanted
    assert parts(tokenizer, text) == [
        "The",
        "film",
        ",",
        "do",
        "n\u2019t",
        "!",
        "film",
        "'s",
        "😀",
        "CA",
        "N'T",
    ]
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "the", "film"]) == [0, 1, 2, 3]
    assert len(tokenizer) == 9


def test_word_tokenizer_without_parted_contractions() -> None:
    tokenizer = word_tokenizer(["don't", "Paris"])
    assert pieces(tokenizer, "don't 'Paris' paris") == ["don't", "[UNK]", "Paris", "[UNK]", "[UNK]"]
    assert pieces(word_tokenizer(["paris"]), "Paris") == ["paris"]  # no capitals: case is folded
    assert pieces(word_tokenizer(["paris"], lowercase=False), "Paris") == ["[UNK]"]
    for nothing in ([], "word"):
        with pytest.raises(ValueError, match="needs at least one word, in a list"):
            word_tokenizer(nothing)


def test_text_words_are_those_looked_up() -> None:
    texts = ["I don't like John's film.", "DON'T"]
    assert text_words(texts, lowercase=True) == set("i do n't don't like john 's john's film .".split())
    assert {"DO", "N'T", "DON'T"} <= text_words(texts, lowercase=False)


# --- Vectors ---------------------------------------------------------------------------------------------

PLAIN = "the 0.1 0.2 -3\nfilm 1e-2 0 4\n, 1 2 3\n"
HEADED = "3 3\n" + PLAIN


def written(folder: Path, text: str | bytes, name: str = "v.txt") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        HEADED,
        HEADED.replace("\n", " \n"),  # as word2vec writes
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace(" ", "\t"),
        PLAIN.replace(" ", "  "),
        "\ufeff" + PLAIN + "\n\n",
        gzip.compress(HEADED.encode(), mtime=0),
    ],
)
def test_formats(text: str | bytes, tmp_path: Path) -> None:
    found = read_vectors(written(tmp_path, text))
    assert found.words == ["the", "film", ","] and found.repeated == 0
    wanted = torch.tensor([[0.1, 0.2, -3], [0.01, 0, 4], [1, 2, 3]])
    assert found.vectors.dtype == torch.float32 and torch.equal(found.vectors, wanted)


def test_words_with_spaces_and_signs(tmp_path: Path) -> None:
    text = "a 1 2\n. . . 3 4\nat name@x.org 5 6\n\u00a0 7 8\n\u2028 9 1\n1999 2 3\n😀 4 5\nשלום 6 7\n"  # noqa: RUF001
    found = read_vectors(written(tmp_path, text))
    assert found.words == ["a", ". . .", "at name@x.org", "\u00a0", "\u2028", "1999", "😀", "שלום"]
    assert found.vectors[:, 0].tolist() == [1, 3, 5, 7, 9, 2, 4, 6]


def test_filters(tmp_path: Path) -> None:
    path = written(tmp_path, PLAIN + "the 9 9 9\n")
    assert read_vectors(path).repeated == 1
    assert read_vectors(path).vectors[0, 0] == pytest.approx(0.1)  # the first is kept
    some = read_vectors(path, words={"film", ",", "absent"})
    assert some.words == ["film", ","] and some.vectors[:, 2].tolist() == [4, 3]
    assert read_vectors(path, limit=2).words == ["the", "film"]
    assert read_vectors(path, words=["film", ","], limit=1).words == ["film"]
    headed = written(tmp_path, HEADED, "headed.txt")
    assert read_vectors(headed, limit=1).words == ["the"]  # not a file that is cut off
    with pytest.raises(ValueError, match="none of the 1 wanted words is among the 4 of"):
        read_vectors(path, words=["absent"])
    with pytest.raises(ValueError, match="limit=0"):
        read_vectors(path, limit=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("2 3\n", "holds 0 vectors, its first line says 2"),
        (PLAIN + "bad 1 2\n", "line 4: 2 fields after the word 'bad', where 3 numbers are expected"),
        (PLAIN + "bad 1 2 3 4\n", "line 4: 4 fields after the word 'bad', where 3 numbers"),
        ("3 4\n" + PLAIN, "line 2: 3 fields after the word 'the', where 4 numbers"),
        ("4 3\n" + PLAIN, "holds 3 vectors, its first line says 4: is it cut off"),
        (PLAIN + "bad 1 x 3\n", "line 4: could not convert string to float: 'x'"),
        (PLAIN + "bad 1 nan 3\n", "line 4: 'bad' has NaN, infinity or no float32"),
        (PLAIN + "bad 1 inf 3\n", "line 4: 'bad' has NaN"),
        (PLAIN + "bad 1 1e39 3\n", "line 4: 'bad' has NaN"),
        ("nan nan nan\n", "line 1: 'nan' has NaN"),
        (PLAIN + " 1 2 3\n", "line 4: 2 fields after the word '1'"),
        ("word\n", "line 1: 0 fields after the word 'word', where some numbers are expected"),
        ("some text, not vectors\n", "line 1: 3 fields after the word 'some', where some numbers"),
        ("the 0.1 x 0.3\n", "line 1: 3 fields after the word 'the', where 1 numbers"),
        (PLAIN.encode() + b"caf\xe9 1 2 3\n", "line 4: not UTF-8"),
        (b"3000000 300\n</s> \x00\x91\xf3\xc3\n", "line 2: not UTF-8"),
        (b"PK\x03\x04rest", "zip archive; unpack it"),
        (gzip.compress(PLAIN.encode() * 200, mtime=0)[:60], "cannot be read, after line"),
        (b"\x1f\x8bnot gzip", "cannot be read, after line 0"),
    ],
)
def test_bad_files(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        read_vectors(written(tmp_path, text))
    assert "v.txt" in str(refused.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "no.txt", tmp_path):
        with pytest.raises(ValueError, match="cannot be read, after line 0"):
            read_vectors(path)


def test_vectors_and_tokenizer_agree(tmp_path: Path) -> None:
    """The way from a file to embedding rows."""
    found = read_vectors(written(tmp_path, PLAIN), words=text_words(["The film"], lowercase=True))
    tokenizer = word_tokenizer(found.words)
    ids = tokenizer.convert_tokens_to_ids(found.words)
    assert ids == [2, 3] and tokenizer("The film.")["input_ids"] == [2, 3, 1]
