"""Times, ratios and peak memory: complete, interleaved, in one dtype, and honest about being slower."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from toy_language import llama

from rankfold import evaluate
from rankfold import latency as latency_module


def test_latency_rows_are_complete_and_interleaved() -> None:
    dense, small = llama(), llama(num_hidden_layers=1)
    order: list[str] = []
    for name, model in (("dense", dense), ("small", small)):
        model.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        model.train()
    got = evaluate.latency(
        {"dense": dense, "small": small},
        batch_sizes=(1, 2),
        prompt_length=8,
        new_tokens=3,
        repeats=2,
        warmup=1,
    )
    runs = [name for before, name in zip(["", *order], order, strict=False) if name != before]
    assert len(order) == 2 * 2 * 3 * 4  # models x batch sizes x (warmup + repeats) x (prefill + decode steps)
    assert len(runs) > 2 * 3  # they take turns
    assert [(row["model"], row["batch_size"]) for row in got["rows"]] == [
        ("dense", 1),
        ("small", 1),
        ("dense", 2),
        ("small", 2),
    ]
    for row in got["rows"]:
        assert row["decode_tokens_per_s"] == pytest.approx(
            1e3 * row["batch_size"] / row["decode_ms_per_token"]
        )
        assert row["prefill_ms"] > 0 and row["verdict"] in ("faster", "same", "slower")
    assert got["rows"][0]["decode_ratio"] == got["rows"][2]["prefill_ratio"] == 1
    assert (got["dtype"], got["device"], got["repeats"]) == ("float32", "cpu", 2)
    assert dense.training and small.training
    json.dumps(got, allow_nan=False)


def test_slower_than_dense_is_flagged_with_the_page_that_explains_it(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, slow = llama(), llama()
    times = {"dense": (0.010, 0.030), "compressed": (0.009, 0.045)}
    monkeypatch.setattr(latency_module, "_time", lambda name, *_: times[name])
    got = evaluate.latency({"dense": dense, "compressed": slow}, prompt_length=4, new_tokens=3)
    row = got["rows"][1]
    assert row["decode_ms_per_token"] == pytest.approx(15.0)
    assert row["decode_tokens_per_s"] == pytest.approx(1000 / 15)
    assert row["prefill_tokens_per_s"] == pytest.approx(4 / 0.009)
    assert (row["decode_ratio"], row["prefill_ratio"]) == (pytest.approx(1.5), pytest.approx(0.9))
    assert (got["rows"][0]["verdict"], row["verdict"]) == ("same", "slower")
    assert len(got["notes"]) == 1
    assert "compressed: decode is slower than dense at batch size 1 (x1.50" in got["notes"][0]
    assert "docs/evaluation.md#" in got["notes"][0]


def test_the_page_that_the_warning_names_has_that_section() -> None:
    page, _, anchor = latency_module.FAQ.partition("#")
    text = (Path(__file__).parents[1] / page).read_text(encoding="utf-8")
    headings = [
        line.strip("#? ").lower().replace(" ", "-") for line in text.splitlines() if line.startswith("##")
    ]
    assert anchor in headings


def test_latency_refuses_differing_dtypes_and_bad_options() -> None:
    model = llama()
    with pytest.raises(ValueError, match=r"'dense' is float32, 'half' is bfloat16"):
        evaluate.latency({"dense": model, "half": llama().to(torch.bfloat16)})
    with pytest.raises(ValueError, match="exceeds the 64 positions of 'dense'"):
        evaluate.latency({"dense": model}, prompt_length=60, new_tokens=5)
    with pytest.raises(ValueError, match="repeats=0"):
        evaluate.latency({"dense": model}, repeats=0)
    with pytest.raises(ValueError, match="batch_sizes=0"):
        evaluate.latency({"dense": model}, batch_sizes=(0,))
    with pytest.raises(ValueError, match="at least one model"):
        evaluate.latency({})


class NoCache(nn.Module):
    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        return torch.zeros(*input_ids.shape, 3)


def test_latency_needs_a_cache() -> None:
    with pytest.raises(ValueError, match=r"'plain' returns no past_key_values"):
        evaluate.latency({"plain": NoCache()}, prompt_length=2, new_tokens=1)


def touch() -> str:
    block = torch.ones(64 * 2**20 // 4)
    return "done" if float(block[-1]) == 1 else "never"


def test_peak_memory_sees_what_was_freed_before_the_end() -> None:
    torch.ones(2**22)  # once freed, blocks of this size come from the heap and not from the system
    freed = [torch.ones(2**20) for _ in range(32)]
    last = torch.ones(2**20)  # holds the end of the heap
    del freed  # 128 MiB in the allocator's hands, from earlier work
    peak = evaluate.peak_memory(touch)
    assert peak.result == "done" and float(last[-1]) == 1
    if peak.method == "high-water mark":
        assert 60 * 2**20 < peak.bytes - peak.before < 200 * 2**20
        assert evaluate.peak_memory(lambda: None).bytes < peak.bytes  # the mark is cleared between calls


def test_peak_memory_falls_back_to_sampling_and_to_the_lifetime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_module, "_clear_high_water_mark", lambda: False)
    with pytest.raises(ZeroDivisionError):
        evaluate.peak_memory(lambda: 1 // 0)
    if latency_module.Path("/proc/self/status").exists():
        held: list[Tensor] = []
        peak = evaluate.peak_memory(lambda: held.append(torch.ones(2**24)))
        assert peak.method == "sampled" and peak.bytes - peak.before > 32 * 2**20
    missing = SimpleNamespace(exists=lambda: False)
    monkeypatch.setattr(latency_module, "Path", lambda _: missing)
    peak = evaluate.peak_memory(touch)
    assert peak.method == "lifetime" and peak.bytes >= peak.before > 2**20
