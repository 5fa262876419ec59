"""The report as data: JSON and back, refusals, and the facts that every rendering shares."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from toy_report import CASES, make, row

from rankfold.report import FILE_NAME, FORMAT, LayerRow, Report
from rankfold.report_facts import alarms, before_after, by_type, gap, labels, left_dense, prefix, speed
from rankfold.report_format import clean, count, known, percent, seconds, size


def strict(report: Report) -> str:
    return json.dumps(report.to_json(), allow_nan=False)


# JSON


@pytest.mark.parametrize("name", CASES)
def test_json_round_trip_is_the_identity(name: str, tmp_path: Path) -> None:
    text = strict(CASES[name])
    assert strict(Report.from_json(json.loads(text))) == text
    assert CASES[name].save(tmp_path) == tmp_path / FILE_NAME
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert strict(Report.load(tmp_path)) == strict(Report.load(tmp_path / FILE_NAME)) == text


def test_json_gives_back_an_equal_report() -> None:
    report = make()
    again = Report.from_json(report.to_json())
    assert again == report
    assert again.layers[0].shape == (576, 576)


def test_json_has_the_documented_fields() -> None:
    data = make().to_json()
    assert data["format"] == FORMAT == 1
    assert set(data) >= {"recipe", "unit", "budget", "reached", "layers", "skipped", "totals", "allocation"}
    assert set(data["skipped"][0]) == {"name", "shape", "bytes", "reason"}
    assert set(data["layers"][0]) == {field.name for field in dataclasses.fields(LayerRow)}


def test_numbers_that_are_not_finite_survive() -> None:
    report = CASES["broken"]
    again = Report.from_json(json.loads(strict(report)))
    assert again.evaluation is not None
    assert math.isnan(again.evaluation["compressed"]["perplexity"])
    assert again.evaluation["compressed"]["kl"] == math.inf


def test_a_text_that_reads_like_a_number_stays_a_text() -> None:
    report = make(model="NaN", evaluation=False)
    report.evaluation = {"generation": {"prompt": "Infinity"}, "data": {"spec": "NaN"}}
    again = Report.from_json(json.loads(strict(report)))
    assert again == report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2 and this rankfold reads format 1. Upgrade"),
        ({"format": 0}, "format 0"),
        ({"format": "1"}, "format '1'"),
        ({"format": True}, "format True"),
        ({"surprise": 1}, "unknown fields.*surprise"),
        ({"layers": "many"}, "'layers' must be a list"),
        ({"layers": [3]}, r"layers\[0\] must be an object"),
        ({"layers": [{"name": "a"}]}, r"layers\[0\].*missing"),
        ({"layers": [{**vars(row("a")), "bytes_before": "4"}]}, r"layers\[0\]: 'bytes_before' must be int"),
        ({"layers": [{**vars(row("a")), "shape": [1, None]}]}, r"'shape' must be tuple.*None"),
        (
            {"skipped": [{"name": 1, "shape": [], "bytes": 0, "reason": ""}]},
            r"skipped\[0\]: 'name' must be str",
        ),
        ({"budget": None}, "'budget' must be float"),
        ({"warnings": [1]}, "'warnings' must be list"),
        ({"evaluation": []}, "'evaluation' must be dict"),
    ],
)
def test_a_report_that_cannot_be_read_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Report.from_json(make().to_json() | change)


@pytest.mark.parametrize("data", [None, [], {}, {"layers": []}, "report"])
def test_something_else_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="not a rankfold report"):
        Report.from_json(data)


def test_a_damaged_or_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=FILE_NAME):
        Report.load(tmp_path)
    for content in (b"{", b"\xff\xfe", b"[" * 100_000):
        (tmp_path / FILE_NAME).write_bytes(content)
        with pytest.raises(ValueError, match=FILE_NAME):
            Report.load(tmp_path)


def test_a_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    make().save(tmp_path)
    with pytest.raises(TypeError, match=r"report\.seed is a complex"):
        make(seed=1j).save(tmp_path)
    assert Report.load(tmp_path) == make()
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


# Facts


def test_units() -> None:
    assert [size(n) for n in (0, 999, 1000, 999_600, 538_090_408, None, math.nan)] == [
        "0 B", "999 B", "1.00 kB", "1.00 MB", "538 MB", "–", "NaN",
    ]  # fmt: skip
    assert [count(n) for n in (7, 134_515_008)] == ["7", "135 M"]
    assert percent(0.7991) == "79.9 %" and percent(math.inf) == "∞" and percent("x") == "–"
    assert [seconds(s) for s in (0.04, 41.3, 600)] == ["40 ms", "41.3 s", "10.0 min"]
    assert not known(True) and known(math.nan)
    assert clean("a\x1b[31m\u202e\ud800\nb") == "a\ufffd[31m\ufffd\ufffd\nb"


@pytest.mark.parametrize(
    ("dense", "small", "words"),
    [
        (
            {"decode_ms_per_token": 10},
            {"decode_ms_per_token": 12},
            ["decoding is slower, 20 %", "not faster"],
        ),
        ({"decode_ms_per_token": 10}, {"decode_ms_per_token": 8}, ["decoding is faster, 20 %"]),
        ({"decode_ms_per_token": 10}, {"decode_ms_per_token": 10.2}, ["decoding is not faster"]),
        ({"decode_tokens_per_s": 10}, {"decode_tokens_per_s": 20}, ["decoding is faster, 50 %"]),
        ({"prefill_ms": 10}, {"prefill_ms": 15}, ["prefill is slower, 50 %"]),
        ({"prefill_ms": 0}, {"prefill_ms": 15}, ["not measured"]),
        ({}, {}, ["not measured"]),
    ],
)
def test_speed_is_said_plainly(dense: dict, small: dict, words: list[str]) -> None:
    text, _ = speed(_with(dense, small))
    assert all(word in text for word in words), text


def _with(dense: dict[str, Any], small: dict[str, Any]) -> Report:
    report = make(evaluation=False)
    report.evaluation = {"dense": dense, "compressed": small}
    return report


def test_before_after_has_quality_first_and_a_verdict() -> None:
    lines = before_after(make())
    assert [line.key for line in lines][:4] == ["perplexity", "kl", "selected", "model"]
    assert (lines[0].change, lines[0].verdict) == ("+37.1 %", "worse")
    assert {line.verdict for line in lines if line.key in ("selected", "bytes_on_disk")} == {"better"}
    assert before_after(CASES["broken"])[0].change == "broken"
    assert "novel metric" in [line.label for line in before_after(CASES["ragged"])]


def test_what_is_broken_heads_the_warnings() -> None:
    first, second, *rest = alarms(CASES["broken"])
    assert "perplexity is NaN" in first and "KL to dense is ∞" in second
    assert rest == ["little data", "the sample loops"]


def test_the_gap_is_in_words() -> None:
    assert "within 0.50 %" in gap(make())
    assert "no bound" in gap(make(allocation={"allocator": "uniform", "bound": None, "gap": None}))


def test_layers_of_a_crowded_type_are_told_apart() -> None:
    names = [
        "l.0.attention.output.dense",
        "l.0.output.dense",
        "l.0.query",
        "l.1.output.dense",
        "pooler.dense",
    ]
    found = labels([row(name) for name in names])
    assert [found[name] for name in names] == [
        "l.attention.output.dense", "l.output.dense", "query", "l.output.dense", "pooler.dense",
    ]  # fmt: skip
    assert len(by_type(CASES["experts"])) == 1
    assert prefix([row("a.b.c"), row("a.b.d")]) == "a.b." and prefix([row("a.b")]) == ""


def test_what_stayed_dense_says_why() -> None:
    found = dict(left_dense(make(layers=[row("a", rank=None), row("b")])))
    assert [r.name for r in found["selected, but worth its bytes"]] == ["a"]
    assert [r.name for r in found["embedding"]] == ["model.embed.weight"]


def test_report_needs_neither_torch_nor_rich() -> None:
    """The facts can be read where nothing heavy is installed; `import rankfold` itself does no work."""
    probe = (
        "import sys, rankfold.report, rankfold.report_html, rankfold.card; "
        "print({'torch', 'rich', 'transformers'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "set()", run.stdout + run.stderr
