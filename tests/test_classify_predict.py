"""Answers in the order of the texts, whatever the batches; what gets none; files; the page of `explain`."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_classify import quiet, run, snippets, table
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rankfold.classify import open_classifier, predict
from rankfold.classify.explaining import explain


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("home"), epochs=6, lr=2e-2)[1]


def ask(folder: Path, *options: Any, **more: Any) -> dict[str, Any]:
    return predict(str(folder), *options, progress=quiet, device="cpu", **more)


def test_answers_are_in_order_and_those_of_the_model_alone(folder: Path, tmp_path: Path) -> None:
    texts = ["a", "the film is great " * 9, "", "dull plot", " \n", "the " * 99, "Ünïcödé 😀", "\u200b\x00"]
    rows = ask(folder, texts=texts, batch_size=2)["predictions"]
    assert [row["text"] for row in rows] == texts
    assert [index for index, row in enumerate(rows) if row["label"] is None] == [
        2,
        4,
        *([7] if rows[7]["label"] is None else []),
    ]
    assert rows[2] == {
        "label": None,
        "probability": None,
        "probabilities": {},
        "reason": "the text is empty",
        "text": "",
    }
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for index in (0, 1, 3, 5, 6):
        inputs = tokenizer(texts[index], truncation=True, max_length=16, return_tensors="pt")
        theirs = model(**inputs).logits.softmax(-1)[0]
        mine = torch.tensor(list(rows[index]["probabilities"].values()))
        assert torch.allclose(mine, theirs, atol=1e-6)
        assert rows[index]["label"] == model.config.id2label[int(theirs.argmax())]
        assert abs(sum(mine) - 1) < 1e-6 and rows[index]["probability"] == max(
            rows[index]["probabilities"].values()
        )
    assert ask(folder, texts=texts[::-1], batch_size=3)["predictions"][0]["text"] == texts[-1]


def test_scores_where_there_are_labels(folder: Path, tmp_path: Path) -> None:
    rows = snippets(20, seed=1)
    found = ask(folder, table(tmp_path / "x.csv", rows))
    facts = json.loads((folder / "classify.json").read_text())
    assert found["metrics"] == facts["metrics"]["test"]
    assert [row["true"] for row in found["predictions"]] == [label for _, label in rows]
    numbers = table(tmp_path / "n.csv", [(text, str(int(label == "yes"))) for text, label in rows])
    assert ask(folder, numbers)["metrics"] == found["metrics"]
    some = table(tmp_path / "s.csv", [*rows[:3], ("fine", ""), ("", "yes")])
    found = ask(folder, some)
    assert found["metrics"]["n"] == 3 and found["unlabelled"] == 1 and found["predictions"][3]["true"] is None
    assert ask(folder, some, label_column="")["metrics"] is None
    other = table(tmp_path / "o.csv", [("fine", "yes"), ("dull", "perhaps")])
    with pytest.raises(ValueError, match=r"o\.csv', line 3: label 'perhaps' is none of the 2 classes"):
        ask(folder, other)
    with pytest.raises(ValueError, match="column 'kind' is not there"):
        ask(folder, other, label_column="kind")


def test_files_are_whole_and_in_order(folder: Path, tmp_path: Path) -> None:
    data = table(tmp_path / "x.csv", [*snippets(5), ("", "no"), ('a "quoted",\nline 😀', "yes")])
    found = ask(folder, data, out=str(tmp_path / "deep/y.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "deep/y.jsonl").read_text().splitlines()]
    assert lines == found["predictions"]
    ask(folder, data, out=str(tmp_path / "y.csv"))
    with (tmp_path / "y.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == [row["text"] for row in lines]
    assert list(rows[0]) == ["text", "true", "label", "probability", "reason", "p(no)", "p(yes)"]
    assert rows[5]["label"] == "" and rows[5]["reason"] == "the text is empty"
    assert {path.name for path in tmp_path.iterdir()} == {"x.csv", "y.csv", "deep"}


def test_what_is_no_classifier(folder: Path, tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    tiny_llama().save_pretrained(tmp_path / "lm")
    tiny_tokenizer.save_pretrained(tmp_path / "lm")
    for name, message in (
        (tmp_path / "lm", "is no classifier: it lacks"),
        ("nowhere", "no classifier at 'nowhere'"),
    ):
        with pytest.raises(ValueError, match=message):
            ask(name, texts=["a"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="which texts: DATA, or --text"):
        ask(folder)
    with pytest.raises(ValueError, match=r"\.jsonl or \.csv"):
        ask(folder, texts=["a"], out="x.txt")
    with pytest.raises(ValueError, match="--batch-size 0"):
        ask(folder, texts=["a"], batch_size=0)
    assert open_classifier(str(folder), device="cpu").length == 16  # as in its training


def test_the_page_of_what_was_read(folder: Path, tmp_path: Path) -> None:
    data = table(tmp_path / "x.csv", [*snippets(6), ("", "no")])
    found = explain(str(folder), data, out=str(tmp_path / "page.html"), limit=4, device="cpu")
    assert found == {"out": str(tmp_path / "page.html"), "texts": 4, "heads": 2}
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html") and snippets(6)[3][0].split()[0] in page
    explain(str(folder), texts=["שלום <b>&", ""], out=str(tmp_path / "text.html"), device="cpu")
    assert "<b>&" not in (tmp_path / "text.html").read_text(encoding="utf-8")
    for options, message in (
        ({"out": "x.txt", "texts": ["a"]}, "ends in .html"),
        ({"out": "x.html", "texts": ["a"], "limit": 0}, "--limit 0"),
        ({"out": "x.html"}, "which texts"),
    ):
        with pytest.raises(ValueError, match=message):
            explain(str(folder), **options)  # type: ignore[arg-type]
