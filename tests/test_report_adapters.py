"""What text, page and card say of a run that put adapters beside the weights: what was added, not kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rankfold import recipes
from rankfold.card import card
from rankfold.extract import extract_lora_
from rankfold.factorize import factorize_
from rankfold.report import Report


def toy() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32))


def made(kind: str) -> Report:
    model = toy()
    if kind == "wara":
        return factorize_(model, recipes.wara(rank=2, alpha=4.0))
    if kind == "extract":
        tuned = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return extract_lora_(model, tuned, rank=2, take=["*.bias"])
    return factorize_(model, recipes.svd, budget=0.6)


@pytest.mark.parametrize("kind", ["wara", "extract"])
def test_every_rendering_says_what_was_added(kind: str) -> None:
    report = Report.from_json(made(kind).to_json())
    report.model = "some/base"
    sides = 64 + 48 + 48 + 32
    params = 4 * sides if kind == "wara" else 2 * sides  # ranks of four bands of half the sides, or of one
    added = report.totals["model_after"] - report.totals["model_before"]
    assert report.totals["bytes_added"] == added == 4 * params
    assert report.totals["params_trained"] == (params if kind == "wara" else params + 48 + 32)
    shown = {"text": report.to_text(width=300), "page": report.to_html(), "card": card(report, loader="")}
    for name, words in shown.items():
        words = words.replace("\\_", "_")
        for phrase in (
            "on 2 layers; the weights beside them are frozen",
            "768 parameters (16.38 %" if kind == "wara" else "464 parameters (9.90 %",
            "3.07 kB (16.38 %" if kind == "wara" else "1.54 kB (8.19 %",
            "rankfold.load_adapter_(base, folder)",
            "rankfold.merge_(model)",
        ):
            assert phrase in words, (name, phrase)
        assert "of before" in words, name
        for phrase in ("asked", "ompressed", "factorized", "tayed dense", "llocation:", "How good is the"):
            assert phrase not in words, (name, phrase)
    assert "some/base with adapters" in shown["page"] and "# some/base with adapters" in shown["card"]
    assert '"adapter"' in shown["card"] and "base_model_relation" not in shown["card"]
    assert "Budget" not in shown["card"]


def test_a_compression_is_reported_as_before() -> None:
    report = made("svd")
    assert "params_trained" not in report.totals
    for words in (report.to_text(), report.to_html(), card(report)):
        assert "Adapters" not in words and "of before" not in words
    assert "asked 60.0 %" in report.to_text() and "ompressed" in card(report)


def test_bytes_beside_factors_are_those_of_the_factors() -> None:
    """The layers had what their factors had, and not what a dense matrix would have."""
    base = toy()
    factorize_(base, recipes.svd, budget=0.5)
    held = {name: sum(p.numel() for p in base[int(name)].weight.parameters()) * 4 for name in ("0", "2")}
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned[0].parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    report = extract_lora_(base, tuned, rank=3)
    for row in report.layers:
        assert row.bytes_before == held[row.name]
        assert row.bytes_after == held[row.name] + (0 if row.dense else 4 * 3 * (64 + 48))
    assert report.layers[1].dense and report.totals["bytes_added"] == 4 * 3 * (64 + 48)
    size = sum(p.numel() * p.element_size() for p in base.parameters())
    assert report.totals["model_after"] == size


def test_the_change_beside_16_bit_factors_is_read_exactly() -> None:
    """Factors of bfloat16 are exact numbers, their product in bfloat16 is not."""
    base = toy().bfloat16()
    factorize_(base, recipes.svd, budget=0.5, targets=["0"])
    tuned = copy.deepcopy(base)
    pair = [p for p in tuned[0].weight.parameters()]
    with torch.no_grad():
        pair[0][:, :1] += 0.01 * torch.randn_like(pair[0][:, :1])
    rank = pair[0].shape[1]
    report = extract_lora_(base, tuned, rank=1, targets=["0"])  # one column moved: a change of rank one
    assert rank > 1 and report.layers[0].relative_error < 1e-5
