"""What the documents and examples print as commands and code runs as printed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import rankfold
from rankfold.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "papers").glob("*.md"))]


def fenced(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language ("" for none)."""
    blocks: list[tuple[str, list[str]]] = []
    inside = False
    for line in page.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.startswith("```"):
            inside = not inside
            if inside:
                blocks.append((line.strip().removeprefix("```"), []))
        elif inside:
            blocks[-1][1].append(line)
    return ["".join(lines) for name, lines in blocks if name == language]


COMMANDS = [
    (page.name, line.split("  #")[0].strip())
    for page in PAGES
    for block in (*fenced(page, ""), *fenced(page, "bash"))
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("rankfold ")
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def run(*arguments: object) -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_commands_to_check() -> None:
    assert {name for name, _ in COMMANDS} >= {"README.md", "command_line.md"} and len(COMMANDS) >= 6


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_documented_commands_have_the_options_they_name(page: str, command: str) -> None:
    """Parsed by the real parser, every option and value checked, and not run."""
    name, *arguments = shlex.split(command)[1:]
    found: Any = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    while hasattr(found, "commands"):  # a group, such as `rankfold classify`: the next word is its command
        found, name, arguments = found.commands[arguments[0]], arguments[0], arguments[1:]
    found.make_context(name, arguments)


def test_the_readme_runs(model: Path, tmp_path: Path) -> None:
    first, second, *_ = fenced(ROOT / "README.md", "python")
    ids = torch.randint(4, 128, (8, 32))
    first = first.replace('"your/model"', repr(str(model))).replace("ids = ...", "ids = given")
    first = first.replace('"out"', repr(str(tmp_path / "out")))
    scope: dict[str, Any] = {"given": ids}
    exec(first, scope)
    exec(second.replace('"out"', repr(str(tmp_path / "out"))), again := {})
    with torch.no_grad():
        assert torch.equal(scope["model"].eval()(ids).logits, again["model"](ids).logits)
    assert isinstance(scope["report"], rankfold.Report)


def test_the_training_page_trains(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    small = AutoModelForCausalLM.from_pretrained(model)
    rankfold.factorize_(small, rankfold.recipes.svd, budget=0.6)
    rankfold.save(small, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    trainer, lora = fenced(ROOT / "docs" / "training.md", "python")
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(4, 128, (8, 16))]
    quiet = 'max_steps=2, report_to="none", disable_tqdm=True, use_cpu=True'
    exec(trainer.replace("max_steps=100", quiet), {"dataset": rows})
    assert AutoModelForCausalLM.from_pretrained("tuned/final").num_parameters() == small.num_parameters()
    scope: dict[str, Any] = {}
    exec("from transformers import AutoModelForCausalLM\n" + lora, scope)
    assert scope["model"].num_parameters() == small.num_parameters()


def test_a_cnn_is_compressed_saved_and_loaded() -> None:
    assert "equal bit for bit" in run(ROOT / "examples" / "compress_cnn.py")


def test_the_demo_loads_in_plain_transformers(model: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    small = AutoModelForCausalLM.from_pretrained(model)
    rankfold.factorize_(small, rankfold.recipes.svd, budget=0.6)
    rankfold.save(small, tmp_path / "out", tokenizer=tiny_tokenizer)
    script = ROOT / "examples" / "load_plain.py"
    assert "rankfold" not in re.sub(r'""".*?"""', "", script.read_text(), flags=re.DOTALL)
    printed = run(script, tmp_path / "out", "the city of the")
    assert "MB of weights" in printed and "city" in printed
