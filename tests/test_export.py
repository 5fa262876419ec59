"""`rankfold export`: one trained model cut to several sizes, without training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from toy_pretrain import run
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from rankfold.cli import app
from rankfold.hosts import hosts
from rankfold.report import Report
from rankfold.structures import LowRank


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a nested model in it, and its text."""
    home = tmp_path_factory.mktemp("home")
    run(home, "nested", recipe="maestro", options={"penalty": 0.0, "nested": True}, steps=2)
    return home


def export(home: Path, out: str, *words: object, model: str = "nested") -> Result:
    arguments = ["export", home / model, home / out, *words, "--device", "cpu"]
    return CliRunner().invoke(app, [str(word) for word in arguments])


def test_every_size_is_a_prefix_of_what_was_trained(home: Path) -> None:
    trained = hosts(AutoModelForCausalLM.from_pretrained(home / "nested"))
    text = f"{home}/topics.jsonl:4x16"
    for budget in (0.5, 0.25):
        said = export(home, f"cut{budget}", "--budget", budget, "--calib", text, "--data", text, "--json")
        assert said.exit_code == 0, said.output
        body = json.loads(said.stdout)
        assert 0.9 * budget < body["reached"] <= budget and body["budget"] == budget
        assert body["evaluation"]["dense"]["perplexity"] > 1 and body["evaluation"]["compressed"]["kl"] >= 0
        cut = hosts(AutoModelForCausalLM.from_pretrained(home / f"cut{budget}"))
        for name, host in cut.items():
            small, large = host.weight, trained[name].weight
            assert isinstance(small, LowRank) and isinstance(large, LowRank) and small.rank <= large.rank
            assert torch.equal(small.left.weight, large.left.weight[:, : small.rank])
            assert torch.equal(small.right.weight, large.right.weight[: small.rank])
        report = Report.load(home / f"cut{budget}")
        assert sum(row.bytes_after for row in report.layers) <= budget * sum(
            row.bytes_before for row in report.layers
        )
        assert report.totals["disk_after"] == report.totals["model_after"]
        assert report.recipe["trained"]["name"] == "maestro"
        assert "export" in report.to_text() and "before" in report.to_html()


def test_without_data_and_by_svd(home: Path) -> None:
    said = export(home, "plain", "--budget", 0.4, "--order", "svd")
    assert said.exit_code == 0 and "Wrote" in said.stderr, said.output
    assert Report.load(home / "plain").evaluation is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--budget 0", "above 0 and at most 1"),
        ("--budget 0.001", "below the smallest possible"),
        ("--budget 0.5 --unit bits", "bits"),
        ("--budget 0.5 --order best", "'prefix', 'svd'"),
        ("--budget 0.5 --data no/such.txt", "no/such.txt"),
        ("--budget 0.5 --calib :4x", ":4x"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(home: Path, words: str, message: str) -> None:
    said = export(home, "never", *words.split())
    assert said.exit_code == 2 and message in said.stderr, said.output
    assert not (home / "never").exists()


def test_a_model_without_products_has_nothing_to_cut(home: Path) -> None:
    said = export(home, "dense", "--budget", 1.0, model="nested")
    assert said.exit_code == 0, said.output  # every layer is smallest as an ordinary one, or as it is
    model = AutoModelForCausalLM.from_pretrained(home / "nested")
    from rankfold.checkpoint import to_dense_

    to_dense_(model).save_pretrained(home / "ordinary")
    said = export(home, "never", "--budget", 0.5, model="ordinary")
    assert said.exit_code == 2 and "low-rank" in said.stderr, said.output
