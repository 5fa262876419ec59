"""Examples: what can be read, what is refused and where, what is held out, what is doubtful."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toy_classify import snippets, table

from rankfold.classify.examples import Examples, check_spec, classes_of, held_out, numbers, read, warnings_of


def write(folder: Path, name: str, body: str | bytes) -> str:
    path = folder / name
    path.write_bytes(body if isinstance(body, bytes) else body.encode())
    return str(path)


def made(texts: list[str], labels: list[str], **more: Any) -> Examples:
    return Examples(texts, labels, list(range(1, len(texts) + 1)), "here", **more)


def test_a_table_with_everything_in_it(tmp_path: Path) -> None:
    long = "word " * 40_000  # beyond the csv module's limit, which is put back
    body = f'\ufeffid,label, text \r\n1,a,plain\r\n\r\n2,b,"two\nlines, ""quoted"" 😀"\r\n3,a,"{long}"\r\n'
    found = read(write(tmp_path, "x.csv", body))
    assert found.texts == ["plain", 'two\nlines, "quoted" 😀', long] and found.labels == ["a", "b", "a"]
    assert found.places == [2, 4, 6] and found.at(2).endswith("x.csv', line 6")
    tabs = read(
        write(tmp_path, "x.tsv", "body\tkind\nsome, text\t1\n"), text_column="body", label_column="kind"
    )
    assert (tabs.texts, tabs.labels) == (["some, text"], ["1"])
    import csv

    assert csv.field_size_limit() == 131_072


def test_lines_of_json(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 1}, {"text": "b\nc", "label": "x"}, {"text": "d", "label": 2.0}]
    found = read(write(tmp_path, "x.jsonl", "\n\n".join(json.dumps(row) for row in rows)))
    assert (found.texts, found.labels, found.places) == (["a", "b\nc", "d"], ["1", "x", "2"], [1, 3, 5])
    bare = write(tmp_path, "y.jsonl", '{"text": "a"}\n{"text": ""}\n')
    assert read(bare, labels=None, empty=True).labels is None
    assert read(str(tmp_path / "x.jsonl"), labels=False).labels is None


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("x.csv", "text,label\na,b\nc\n", "line 3: 1 fields, the header on the first line has 2"),
        ("x.csv", 'text,label\n"a\nb",c\nd,e,f\n', "line 4: 3 fields"),
        ("x.csv", 'text,label\na,b\n"c,d\ne,f\n', "line 3: unexpected end of data"),
        ("x.csv", 'text,label\na,b\n"c"d,e\n', "line 3: ',' expected after '\"'"),
        ("x.csv", "review,label\na,b\n", "column 'text' is not there; its columns are 'review', 'label'"),
        ("x.csv", "text,stars\na,b\n", "Name one with --label-column"),
        ("x.csv", "text,text,label\na,b,c\n", "column 'text' is twice"),
        ("x.csv", "text,label\na,b\n  ,b\n", "line 3: the text is empty"),
        ("x.csv", "text,label\na,b\nc,\n", "line 3: the label is empty"),
        ("x.csv", "text,label\n", "has no examples"),
        ("x.csv", " \n", "is empty"),
        ("x.csv", b"text,label\na,b\ncaf\xe9,b\n", "line 3: byte 18 is 0xe9, which is not UTF-8"),
        ("x.jsonl", '{"text": "a", "label": 1}\n{"text": "a"\n', "line 2: not JSON"),
        ("x.jsonl", "[1]\n", "line 1: an object was expected, not list"),
        ("x.jsonl", '{"words": "a", "label": 1}\n', "no 'text'; it has 'words', 'label'"),
        ("x.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', "line 2: no 'label'"),
        ("x.jsonl", '{"text": ["a"], "label": 1}\n', "'text' is list, not a string"),
        ("x.jsonl", '{"text": "a", "label": 1.5}\n', "a label is a string or an integer"),
        ("x.jsonl", '{"text": "a", "label": true}\n', "a label is a string or an integer"),
        ("x.jsonl", '{"text": null, "label": 1}\n', "line 1: the text is empty"),
        ("x.jsonl", '{"text": "a", "label": null}\n', "line 1: the label is empty"),
    ],
)
def test_what_is_malformed_is_refused_with_its_line(
    name: str, body: Any, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path, name, body)
    with pytest.raises(ValueError) as error:
        read(path)
    assert message in str(error.value) and path in str(error.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("movies", "Did you mean 'movie'"),
        ("movie:dev", "no split 'dev'"),
        ("movie:12x128", "leave out ':12x128'"),
        ("moby", "has no labels; those that do are movie"),
        ("none.csv", "no file 'none.csv'"),
        ("none.csv:train", "has no splits"),
        ("somebody/nothing:train", "could not be read"),
    ],
)
def test_names_that_are_no_examples(spec: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        read(spec)
    assert message in str(error.value)
    if "somebody" not in spec:
        with pytest.raises(ValueError):
            check_spec(spec)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.csv, \.tsv, \.jsonl files"):
        read(str(tmp_path))


def test_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    asked: list[Any] = []

    def load(name: str, configuration: str | None, split: str) -> Any:
        asked.append((name, configuration, split))
        return rows.select(range(2)) if split == "train" else rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read("someone/reviews:en/train")
    assert asked == [("someone/reviews", "en", "train")]
    assert (found.texts, found.labels, found.names) == (["a", "b"], ["pos", "neg"], ["neg", "pos"])
    assert found.at(1) == "'someone/reviews:en/train', row 2"
    with pytest.raises(ValueError, match="row 3: the label is empty"):  # -1: as the hub hides labels
        read("someone/reviews:test")


def test_classes_and_their_numbers() -> None:
    assert classes_of(made(list("abc"), ["10", "9", "10"])) == ["9", "10"]
    assert classes_of(made(list("abc"), ["b", "a", "b"])) == ["a", "b"]
    assert classes_of(made(list("ab"), ["b", "a"], names=["b", "c", "a"])) == ["b", "c", "a"]
    with pytest.raises(ValueError, match=r"one class only \(all 2 examples are 'a'\)"):
        classes_of(made(list("ab"), ["a", "a"]))
    data = made(list("abc"), ["yes", "no", "maybe"])
    with pytest.raises(
        ValueError, match="'here', row 3: label 'maybe' is none of the 2 classes: 'no', 'yes'"
    ):
        numbers(data, ["no", "yes"])
    assert numbers(made(list("ab"), ["1", "0"]), ["no", "yes"]) == [1, 0]  # class numbers
    assert numbers(made(list("ab"), ["1", "0"]), ["1", "0"]) == [0, 1]  # names that look like numbers
    with pytest.raises(ValueError, match="label '2'"):
        numbers(made(list("ab"), ["1", "2"]), ["no", "yes"])


def test_what_is_held_out_depends_on_the_texts_alone() -> None:
    rows = snippets(100)
    rows += rows[:7]  # repeated ones stay on one side
    data = made([text for text, _ in rows], [label for _, label in rows])
    train, held = held_out(data, 0.2)
    assert len(train) + len(held) == 107 and 17 <= len(held) <= 26
    assert not set(train.texts) & set(held.texts)
    assert abs(held.labels.count("no") - held.labels.count("yes")) <= 6  # type: ignore[union-attr]
    turned = data.take(range(106, -1, -1))
    assert set(held_out(turned, 0.2)[1].texts) == set(held.texts)
    chunks = made([str(i) for i in range(60)], ["a", "b"] * 30, groups=[f"d{i // 6}" for i in range(60)])
    train, held = held_out(chunks, 0.3)
    assert held.groups and not set(train.groups or ()) & set(held.groups)
    with pytest.raises(ValueError, match=r"--held-out 0\.1 of the 2 examples"):
        held_out(made(["x", "y"], ["a", "b"]), 0.1)


def test_what_is_doubtful_is_said() -> None:
    train = made(["a b", "c", "C", *"defghijklmnop"], ["x", "x", "y", *["x"] * 13])
    said = warnings_of(train, {"test": made(["A  B", "z"], ["x", "y"])})
    assert [words.split(" ")[0] for words in said] == ["1", "1", "the"]
    assert "1 of the 2 texts of the test data" in said[0] and "different labels" in said[1]
    assert "15 examples are 'x', 1 are 'y'" in said[2]
    assert not warnings_of(made(list("abcdefghij"), ["x", "y"] * 5), {})


def test_equal_data_has_an_equal_hash(tmp_path: Path) -> None:
    one = read(table(tmp_path / "a.csv", snippets()))
    assert one.hash == read(table(tmp_path / "b.csv", snippets())).hash
    assert one.hash != one.take([1, 0, *range(2, 40)]).hash != made(["ab", "c"], ["", "d"]).hash
    assert made(["ab", "c"], ["x", "y"]).hash != made(["a", "bc"], ["x", "y"]).hash
