"""The first journey on the real, packaged model. Slow: minutes on two cores."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rankfold
from rankfold.data import token_windows
from rankfold.loading import open_model

pytestmark = pytest.mark.slow

FRESH = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(int(sys.argv[4]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    logits = model(load_file(sys.argv[2])["ids"]).logits
save_file({"logits": logits}, sys.argv[3])
said = model.generate(load_file(sys.argv[2])["ids"][:1, :8], max_new_tokens=8, do_sample=False)
assert said.shape == (1, 16)
assert "rankfold.factorize" not in sys.modules and AutoTokenizer.from_pretrained(sys.argv[1]) is not None
"""


def test_a_fresh_process_computes_the_same_logits_from_fewer_bytes(tmp_path: Path) -> None:
    opened = open_model("smollm2")
    windows = token_windows("wikipedia:train:8x256", opened.tokenizer, spread="random")
    report = rankfold.factorize_(
        opened.model, rankfold.recipes.svd_llm, budget=0.8, batches=windows.input_ids
    )
    out = rankfold.save(opened.model, tmp_path / "out", report=report, tokenizer=opened.tokenizer)

    dense, kept = 0, 0
    stored = load_file(out / "model.safetensors")
    for row in report.layers:
        dense += row.bytes_before
        kept += sum(t.nbytes for key, t in stored.items() if key.startswith(f"{row.name}.weight"))
    assert 0.78 <= kept / dense <= 0.80
    assert kept == report.totals["selected_after"]

    save_file({"ids": windows.input_ids[:2, :64].contiguous()}, tmp_path / "ids")
    files = (out, tmp_path / "ids", tmp_path / "logits", torch.get_num_threads())
    subprocess.run([sys.executable, "-c", FRESH, *map(str, files)], check=True, timeout=600)
    with torch.no_grad():
        mine = opened.model(windows.input_ids[:2, :64]).logits
    assert torch.equal(mine, load_file(tmp_path / "logits")["logits"])


def test_recipes_come_in_the_expected_order_on_held_out_text() -> None:
    """With less calibration than benchmarks/quality.py: the order is what is tested, not the figures."""
    from rankfold.evaluate import perplexity

    calib, test = "wikipedia:train:16x256", "wikipedia:test:12x512"
    found = {}
    for name in ("svd", "svd_llm", "best"):
        opened = open_model("smollm2")
        held_out = token_windows(test, opened.tokenizer).input_ids[::3]
        ids = token_windows(calib, opened.tokenizer, spread="random").input_ids
        rankfold.factorize_(opened.model, rankfold.recipes.get(name), budget=0.8, batches=ids)
        found[name] = perplexity(opened.model, held_out)
    assert found["best"] < found["svd_llm"] < found["svd"], json.dumps(found)
