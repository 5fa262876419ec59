"""Runs of `heal`, small: their text, what they report, how they are stopped and go on."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_heal import folders, run, text
from transformers import AutoModelForCausalLM

from rankfold import data as texts
from rankfold.heal_data import InTurn, judged_on, plans, read
from rankfold.hosts import hosts
from rankfold.pretrain.run import Run
from rankfold.pretrain.trainer import Stopped
from rankfold.report import Report
from rankfold.report_healing import closed

Make = Callable[..., Any]
Done = tuple[Path, Report, list[str]]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Make, tiny_tokenizer: Any) -> Done:
    """One finished healing: its home, its report, what it said. The run's folder is kept."""
    home, said = tmp_path_factory.mktemp("home"), []
    folders(home, tiny_llama, tiny_tokenizer, storage="int8")
    notes = text(home, tiny_tokenizer)
    report, _ = run(home, said=said, keep_run=True, tests=[f"{notes}:2x16"])
    return home, report, said


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_an_ordinary_folder_with_a_report_is_left(done: Done) -> None:
    home, report, said = done
    facts = report.healing
    assert facts is not None and [line.split(":")[0] for line in said] == ["step 3", "step 6"]
    assert "held-out KL" in said[0] and "before" in said[0]
    assert facts["kl"]["after"] < facts["kl"]["before"] and facts["kept_step"] in (3, 6)
    assert facts["tokens"] == 6 * 2 * 16 and facts["steps"] == 6 and facts["held_out_tokens"] == 64
    ((name, row),) = facts["perplexity"].items()
    assert name.endswith("notes.jsonl:2x16") and row["after"] != row["before"]
    assert report.evaluation and report.evaluation["compressed"]["perplexity"] == pytest.approx(row["after"])
    assert report.evaluation["dense"]["perplexity"] == pytest.approx(row["dense"])
    model = AutoModelForCausalLM.from_pretrained(home / "out")
    assert {host.weight.spec()["storage"] for host in hosts(model).values()} == {"int8"}
    was, now = ((home / name / "model.safetensors").stat().st_size for name in ("small", "out"))
    assert was == now and report.totals["selected_after"] == sum(
        h.weight.nbytes for h in hosts(model).values()
    )
    assert Report.load(home / "out").to_json() == report.to_json()


def test_every_rendering_tells_of_it(done: Done) -> None:
    home, report, _ = done
    page, card = (home / "out/report.html").read_text(), (home / "out/README.md").read_text()
    for shown in (report.to_text(), page, card):
        assert "by distillation from" in shown and "Held-out KL" in shown
    assert "<polyline" in page and "<h2>Healing</h2>" in page
    report.diff(Report.load(home / "out"))
    report.healing = {**(report.healing or {}), "kept_step": 0}
    assert "was not lowered" in report.to_text()
    report.healing = {}
    assert "Healing" not in report.to_html()
    report.healing = Report.load(home / "out").healing


def test_the_share_of_the_gap() -> None:
    assert closed({"dense": 20.0, "before": 30.0, "after": 25.0}) == 0.5
    for row in (
        {"dense": 20.0, "before": 19.0, "after": 18.0},
        {"dense": 20.0, "before": math.inf, "after": 1.0},
        {},
    ):
        assert math.isnan(closed(row))


def test_the_same_seed_gives_the_same_bytes(done: Done) -> None:
    home, report, _ = done
    again, folder = run(home, "again")
    assert again.weights_hash == report.weights_hash and not (home / "again.run").exists()
    assert (folder / "model.safetensors").read_bytes() == (home / "out/model.safetensors").read_bytes()
    finished, _ = run(home, overwrite=True, keep_run=True)  # as after a crash between training and writing
    assert finished.weights_hash == report.weights_hash


def interrupt(words: str) -> None:
    """Ctrl-C at the validation after step 3."""
    if words.startswith("step 3"):
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_stops_with_a_checkpoint_and_it_goes_on(done: Done) -> None:
    home, report, _ = done
    with pytest.raises(Stopped, match="stopped after step 4 of 6"):
        run(home, "stopped", say=interrupt)
    with pytest.raises(ValueError, match=r"training\.lr: 0\.0005 -> 0\.1"):
        run(home, "stopped", lr=0.1)
    said: list[str] = []
    resumed, _ = run(home, "stopped", said=said)
    assert "checkpoint-4" in said[0] and resumed.healing is not None and report.healing is not None
    assert resumed.healing["sessions"] == [0, 4] and "resumed after step 4" in resumed.to_text()
    for which in ("train", "held", "kl", "kept_step"):
        assert resumed.healing[which] == report.healing[which]
    assert resumed.weights_hash == report.weights_hash
    with pytest.raises(ValueError, match="no run in"):
        run(home, "new", resume=True)


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
from pathlib import Path
from toy_heal import run

def say(words):
    if words.startswith("step 3:"):  # after the checkpoint of step 2, with a best state of step 3
        os.kill(os.getpid(), signal.SIGKILL)

