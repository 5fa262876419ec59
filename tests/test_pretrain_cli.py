"""`rankfold pretrain` at the command line: what it prints, and what it refuses before anything begins."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from toy_pretrain import config
from typer.testing import CliRunner, Result

from rankfold.cli import app

SMALL = "--recipe sltrain --rank 4 --alpha 4 --steps 2 --length 16 --batch-size 2 --validation-tokens 64"


def call(home: Path, words: str, model: str | None = None, out: str = "out") -> Result:
    arguments = ["pretrain", model or config(home), str(home / out), *shlex.split(words), "--device", "cpu"]
    return CliRunner().invoke(app, arguments)


def test_a_run_prints_its_report(tmp_path: Path) -> None:
    said = call(tmp_path, f"{SMALL} --data pydoc --train-tokenizer 300 --json")
    assert said.exit_code == 0, said.output
    body = json.loads(said.stdout)
    assert body["out"] == str(tmp_path / "out") and body["training"]["steps"] == 2
    shown = CliRunner().invoke(app, ["report", str(tmp_path / "out")])
    assert "Validation perplexity" in shown.stdout and "Memory of a step" in shown.stdout
    # the tokenizer and the sizes of what was trained serve another run, dense
    more = (
        "--data pydoc --steps 2 --length 16 --batch-size 2 --validation-tokens 64 --recipe dense --tokens 64"
    )
    both = call(tmp_path, more, str(tmp_path / "out"), "again")
    assert both.exit_code == 2 and "one of --steps and --tokens" in both.stderr
    again = call(tmp_path, more.replace("--steps 2 ", ""), str(tmp_path / "out"), "again")
    assert again.exit_code == 0 and "step 2: training loss" in again.stderr, again.output
    assert "sltrain" not in (tmp_path / "again/config.json").read_text()
    assert call(tmp_path, more.replace("--steps 2 ", ""), str(tmp_path / "out"), "again").exit_code == 2


DATA = "--data pydoc --train-tokenizer 300"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"--rank 0 {DATA}", "rank=0"),
        (f"--rank 2.5 {DATA}", "between 0 and 1"),
        (f"--rank many {DATA}", "--rank 'many'"),
        (f"--rank 16 {DATA}", "layer 'model.layers.0.self_attn.q_proj'"),
        (f"--rank 16 {DATA}", "choose a rank from 1 to 15"),
        (f"--sparsity 0 {DATA}", "sparsity=0.0"),
        (f"--sparsity 1 {DATA}", "sparsity=1.0"),
        (f"--alpha 0 {DATA}", "alpha=0.0"),
        (f"--init ones {DATA}", "init='ones'"),
        (f"--recipe sltrane {DATA}", "Did you mean 'sltrain'"),
        (f"--recipe svd_llm {DATA}", "compresses weights that are trained"),
        (f"--recipe low_rank --penalty 1 {DATA}", "no option --penalty; it has --rank"),
        (f"--recipe lrt --sparsity 0.5 {DATA}", "no option --sparsity; it has --rank"),
        (f"--recipe lrt --rank 999 {DATA}", "would train the dense model; lower the rank"),
        (f"--recipe dense {DATA}", "recipe 'dense' factorizes nothing and has no --rank"),
        (f"--recipe maestro {DATA}", "no option --rank; it has --penalty"),
        (f"--targets *.qproj {DATA}", "Did you mean '*.q_proj'"),
        (f"--set hiden_size=64 {DATA}", "Did you mean 'hidden_size'"),
        (f"--set hidden_size=big {DATA}", "of type int"),
        (f"--set hidden_size=33 {DATA}", "not a multiple of the number of attention heads"),
        (f"--set hidden_size {DATA}", "KEY=VALUE"),
        (f"--set vocab_size=9 {DATA}", "the tokenizer that is trained decides it"),
        ("--data pydoc --train-tokenizer 100", "at least 258"),
        ("--data pydoc", "no tokenizer beside it"),
        ("--train-tokenizer 300", "no text to train on"),
        ("--train-tokenizer 300 --data pydoc:test", "what models are judged on"),
        ("--train-tokenizer 300 --data pydoc:4x16", "leave out ':4x16'"),
        ("--train-tokenizer 300 --data no.jsonl", "no file 'no.jsonl'"),
        ("--train-tokenizer 300 --data pydok", "Did you mean 'pydoc'"),
        (f"--length 512 --validation-tokens 512 {DATA}", "from 2 to 256 tokens"),
        (f"--tokens 100 {DATA}", "one of --steps and --tokens"),
        (f"--held-out 1 {DATA}", "--held-out 1.0"),
        (f"--validation-tokens 8 {DATA}", "at least one window"),
        (f"--lr nan {DATA}", "--lr nan"),
        (f"--warmup 1 {DATA}", "--warmup 1.0"),
        (f"--batch-size 0 {DATA}", "--batch-size 0"),
        (f"--dtype float16 {DATA}", "--dtype 'float16'"),
        (f"--optimizer sgd {DATA}", "choose one of adamw, adamw_8bit"),
        (f"--per-layer --clip 1 {DATA}", "--clip 0"),
        (f"--resume --restart {DATA}", "one of them"),
        (f"--resume {DATA}", "there is no run"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(words: str, message: str, tmp_path: Path) -> None:
    said = call(tmp_path, f"{SMALL} {words}")
    assert said.exit_code == 2, said.output
    assert message in said.stderr and said.stderr.startswith("rankfold: ")
    assert {path.name for path in tmp_path.iterdir()} == {"config.json"}


def test_maestro_wants_a_penalty_that_can_be_added(tmp_path: Path) -> None:
    plain = f"{SMALL.replace('--rank 4 --alpha 4', '')} {DATA} --recipe maestro"
    assert "needs --penalty" in call(tmp_path, plain).stderr
    assert "--penalty 0" in call(tmp_path, f"{plain} --penalty 1 --per-layer").stderr
    assert "penalty=-1" in call(tmp_path, f"{plain} --penalty -1").stderr
    assert "energy" in call(tmp_path, f"{plain} --penalty 1 --energy 0.1").stderr


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere", "no configuration at 'nowhere'"),
        ({"model_type": "t5"}, "not of a causal language model"),
        ({"model_type": "bert", "vocab_size": 300, "num_hidden_layers": 1}, "looks at later tokens"),
        ({"model_type": "unheard"}, "unheard"),
        ({"hidden_size": 3}, "no 'model_type'"),
        ("{", "not JSON"),
    ],
)
def test_models_that_cannot_be_trained(model: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(model if isinstance(model, str) else json.dumps(model))
    said = call(tmp_path, f"{SMALL} {DATA}", "nowhere" if model == "nowhere" else str(path))
    assert said.exit_code == 2 and message in said.stderr, said.output


def test_text_that_gives_no_windows(tmp_path: Path) -> None:
    lines = tmp_path / "few.jsonl"
    lines.write_text('{"text": "a b"}\n{"text": "c d"}\n')
    said = call(tmp_path, f"{SMALL} --train-tokenizer 300 --data {lines} --validation pydoc --restart")
    assert said.exit_code == 2 and "tokens to train on" in said.stderr, said.output
    lines.write_text(json.dumps({"text": "a b c d e f g " * 99}) + "\n")
    said = call(tmp_path, f"{SMALL} --train-tokenizer 300 --data {lines} --held-out 0.001 --restart")
    assert said.exit_code == 2 and "Raise --held-out" in said.stderr, said.output
    whole = tmp_path / "whole.txt"
    whole.write_text("one document " * 99)
    said = call(tmp_path, f"{SMALL} --train-tokenizer 300 --data {whole} --restart")
    assert said.exit_code == 2 and "--validation" in said.stderr, said.output
    said = call(tmp_path, f"{SMALL} --train-tokenizer 300 --data {whole} --validation pydoc --restart")
    assert said.exit_code == 0, said.output


def test_a_folder_that_is_not_a_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run/mine.txt").write_text("precious")
    said = call(tmp_path, f"{SMALL} {DATA}")
    assert said.exit_code == 2 and "no run of ours" in said.stderr
    said = call(tmp_path, f"{SMALL} {DATA} --restart")
    assert said.exit_code == 2 and (tmp_path / "out.run/mine.txt").exists()


@pytest.mark.slow
def test_the_page_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block of docs/pretraining.md; it needs the packaged model, for its sizes."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs/pretraining.md").read_text()
    block = page.split("```")[1].replace("\\\n", " ")
    for line in block.strip().splitlines():
        done = CliRunner().invoke(app, shlex.split(line)[1:])
        assert done.exit_code == 0, done.output
    assert "Training" in done.stdout and (tmp_path / "small/report.html").is_file()
