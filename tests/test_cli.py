"""The command line, through its own entry point: what it prints, where, and with which exit status."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result
from words import prose

from rankfold import recipes
from rankfold.cli import app


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> Path:
    """A folder with a tiny dense model and two texts."""
    home = tmp_path_factory.mktemp("home")
    tiny_llama().save_pretrained(home / "model")
    tiny_tokenizer.save_pretrained(home / "model")
    (home / "calib.txt").write_text(prose(4000, seed=1))
    (home / "test.txt").write_text(prose(2000, seed=2))
    return home


REFUSED = {  # recipes that do not compress to a budget, and what is said then
    **dict.fromkeys(("low_rank", "sltrain", "lrt"), "would discard the weights"),  # for `rankfold pretrain`
    **dict.fromkeys("lora pissa wara wara_adaptive wara_feature wara_tiny waveft".split(), "so it adds"),
    "hola": "the sizes that the method names cost",
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def compress(home: Path, out: Path, *more: object) -> Result:
    texts = ("--calib", f"{home}/calib.txt:16x32", "--data", f"{home}/test.txt:4x32")
    return run("compress", home / "model", out, *texts, *more)


@pytest.fixture(scope="module")
def done(home: Path) -> tuple[Path, dict[str, Any]]:
    out = home / "out"
    result = compress(home, out, "--recipe", "svd_llm", "--budget", 0.7, "--json")
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)


def test_json_alone_on_stdout_and_the_facts_in_it(done: tuple[Path, dict[str, Any]]) -> None:
    out, body = done
    assert body["out"] == str(out) and body["recipe"]["name"] == "svd_llm"
    assert 0.68 <= body["totals"]["selected_after"] / body["totals"]["selected_before"] <= 0.7
    assert body["totals"]["disk_after"] == body["totals"]["model_after"]
    assert body["data"]["sequences"] == 16 and body["data"]["length"] == 32 and body["data"]["hash"]
    assert len(body["weights_hash"]) == 32 and body["versions"]["torch"] == torch.__version__
    assert body["evaluation"]["dense"]["perplexity"] > 1 and body["evaluation"]["compressed"]["kl"] >= 0
    assert {"load", "calibrate", "decompose", "write", "verify"} <= set(body["timings"])


def test_the_folder_holds_model_tokenizer_report_page_and_card(done: tuple[Path, dict[str, Any]]) -> None:
    out, _ = done
    names = {p.name for p in out.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "rankfold_report.json",
        "report.html",
        "README.md",
    } <= names
    assert not any(name.startswith(".") or name.endswith((".bin", ".pt", ".pkl")) for name in names)
    assert "svd_llm" in (out / "README.md").read_text() and "<html" in (out / "report.html").read_text()


def test_repeating_the_run_from_its_folder_gives_the_same_bytes(
    home: Path, done: tuple[Path, dict[str, Any]]
) -> None:
    out, _ = done
    again = home / "again"
    assert compress(home, again, "--recipe", out, "--budget", 0.7, "--no-evaluate").exit_code == 0
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_metrics_are_kept_reused_and_refused_when_stale(home: Path) -> None:
    kept = home / "metrics.safetensors"
    first = compress(home, home / "a", "--recipe", "best", "--metrics", kept, "--no-evaluate")
    assert first.exit_code == 0 and kept.exists(), first.output
    assert compress(home, home / "b", "--recipe", "best", "--metrics", kept, "--no-evaluate").exit_code == 0
    assert (home / "a" / "model.safetensors").read_bytes() == (home / "b" / "model.safetensors").read_bytes()
    stale = compress(home, home / "c", "--recipe", "best", "--metrics", kept, "--seed", 1, "--no-evaluate")
    assert stale.exit_code == 2 and "calibrated with another" in stale.stderr
    other = compress(home, home / "c", "--recipe", "svd_llm", "--metrics", kept, "--no-evaluate")
    assert other.exit_code == 2 and "another metric" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "svdllm"], "Did you mean 'svd_llm'"),
        (["--recipe", "nowhere.json"], "no recipe at"),
        (["--targets", "*.qproj"], "Did you mean '*.q_proj'"),
        (["--budget", "0"], "above 0 and at most 1"),
        (["--budget", "1.5"], "above 0 and at most 1"),
        (["--budget", "nan"], "above 0 and at most 1"),
        (["--budget", "0.0001"], "below the smallest possible"),
        (["--unit", "bits"], "choose one of"),
        (["--dtype", "int3"], "not one of"),
        (["--calib", "no/such/file.txt"], "no/such/file.txt"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(home: Path, arguments: list[str], message: str) -> None:
    result = compress(home, home / "never", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not (home / "never").exists()


def test_storage_is_for_codes(home: Path) -> None:
    for recipe, storage, message in (("svd", "int8", "makes none"), ("rocket", "fp4", "choose one of")):
        result = compress(home, home / "never", "--recipe", recipe, "--storage", storage)
        assert result.exit_code == 2 and message in " ".join(result.output.split())


def test_errors_are_json_too_when_json_is_asked_for(home: Path) -> None:
    result = compress(home, home / "never", "--recipe", "nope", "--json")
    assert result.exit_code == 2 and "Unknown recipe" in json.loads(result.stdout)["error"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b"the \xff\xfe of", "UTF-8"), (b"the of and", "tokens")],
)
def test_bad_calibration_text(home: Path, tmp_path: Path, content: bytes, message: str) -> None:
    text = tmp_path / "bad.txt"
    text.write_bytes(content)
    result = run(
        "compress", home / "model", tmp_path / "out", "--recipe", "svd_llm", "--calib", f"{text}:4x32"
    )
    assert result.exit_code == 2 and message in result.stderr, result.stderr


def test_a_full_folder_is_refused_and_then_replaced(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    refused = compress(home, out, "--recipe", "svd", "--no-evaluate")
    assert refused.exit_code == 2 and "--overwrite" in refused.stderr
    assert (out / "mine.txt").read_text() == "precious"
    assert compress(home, out, "--recipe", "svd", "--no-evaluate", "--overwrite").exit_code == 0
    assert not (out / "mine.txt").exists() and (out / "config.json").exists()


def test_a_missing_model_says_what_was_tried(tmp_path: Path) -> None:
    result = run("compress", tmp_path / "absent", tmp_path / "out", "--recipe", "svd")
    assert result.exit_code == 2 and "absent" in result.stderr


def test_interrupt_leaves_the_old_output(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = home / "kept"
    assert compress(home, out, "--recipe", "svd", "--no-evaluate").exit_code == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rankfold.journey.save", interrupted)
    result = compress(home, out, "--recipe", "svd", "--budget", 0.5, "--no-evaluate", "--overwrite")
    assert result.exit_code == 130 and "nothing was written" in result.stderr
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_eval_alone_and_against(home: Path, done: tuple[Path, dict[str, Any]]) -> None:
    out, body = done
    alone = run("eval", out, "--data", f"{home}/test.txt:4x32", "--json")
    assert alone.exit_code == 0, alone.output
    measured = json.loads(alone.stdout)["measured"]
    assert measured["perplexity"] == pytest.approx(body["evaluation"]["compressed"]["perplexity"], rel=1e-5)
    assert measured["bytes_on_disk"] == body["totals"]["disk_after"]
    both = run(
        "eval", out, "--against", home / "model", "--data", f"{home}/test.txt:4x32", "--no-latency", "--json"
    )
    assert both.exit_code == 0, both.output
    pair = json.loads(both.stdout)
    assert (
        pair["compressed"]["kl"] > 0 and pair["dense"]["bytes_on_disk"] > pair["compressed"]["bytes_on_disk"]
    )
    table = run("eval", out, "--against", home / "model", "--data", f"{home}/test.txt:4x32", "--no-latency")
    assert table.exit_code == 0 and "perplexity" in table.stdout


def test_report_prints_diffs_and_writes_the_page(
    home: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, body = done
    shown = run("report", out)
    assert shown.exit_code == 0 and "q_proj" in shown.stdout
    assert json.loads(run("report", out, "--json").stdout)["totals"] == body["totals"]
    assert compress(home, home / "half", "--recipe", "svd", "--budget", 0.5, "--no-evaluate").exit_code == 0
    assert run("report", out, home / "half").exit_code == 0
    assert isinstance(json.loads(run("report", out, home / "half", "--json").stdout), dict)
    page = tmp_path / "page.html"
    assert run("report", out, "--html", page).exit_code == 0 and "<html" in page.read_text()
    assert run("report", tmp_path).exit_code == 2


def test_recipes_lists_every_recipe(home: Path) -> None:
    names = {"svd", "fwsvd", "asvd", "svd_llm", "basis_sharing", "kfac", "weighted", "best"}
    names |= {"cospadi", "cospadi_grouped", "rocket", "compot", "codes", "dsformer", *REFUSED}
    assert names == set(json.loads(run("recipes", "--json").stdout))
    assert all(name in run("recipes").stdout for name in names)


def test_every_recipe_runs_from_the_command_line(home: Path) -> None:
    for recipe in recipes.available():
        result = compress(home, home / f"r-{recipe}", "--recipe", recipe, "--no-evaluate")
        assert result.exit_code == (2 if recipe in REFUSED else 0), (recipe, result.output)
        assert REFUSED.get(recipe, "") in result.stderr


def test_adapters_are_put_on_at_budget_1_and_reported_as_added(home: Path) -> None:
    result = compress(home, home / "adapted", "--recipe", "lora", "--budget", 1, "--no-evaluate")
    assert result.exit_code == 0, result.output
    assert "Adapters: on 14 layers" in result.stderr and "asked" not in result.stderr


def test_codes_are_kept_packed_and_their_product_is_disclosed(home: Path) -> None:
    kept, options = home / "fits", ("--recipe", "rocket", "--budget", 0.7, "--storage", "int8")
    result = compress(home, home / "coded", *options, "--keep", kept, "--no-evaluate", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["recipe"]["method"]["storage"] == "int8"
    assert any("512 tokens at a time: codes rebuilt as a dense matrix" in said for said in report["warnings"])
    made = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    assert made
    assert compress(home, home / "coded-again", *options, "--keep", kept, "--no-evaluate").exit_code == 0
    assert {path.name: path.stat().st_mtime_ns for path in kept.iterdir()} == made
    one, two = (home / name / "model.safetensors" for name in ("coded", "coded-again"))
    assert one.read_bytes() == two.read_bytes()


def test_random_is_not_used_by_the_run(home: Path) -> None:
    random.seed(5)
    state = torch.random.get_rng_state()
    assert compress(home, home / "rng", "--recipe", "best", "--no-evaluate").exit_code == 0
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_classifier_is_compressed_and_scored_on_labels(tmp_path: Path, tiny_tokenizer: Any) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    tiny_tokenizer.save_pretrained(tmp_path / "bert")
    rows = [{"text": prose(3 + i % 9, seed=i), "label": i % 2} for i in range(40)]
    labelled, wrong = tmp_path / "rows.jsonl", tmp_path / "wrong.jsonl"
    labelled.write_text("\n".join(map(json.dumps, rows)))
    wrong.write_text(json.dumps(rows[0]) + "\n" + json.dumps({"text": "the of", "label": "good"}))
    out = tmp_path / "out"
    texts = ("--calib", labelled, "--data", labelled)
    done = run("compress", tmp_path / "bert", out, "--recipe", "fwsvd", "--budget", 0.6, *texts, "--json")
    assert done.exit_code == 0, done.output
    body = json.loads(done.stdout)
    assert body["evaluation"]["compressed"]["n"] == 40 and 0 <= body["evaluation"]["dense"]["accuracy"] <= 1
    assert {row["name"]: row["reason"] for row in body["skipped"]}["classifier.weight"] == "head"
    assert "AutoModelForSequenceClassification" in (out / "README.md").read_text()
    scored = run("eval", out, "--data", labelled, "--json")
    assert scored.exit_code == 0, scored.output
    assert json.loads(scored.stdout)["measured"]["accuracy"] == body["evaluation"]["compressed"]["accuracy"]
    plain = tmp_path / "plain.txt"
    plain.write_text(prose(500, seed=0))
    unlabelled = run(
        "compress", tmp_path / "bert", tmp_path / "x", "--recipe", "fwsvd", "--calib", f"{plain}:4x16"
    )
    assert unlabelled.exit_code == 2 and "needs labels" in unlabelled.stderr
    bad = run("compress", tmp_path / "bert", tmp_path / "x", "--recipe", "fwsvd", "--calib", wrong)
    assert bad.exit_code == 2 and "line 2" in bad.stderr


def test_a_log_shows_stages_and_time_left() -> None:
    import io

    from rich.console import Console

    from rankfold.progress import bars

    for terminal, expected in ((False, "calibrate 4/4"), (True, "4/4")):
        out = io.StringIO()
        with bars(Console(file=out, force_terminal=terminal, width=100)) as tell:
            for done in range(5):
                tell("calibrate", done, 4)
        assert expected in out.getvalue()
