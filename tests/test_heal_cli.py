"""`rankfold adapt --heal` at the command line: what it prints, and what it refuses before anything begins."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_heal import folders, text
from typer.testing import CliRunner, Result

from rankfold.cli import app

SMALL = (
    "--tokens 128 --length 16 --batch-size 2 --lr 5e-4 --held-out 0.25 --validation-tokens 32 --eval-every 2 "
    "--test pydoc:test:1x16 --device cpu"
)


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> Path:
    home = tmp_path_factory.mktemp("home")
    folders(home, tiny_llama, tiny_tokenizer)
    text(home, tiny_tokenizer)
    return home


def call(home: Path, words: str, out: str = "out") -> Result:
    return CliRunner().invoke(app, ["adapt", str(home / "small"), str(home / out), *shlex.split(words)])


def test_a_healing_prints_its_report(home: Path) -> None:
    words = f"--heal {home / 'big'} --data {home / 'notes.jsonl'} {SMALL}"
    said = call(home, f"{words} --json")
    assert said.exit_code == 0, said.output
    body = json.loads(said.stdout)
    assert body["out"] == str(home / "out") and body["healing"]["steps"] == 4
    assert list(body["healing"]["perplexity"]) == ["pydoc:test:1x16"]
    shown = CliRunner().invoke(app, ["report", str(home / "out")])
    assert "Held-out KL" in shown.stdout and "by distillation from" in shown.stdout
    again = call(home, words, "again")
    assert again.exit_code == 0 and "step 2: training loss" in again.stderr, again.output
    assert call(home, words).exit_code == 2  # it exists
    same = [(home / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data pydoc", "what to adapt: --heal ORIGINAL"),
        ("--heal big", "no text to train on"),
        ("--heal nowhere --data pydoc", "no model 'nowhere'"),
        ("--heal big --data pydok", "Did you mean 'pydoc'"),
        ("--heal big --data pydoc:test", "what models are judged on"),
        ("--heal big --data pydoc --resume --restart", "one of them"),
        ("--heal big --data pydoc --resume", "there is no run"),
        ("--heal big --data pydoc --lm 1", "--lm 1"),
        ("--heal big --data pydoc --lr 0", "--lr 0"),
        ("--heal big --data pydoc --batch-size 0", "--batch-size 0"),
        ("--heal big --data pydoc --tokens 0", "--tokens 0"),
        ("--heal big --data pydoc --test pydoc:4", "has no split '4'"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(words: str, message: str, home: Path) -> None:
    said = call(home, f"{SMALL} {words.replace('big', str(home / 'big'))}", "bad")
    assert said.exit_code == 2, said.output
    assert message in said.stderr and said.stderr.startswith("rankfold: "), said.stderr
    assert not (home / "bad").exists() and not (home / "bad.run").exists()


def test_several_processes_are_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in call(home, f"--heal {home / 'big'} --data pydoc {SMALL}", "bad").stderr
