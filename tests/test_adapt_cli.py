"""`rankfold adapt --recipe` at the command line: what it prints, and refuses before anything trains."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_adapt import chats, encoder, examples, language_model, text
from typer.testing import CliRunner, Result

from rankfold.cli import app

LABELLED = "--epochs 1 --batch-size 8 --length 16 --device cpu"
PLAIN = "--length 16 --held-out 0.25 --validation-tokens 32 --device cpu"


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> Path:
    home = tmp_path_factory.mktemp("home")
    encoder(home / "base")
    examples(home)
    language_model(home, tiny_llama, tiny_tokenizer)
    language_model(home, tiny_llama, tiny_tokenizer, "tied", tie_word_embeddings=True)
    text(home / "notes.jsonl")
    chats(home / "chats.jsonl")
    (home / "plain.jsonl").write_text('{"text": "the city"}\n')
    (home / "labelled.jsonl").write_text('{"text": "the city", "label": "good"}\n')
    (home / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "the city"}]}\n')
    (home / "odd.jsonl").write_text('{"messages": [{"role": "user"}]}\n')
    return home


def call(home: Path, model: str, words: str, out: str = "bad") -> Result:
    names = ("train.csv", "test.csv", "notes.jsonl", "chats.jsonl", "plain.jsonl", "labelled.jsonl")
    for name in (*names, "bad.jsonl", "odd.jsonl"):
        words = words.replace(f" {name}", f" {home / name}")
    return CliRunner().invoke(app, ["adapt", str(home / model), str(home / out), *shlex.split(words)])


def test_a_classifier_prints_its_report(home: Path) -> None:
    said = call(home, "base", f"--recipe wara --rank 2 --data train.csv --test test.csv {LABELLED}", "one")
    assert said.exit_code == 0, said.output
    for words in ("Trained", "in adapters of 13 layers, 66 others", "Added by adapters", "before training"):
        assert words in " ".join(said.stdout.split()), said.stdout
    assert "true \\ predicted" in said.stdout and "epoch 1: training loss" in said.stderr
    words = f"--recipe probe --data train.csv --test test.csv {LABELLED} --json"
    body = json.loads(call(home, "base", words, "two").stdout)
    assert body["trained"]["parameters"] == 66 and body["out"] == str(home / "two")
    assert call(home, "base", words, "two").exit_code == 2  # it exists
    assert call(home, "base", f"{words} --overwrite", "two").exit_code == 0


def test_a_language_model_prints_its_report(home: Path) -> None:
    words = f"--recipe lora --rank 2 --data notes.jsonl --steps 2 --test pydoc:test:1x16 {PLAIN}"
    said = call(home, "lm", words, "three")
    assert said.exit_code == 0, said.output
    shown = " ".join(said.stdout.split())
    assert "Held out" in shown and "Pydoc:test:1x16" in shown and "2 steps" in shown
    assert (home / "three" / "report.html").is_file()


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("base", "--data train.csv", "what to adapt: --heal ORIGINAL"),
        ("base", "--recipe lorra --data train.csv", "Did you mean 'lora'"),
        ("base", "--recipe svd --data train.csv", "'svd' is no adapter"),
        ("base", "--recipe lora --levels 2 --data train.csv", "'lora' has no option --levels; it has --rank"),
        ("base", "--recipe pissa --init gaussian --data train.csv", "'pissa' has no option --init"),
        ("base", "--recipe full --rank 2 --data train.csv", "trains everything and has no --rank"),
        ("base", "--recipe probe --targets x --data train.csv", "trains the head alone and has no --targets"),
        ("base", "--recipe full --keep-trainable x --data train.csv", "has no --keep-trainable"),
        ("base", "--recipe lora --rank 0 --data train.csv", "rank=0"),
        ("base", "--recipe lora --rank 99 --data train.csv", "rank 99 does not fit"),
        ("base", "--recipe wara --rank 1 --levels 9 --data train.csv", "levels=9"),
        ("base", "--recipe wara --wavelet haarr --data train.csv", "haarr"),
        ("base", "--recipe wara --rank 9 --levels 2 --data train.csv", "band"),
        ("base", "--recipe wara_feature --levels 2 --data train.csv", "one level"),
        ("base", "--recipe lora --alpha 0 --data train.csv", "alpha=0"),
        ("base", "--recipe lora --targets *.quory --data train.csv", "Did you mean '*.query'"),
        ("base", "--recipe lora --targets classif* --data train.csv", "the head, which trains as a whole"),
        ("base", "--recipe lora --keep-trainable no.such --data train.csv", "No parameter matches 'no.such'"),
        ("base", "--recipe lora --merge --adapter-only --data train.csv", "--merge and --adapter-only"),
        ("base", "--recipe full --merge --data train.csv", "makes no adapter"),
        ("base", "--recipe pissa --as-lora --data train.csv", "no LoRA for the base"),
        ("base", "--recipe lora --as-lora --keep-trainable *.query.bias --data train.csv", "LoRA folder"),
        ("base", "--recipe lora", "what to train on: --data"),
        ("base", "--recipe lora --data train.csv --data test.csv", "a classifier takes one of them"),
        ("base", "--recipe lora --data train.csv --tokens 5", "--tokens: of language models"),
        ("base", "--recipe lora --data train.csv --accumulate 2", "--accumulate: of language models"),
        ("base", "--recipe lora --data plain.jsonl", "label"),
        ("base", "--recipe lora --data wikipedia", "has no labels"),
        ("base", "--recipe lora --data chats.jsonl", "writes no text"),
        ("base", "--recipe lora --data train.csv --epochs 0", "--epochs 0"),
        ("base", "--recipe lora --data train.csv --lr 0", "--lr 0"),
        ("base", "--recipe lora --data train.csv --length 64", "reads at most 32 tokens"),
        ("base", "--recipe lora --data train.csv --dtype float16", "--dtype 'float16'"),
        ("base", "--recipe lora --data train.csv --device tpu", "--device 'tpu'"),
        ("base", "--recipe lora --data train.csv --held-out 1", "--held-out 1"),
        ("base", "--recipe lora --data train.csv --resume", "there is no run"),
        ("base", "--recipe lora --data train.csv --resume --restart", "one of them"),
        ("base", "--recipe lora --data train.csv --lm 0.5", "--lm: of --heal ORIGINAL"),
        ("base", "--recipe lora --data train.csv --heal base", "--recipe: of --recipe; --heal"),
        ("nowhere", "--recipe lora --data train.csv", "no model"),
        ("lm", "--recipe probe --data notes.jsonl", "recipe 'probe' trains the head of a classifier"),
        ("lm", "--recipe lora --data train.csv", "has labels, and"),
        ("lm", "--recipe lora --data labelled.jsonl", "has labels, and"),
        ("lm", "--recipe lora --data movie:train", "has labels, and"),
        ("lm", "--recipe lora --data notes.jsonl --tokens 0", "--tokens 0: at least 1"),
        ("lm", "--recipe lora --data notes.jsonl --tokens -5", "--tokens -5: at least 1"),
        ("lm", "--recipe lora --data notes.jsonl --tokens 5 --steps 1", "one of --steps, --tokens"),
        ("lm", "--recipe lora --data notes.jsonl --epochs 1", "of a text say --tokens"),
        ("lm", "--recipe lora --data notes.jsonl --patience 1", "--patience: of classifiers"),
        (
            "lm",
            "--recipe lora --data notes.jsonl --length 999 --validation-tokens 2000",
            "from 2 to 256 tokens",
        ),
        ("lm", "--recipe lora --data pydoc:test", "what models are judged on"),
        ("lm", "--recipe lora --data chats.jsonl", "no chat template"),
        ("lm", "--recipe lora --data chats.jsonl --tokens 5", "say --epochs or --steps"),
        ("lm", "--recipe lora --data chats.jsonl --data pydoc", "do not mix"),
        ("lm", "--recipe lora --data bad.jsonl", "line 1: no message is of the assistant"),
        ("lm", "--recipe lora --data odd.jsonl", 'line 1: "messages" must be a list'),
        ("tied", "--recipe lora --targets lm_head --data notes.jsonl", "shares its weight with"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(model: str, words: str, message: str, home: Path) -> None:
    sizes = PLAIN if model in ("lm", "tied") else "--length 16 --device cpu"
    said = call(home, model, f"{sizes} {words}")
    assert said.exit_code == 2, said.output
    last = said.stderr.strip().split("rankfold: ")[-1]
    assert message in last and "\n" not in last, said.stderr
    assert not (home / "bad").exists() and not (home / "bad.run").exists()
