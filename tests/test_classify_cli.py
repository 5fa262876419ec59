"""`rankfold classify` at the command line: what it prints, and what it refuses before anything begins."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from toy_classify import snippets, table
from typer.testing import CliRunner, Result

from rankfold.cli import app

TINY = (
    "--vocabulary 200 --width 8 --embedding 12 --heads 2 --epochs 1 --batch-size 8 --length 16 --device cpu"
)


def call(words: str) -> Result:
    return CliRunner().invoke(app, ["classify", *shlex.split(words)])


def test_train_predict_explain(tmp_path: Path) -> None:
    data, test = table(tmp_path / "train.csv", snippets()), table(tmp_path / "test.csv", snippets(20, seed=1))
    done = call(f"train {data} {tmp_path}/out --test {test} {TINY}")
    assert done.exit_code == 0, done.output
    assert "validation: accuracy" in done.stdout and "true \\ predicted" in done.stdout
    assert "parameters" in done.stdout and "epoch 1: training loss" in done.stderr
    assert call(f"train {data} {tmp_path}/out {TINY}").exit_code == 2  # not empty
    body = json.loads(call(f"train {data} {tmp_path}/two {TINY} --json").stdout)
    assert body["out"] == f"{tmp_path}/two" and body["classes"] == ["no", "yes"]
    said = call(f"predict {tmp_path}/out --text 'a fine film' --text '' --device cpu")
    assert said.exit_code == 0 and [line.split("\t")[0] for line in said.stdout.splitlines()][1:] == ["-"]
    said = call(f"predict {tmp_path}/out {test} --out {tmp_path}/y.jsonl --device cpu")
    assert said.exit_code == 0 and "macro F1" in said.stderr and said.stdout == ""
    body = json.loads(call(f"predict {tmp_path}/out {test} --json --device cpu").stdout)
    assert len(body["predictions"]) == 20 and body["metrics"]["n"] == 20
    said = call(f"explain {tmp_path}/out {test} --out {tmp_path}/p.html --limit 3 --device cpu")
    assert said.exit_code == 0 and "3 texts, 2 heads" in said.stderr and (tmp_path / "p.html").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model lamma", "Did you mean 'lama'"),
        ("--model nowhere/nothing", "no model 'nowhere/nothing'"),
        ("--model smollm2", "is no encoder"),
        ("--model lama --heads 1", "heads=1"),
        ("--model lama --rank 4", "model 'lama' has no --rank; it has"),
        ("--model lrt --rank big", "--rank 'big'"),
        ("--model dense --k 4", "model 'dense' has no --k"),
        ("--model linformer --sharing both", "--sharing 'both'"),
        ("--model gru --heads 4", "no option 'heads'"),
        ("--model gru --pooler best", "pooler 'best' is not one of"),
        ("--model minilm --heads 4", "--heads: of a pooler; name one with --pooler"),
        ("--model minilm --length 9999", "reads at most 512 tokens"),
        ("--model gru --context mean", "no option 'context'"),
        ("--context median", "context='median'"),
        ("--temperature 0", "temperature=0.0"),
        ("--rank-per-head 0", "rank_per_head=0"),
        ("--vectors none.txt", "no file 'none.txt'"),
        ("--vectors v.bin", "text files alone"),
        ("--vectors nowhere/nothing", "no model 'nowhere/nothing'"),
        ("--vectors minilm --embedding 5", "decide the size"),
        ("--vocabulary 9", "--vocabulary 9"),
        ("--width 0", "--width 0"),
        ("--dropout 1", "--dropout 1.0"),
        ("--lr nan", "--lr nan"),
        ("--lr 0", "--lr 0.0"),
        ("--epochs 0", "--epochs 0"),
        ("--batch-size 0", "--batch-size 0"),
        ("--length 1", "--length 1"),
        ("--patience -1", "--patience -1"),
        ("--best f1", "--best 'f1'"),
        ("--seed -1", "--seed -1"),
        ("--held-out 1", "--held-out 1"),
        ("--held-out 0.1 --validation movie", "give one of them"),
        ("--held-out 0.001", "is none in any class"),
        ("--test none.csv", "no file 'none.csv'"),
        ("--text-column body", "its columns are 'text', 'label'"),
        ("--resume --restart", "one of them"),
        ("--resume", "there is no run"),
        ("--device tpu", "--device 'tpu'"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(words: str, message: str, tmp_path: Path) -> None:
    data = table(tmp_path / "train.csv", snippets(12))
    said = call(f"train {data} {tmp_path}/out {words}")
    assert said.exit_code == 2, said.output
    last = said.stderr.strip().split("rankfold: ")[-1]
    assert message in last and "\n" not in last
    assert {path.name for path in tmp_path.iterdir()} == {"train.csv"}


def test_compare_prints_a_table(tmp_path: Path) -> None:
    data, test = table(tmp_path / "train.csv", snippets()), table(tmp_path / "test.csv", snippets(20, seed=1))
    words = f"compare {data} {tmp_path}/out --test {test} --models gru,dense --seeds 0 {TINY}"
    assert "none of the models gru, dense has --embedding" not in call(words).stderr
    done = call(words.replace("--heads 2 ", ""))
    assert done.exit_code == 0, done.output
    assert "attention" in done.stdout and "dense" in done.stdout
    again = call(words.replace("--heads 2 ", "") + " --json")
    assert [row["model"] for row in json.loads(again.stdout)["rows"]] == ["gru", "dense"]
    assert call(words.replace("--seeds 0", "--seeds 0,x")).exit_code == 2
    assert call(words.replace("gru,dense", "gru,,dense")).exit_code == 2


@pytest.mark.slow
def test_the_page_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table(tmp_path / "reviews.csv", snippets())
    page = (Path(__file__).parent.parent / "docs/classification.md").read_text()
    scope: dict[str, Any] = {}
    exec(page.split("```python")[1].split("```")[0], scope)
    assert scope["facts"]["model"]["parameters"] and scope["found"]["predictions"][0]["label"] in (
        "no",
        "yes",
    )
