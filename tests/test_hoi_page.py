"""docs/hoi.md and the settings of the paper: what they say runs, and is what it says."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rankfold.cli import app
from rankfold.cli_hoi_options import training_options
from rankfold.hoi.build import Choice
from rankfold.hoi.settings import Training, losses


def test_the_settings_of_the_paper_are_the_defaults_and_its_batches() -> None:
    held = training_options(Path(__file__).parent.parent / "examples/hola_hicodet.json", {})
    choice = Choice(vision=held.pop("vision"), upstream=held.pop("upstream"), settings=held.pop("set"))
    assert choice.options == Choice(upstream=True).options
    assert losses(True, **held.pop("weights")) == losses(True)
    assert Training(**held) == Training(accumulate=4)  # 16 images in each of 4 processes


@pytest.mark.slow
def test_the_page_runs_as_printed_and_fifty_images_are_learned_by_heart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real classes, texts of MiniLM, UV: over 95 % seen mAP on the images that it was trained on."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs/hoi.md").read_text(encoding="utf-8")
    commands = page.split("```")[1].strip().splitlines()
    assert [line.split()[2] for line in commands] == [
        *("synthetic", "train", "eval", "eval", "predict", "visualise")
    ]
    for line in commands:
        said = CliRunner().invoke(app, shlex.split(line)[1:])
        assert said.exit_code == 0, said.output
        if "--seen-images" in line:
            learned = re.search(r"full +([0-9.]+) %", said.stdout)
            assert learned is not None and float(learned[1]) > 95
    scope: dict[str, Any] = {}
    shutil.rmtree("OUT")
    exec(page.split("```python")[1].split("```")[0], scope)
    assert scope["scores"].images == 20 and Path("OUT/report.html").is_file()
