"""Several models and seeds on one split: a line a run, nothing run twice, one table."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from toy_classify import FAST, quiet, snippets, table

from rankfold.classify import compare
from rankfold.classify.comparing import load_results
from rankfold.classify.settings import options_of
from rankfold.pretrain.trainer import Stopped

OPTIONS: dict[str, Any] = {"vocabulary": 200, "width": 8, "embedding": 12, "rank": 2}
SETTINGS = {key: value for key, value in FAST.items() if key != "epochs"} | {"epochs": 1}


def both(folder: Path, **more: Any) -> list[dict[str, Any]]:
    data = table(folder / "train.csv", snippets())
    known = {key for model in more["models"] for key in options_of(model)}
    options = {key: value for key, value in OPTIONS.items() if key in known}
    settings = {"options": options, "say": lambda _: None, **SETTINGS, **more}
    settings.setdefault("test", table(folder / "test.csv", snippets(20, seed=1)))
    return compare(data, str(folder / "out"), progress=quiet, **settings)


def test_one_table_of_all_runs(tmp_path: Path) -> None:
    said: list[str] = []

    def interrupt(words: str) -> None:
        said.append(words)
        if words.startswith("run 3 of 4"):
            raise Stopped("enough")

    with pytest.raises(Stopped):
        both(tmp_path, models=["lama", "lrt"], seeds=[0, 1], say=interrupt)
    assert len(load_results(tmp_path / "out")) == 2
    with (tmp_path / "out/results.jsonl").open("a") as file:
        file.write('{"id": "cut sho')  # the machine went down
    said.clear()
    rows = both(tmp_path, models=["lama", "lrt"], seeds=[0, 1], say=said.append)
    assert [words for words in said if words.endswith("there already")] == [
        "run 1 of 4: lama, seed 0: there already",
        "run 2 of 4: lama, seed 1: there already",
    ]
    lines = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert [(line["model"]["model"], line["seed"]) for line in lines] == [
        ("lama", 0),
        ("lama", 1),
        ("lrt", 0),
        ("lrt", 1),
    ]
    accuracy = [line["metrics"]["test"]["accuracy"] for line in lines[:2]]
    assert rows[0]["accuracy"] == statistics.fmean(accuracy)
    assert rows[0]["accuracy_sd"] == statistics.stdev(accuracy)
    # two layers of four projections (8, 8) at rank 2, with biases
    assert rows[1]["attention_parameters"] == 2 * 4 * (2 * (8 + 8) + 8)
    page = (tmp_path / "out/table.md").read_text()
    assert page.count("\n| l") == 2 and "±" in page and not (tmp_path / "out/models").exists()
    one = both(tmp_path, models=["lama"], seeds=[1])
    assert one[0]["accuracy_sd"] is None and one[0]["accuracy"] == accuracy[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": [], "options": {}}, "--models"),
        ({"models": ["lama", "lama"]}, "each once"),
        ({"seeds": [0, 0]}, "--seeds 0,0"),
        ({"options": {"k": 4}}, "none of the models lama, dense has --k"),
        ({"options": {"width": 0}}, "--width 0"),
        ({"models": ["lamma"]}, "Did you mean 'lama'"),
        ({"test": None}, "--test: name the examples"),
        ({"lr": -1.0}, "--lr -1.0"),
    ],
)
def test_bad_arguments_before_anything_is_trained(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        both(tmp_path, **{"models": ["lama", "dense"], "seeds": [0], **options})
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds no comparison"):
        both(tmp_path, models=["lama"], seeds=[0])
    (tmp_path / "out/results.jsonl").write_text('{"x": 1}\n{"id": "a"}\n')
    with pytest.raises(ValueError, match="line 1 is damaged"):
        both(tmp_path, models=["lama"], seeds=[0])