run(Path({home!r}), "killed", say=say)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(done: Done) -> None:
    home, report, _ = done
    code = KILLED.format(tests=str(Path(__file__).parent), home=str(home))
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == -signal.SIGKILL, found.stderr
    resumed, folder = run(home, "killed", resume=True)
    assert resumed.healing is not None and resumed.healing["sessions"] == [0, 2]
    assert resumed.weights_hash == report.weights_hash
    assert (folder / "model.safetensors").read_bytes() == (home / "out/model.safetensors").read_bytes()


def test_a_model_that_cannot_be_better_is_written_as_it_was(done: Done) -> None:
    home, _, _ = done
    report, folder = run(home, "same", original=str(home / "small"))
    was, now = tensors(home / "small"), tensors(folder)
    assert all(torch.equal(was[key], now[key]) for key in was)
    assert report.healing is not None and report.healing["kept_step"] == 0
    assert any("did not lower" in words for words in report.warnings)
    assert len(report.layers) == 14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "big"}, "no factorized layer"),
        ({"tokens": 0}, "--tokens 0"),
        ({"held_out": 1.0}, "--held-out 1.0"),
        ({"validation_tokens": 8}, "at least one window of --length 16"),
        ({"length": 512, "validation_tokens": 512}, "reads from 2 to 256"),
        ({"lm": 1.5}, "--lm 1.5"),
        ({"warmup": 1.0}, "--warmup 1.0"),
        ({"dtype": "float16"}, "--dtype 'float16'"),
        ({"data": []}, "no text to train on"),
        ({"data": ["pydoc:test"]}, "what models are judged on"),
        ({"data": ["pydoc:2x16"]}, "leave out ':2x16'"),
        ({"tests": ["nothing.txt:2x16"]}, "no file"),
        ({"original": "nowhere"}, "no model 'nowhere'"),
    ],
)
def test_bad_arguments(done: Done, options: dict[str, Any], message: str) -> None:
    home = done[0]
    named = {key: str(home / value) if value == "big" else value for key, value in options.items()}
    with pytest.raises(ValueError, match=message):
        run(home, "bad", **named)
    assert not (home / "bad").exists()


def test_the_two_must_read_the_same_tokens(done: Done, tmp_path: Path, tiny_tokenizer: Any) -> None:
    home, _, _ = done
    other = shutil.copytree(home / "big", tmp_path / "other")
    vocabulary = (other / "tokenizer.json").read_text().replace('"the"', '"thee"')
    (other / "tokenizer.json").write_text(vocabulary)
    with pytest.raises(ValueError, match=r"tokenizers of .* differ"):
        run(home, "bad", original=str(other))
    bare = shutil.copytree(home / "small", tmp_path / "bare")
    for path in bare.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="no tokenizer beside it"):
        run(home, "bad", model=str(bare))


def test_every_text_gives_its_share(tmp_path: Path, tiny_tokenizer: Any) -> None:
    notes, sizes = text(tmp_path, tiny_tokenizer), {"length": 16, "windows": 12}
    options: dict[str, Any] = {"held_out": 0.25, "validation_tokens": 64}
    wanted = plans([notes, "pydoc:train"], [], **sizes, **options)
    found = read(Run(tmp_path / "one", {}), wanted, tiny_tokenizer, 12, 0, lambda *_: None)
    assert isinstance(found.train, InTurn) and len(found.train) == 12 and found.held_out.shape == (4, 16)
    rows = [found.train[i]["input_ids"] for i in range(12)]
    first = torch.cat([found.train.parts[0][i]["input_ids"] for i in range(6)])
    assert torch.equal(torch.cat(rows[::2]), first)
    # nothing of the even documents of pydoc is read, neither to train nor to choose
    assert found.facts[1]["documents"] + found.facts[1]["validation_documents"] == len(
        texts.documents("pydoc:train")
    )
    judged = plans([notes], ["pydoc:test"], **sizes, **options)
    other = read(Run(tmp_path / "two", {}), judged, tiny_tokenizer, 12, 0, lambda *_: None)
    assert other.held_out.shape == (4, 16) and other.facts[0]["documents"] == 40


def test_one_document_needs_a_text_to_validate_on(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("the city " * 50)
    options: dict[str, Any] = {"length": 16, "windows": 2, "held_out": 0.5, "validation_tokens": 16}
    with pytest.raises(ValueError, match="--validation"):
        plans([str(path)], [], **options)
    with pytest.raises(ValueError, match="nothing can be held out"):
        plans([str(path), "pydoc"], [], **options)
    assert plans([str(path)], ["pydoc:test"], **options)[0].validation


def test_what_is_judged_on() -> None:
    assert [str(spec) for spec in judged_on(["wikipedia:train", "a.jsonl"], [])] == ["wikipedia:test:12x512"]
    assert [str(spec) for spec in judged_on(["pydoc"], ["brown:3x8", "pydoc"])] == [
        "brown:3x8",
        "pydoc:12x512",
    ]


def test_a_model_without_a_report_gets_one(done: Done) -> None:
    home, report, _ = done
    assert not (home / "small/rankfold_report.json").exists()
    assert len(report.layers) == 14 and {row.structure for row in report.layers} == {"sparse_code"}
    assert report.totals["selected_before"] == 2 * 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    body = json.loads((home / "out/rankfold_report.json").read_text())
    assert body["healing"]["original"] == str(home / "big")
