"""Conversions between dense, low rank, an adapter on a frozen base, and low rank + sparse: exact, or with the
error that the report says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toy_adapters import conv1d_model, convolutions, images, logits, stir_, train

import rankfold
from rankfold import allocate, recipes
from rankfold.adapter_file import load_adapter_, save_adapter
from rankfold.adapters import merge_, trainable
from rankfold.convert import convert_, low_rank_sparse
from rankfold.extract import extract_lora_
from rankfold.factorize import factorize_
from rankfold.hosts import hosts
from rankfold.lora import save_as_lora
from rankfold.lora_load import load_lora_
from rankfold.structures import LowRank, Sum


def moved(base: nn.Module, rank: int, names: str = "proj", size: float = 0.02) -> nn.Module:
    """A copy whose layers have changed by matrices of a low rank."""
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if p.dim() == 2 and names in name:
                p += size * torch.randn(p.shape[0], rank) @ torch.randn(rank, p.shape[1])
    return tuned


def test_a_low_rank_change_comes_back_whole(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    base = tiny_llama()
    tuned = moved(base, 3)
    model = copy.deepcopy(base)
    report = extract_lora_(model, tuned, rank=3)
    assert len(report.layers) == 14 and not report.warnings
    assert max(row.relative_error for row in report.layers) < 1e-6
    torch.testing.assert_close(logits(model), logits(tuned), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        logits(load_adapter_(copy.deepcopy(base), save_adapter(model, tmp_path / "a"))), logits(model)
    )
    assert set(trainable(model)) == {
        f"{n}.weight.terms.1.{side}.weight" for n in hosts(model) for side in ("left", "right")
    }
    merge_(model)
    torch.testing.assert_close(logits(model), logits(tuned), atol=1e-5, rtol=1e-5)


def test_the_error_is_the_tail_of_the_spectrum() -> None:
    base, tuned = nn.Sequential(nn.Linear(20, 30)), nn.Sequential(nn.Linear(20, 30))
    change = (tuned[0].weight - base[0].weight).detach().double()
    report = extract_lora_(base, tuned, rank=6, take=["0.bias"])
    s = torch.linalg.svdvals(change)
    (row,) = report.layers
    assert row.error == pytest.approx(float(s[6:].square().sum()), rel=1e-4)
    assert row.relative_error == pytest.approx(float(s[6:].norm() / s.norm()), rel=1e-4)
    assert torch.equal(base[0].bias, tuned[0].bias) and base[0].bias.requires_grad
    assert report.reached == pytest.approx(1 + 6 * 50 / 600)


@pytest.mark.parametrize("rule", [allocate.lagrangian, allocate.energy, allocate.knapsack, allocate.uniform])
def test_a_budget_is_spent_where_the_change_is(rule: Any) -> None:
    base = nn.Sequential(*(nn.Linear(24, 24) for _ in range(4)))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight += torch.randn(24, 2) @ torch.randn(2, 24)
        tuned[1].weight += torch.randn(24, 24)
        tuned[2].weight += 1e-4 * torch.randn(24, 24)
    model = copy.deepcopy(base)
    report = extract_lora_(model, tuned, budget=0.25, allocator=rule)
    ranks = [row.size or 0 for row in report.layers]
    assert sum(ranks) * 48 <= 0.25 * 4 * 576 and 1 < report.reached <= 1.25
    assert ranks[3] == 0 and report.layers[3].note == "no adapter: it did not change"
    assert type(model[3]) is nn.Linear
    if rule in (allocate.lagrangian, allocate.knapsack):
        assert ranks == [2, 10, 0, 0] and report.layers[2].relative_error == 1
    with pytest.raises(ValueError, match="there is nothing to extract"):
        extract_lora_(copy.deepcopy(base), copy.deepcopy(base), budget=0.25, allocator=rule)


def test_what_stays_behind_is_said(tiny_llama: Callable[..., Any]) -> None:
    base = tiny_llama()
    tuned = moved(base, 2)
    with torch.no_grad():
        tuned.model.norm.weight += 0.5
        tuned.lm_head.weight += 0.1
    report = extract_lora_(copy.deepcopy(base), tuned, rank=2)
    assert (
        "2 tensors differ and are in no adapter: model.norm.weight (relative difference 0.5)"
        in report.warnings[0]
    )
    taken = copy.deepcopy(base)
    assert not extract_lora_(taken, tuned, rank=2, take=["*.norm.weight", "lm_head.*"]).warnings
    torch.testing.assert_close(logits(taken), logits(tuned), atol=1e-5, rtol=1e-5)


def test_layers_of_all_kinds_and_low_precision() -> None:
    for base in (convolutions(), conv1d_model()):
        tuned = stir_(copy.deepcopy(base), 0.03)
        model = copy.deepcopy(base)
        extract_lora_(
            model,
            tuned,
            rank=99,
            targets=["*"],
            take=["*.bias", "1.*"] if len(base._modules) > 2 else ["*.bias", "*ln*"],
        )
        if isinstance(base, nn.Sequential):
            torch.testing.assert_close(model(images()), tuned(images()), atol=1e-5, rtol=1e-4)
        else:
            torch.testing.assert_close(logits(model), logits(tuned), atol=1e-5, rtol=1e-4)
            assert model.lm_head.weight is model.transformer.wte.weight
    base, tuned = (nn.Sequential(nn.Linear(9, 7)).bfloat16() for _ in range(2))
    (row,) = extract_lora_(base, tuned, rank=7, take=["0.bias"]).layers
    assert row.relative_error < 1e-6 and base[0].weight.added[0].dtype == torch.float32
    x = torch.randn(5, 9).bfloat16()
    torch.testing.assert_close(base(x), tuned(x), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("transformer", [True, False], ids=["transformers", "plain"])
def test_pissa_is_no_lora_of_the_base_and_becomes_one(
    transformer: bool, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    """Its base is what the SVD left: with the base as it was, it would be silently wrong."""
    base = tiny_llama() if transformer else nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10))

    def out(model: nn.Module) -> torch.Tensor:
        return logits(model) if transformer else model(torch.ones(2, 20)).detach()

    targets = ["*.q_proj"] if transformer else ["*"]
    model = copy.deepcopy(base)
    factorize_(model, recipes.pissa(rank=2), targets=targets)
    again = copy.deepcopy(model)
    stir_(model)
    with pytest.raises(ValueError, match=r"taken out of the weight \(PiSSA\)"):
        save_as_lora(model, tmp_path / "lora")
    folder = save_adapter(model, tmp_path / "adapter")
    for other_base in (False, True):
        with pytest.raises(ValueError, match=r"Put recipes\.pissa of the same rank on the base"):
            load_adapter_(copy.deepcopy(base), folder, other_base=other_base)
    load_adapter_(again, folder)
    assert torch.equal(out(again), out(model))
    with pytest.raises(ValueError, match=r"taken out of the weight \(PiSSA\)"):
        save_as_lora(again, tmp_path / "lora")
    expected = out(model)
    merge_(model)
    lora = copy.deepcopy(base)
    report = extract_lora_(lora, model, rank=4, targets=targets)
    assert max(row.relative_error for row in report.layers) < 1e-5
    save_as_lora(lora, tmp_path / "lora")
    torch.testing.assert_close(out(load_lora_(base, tmp_path / "lora")), expected, atol=1e-5, rtol=1e-4)


def test_extraction_refuses_before_it_changes_anything() -> None:
    base = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 5))
    other = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 4))
    tuned = copy.deepcopy(base)
    for options, words in (
        ({}, "either a rank or a budget"),
        ({"rank": 2, "budget": 0.5}, "either a rank or a budget"),
        ({"rank": 0}, "rank=0"),
        ({"budget": 1.5}, "budget=1.5"),
        ({"rank": 1, "targets": ["2"]}, "No layer matches '2'"),
        ({"rank": 1, "take": ["9.*"]}, "matches '9.*'"),
        ({"rank": 1, "take": "0.bias"}, "a list of globs"),
    ):
        with pytest.raises(ValueError) as error:
            extract_lora_(base, tuned, **options)
        assert words in str(error.value)
    with pytest.raises(ValueError, match=r"'1' has shape \(5, 7\) in the base and \(4, 7\) in the tuned"):
        extract_lora_(base, other, rank=1)
    with pytest.raises(ValueError, match=r"take: '1.bias' has shape \(4,\) there, and \(5,\) in the base"):
        extract_lora_(base, other, rank=1, skip=["1"], take=["1.bias"])
    with torch.no_grad():
        tuned[0].weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"tensor '0\.weight' .* holds 1 NaN or infinite"):
        extract_lora_(base, tuned, rank=1)
    assert type(base[0]) is nn.Linear and base[0].weight.requires_grad
    factorize_(base, recipes.lora(rank=2))
    with pytest.raises(ValueError, match="layer '0' has an adapter already"):
        extract_lora_(base, other, rank=1, skip=["1"])


def test_round_trips_keep_the_outputs_also_after_training(tiny_llama: Callable[..., Any]) -> None:
    """dense -> low rank -> adapter on it -> low rank -> dense -> low rank, with training in between."""
    model = tiny_llama()
    convert_(model, "low_rank", rank=20)
    train(model, lr=0.01)
    expected = logits(model)
    factorize_(model, recipes.wara(rank=2), targets=["*.q_proj"])
    assert torch.equal(logits(model), expected)
    train(model)
    expected = logits(model)
    report = convert_(model, "low_rank", targets=["*.q_proj"])
    assert [row.size for row in report.layers] == [28, 28] and report.layers[0].relative_error < 1e-6
    assert all(type(host.weight) is LowRank for host in hosts(model).values())
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    report = convert_(model, "dense")
    assert not hosts(model) and max(row.relative_error for row in report.layers) < 1e-6
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    report = convert_(model, "low_rank", rank=28)
    assert max(row.relative_error for row in report.layers) < 1e-5
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-3)


def test_low_rank_factors_are_cut_as_the_matrix_would_be() -> None:
    low, dense = nn.Sequential(nn.Linear(30, 20)), nn.Sequential(nn.Linear(30, 20))
    convert_(low, "low_rank", rank=15)
    dense.load_state_dict({"0.weight": low[0].weight.to_dense(), "0.bias": low[0].bias})
    reports = [convert_(model, "low_rank", rank=6) for model in (low, dense)]
    torch.testing.assert_close(low[0].weight.to_dense(), dense[0].weight.to_dense(), atol=1e-6, rtol=1e-5)
    one, two = (report.layers[0].relative_error for report in reports)
    assert one == pytest.approx(two, rel=1e-4) and one > 0.1


def test_low_rank_and_sparse() -> None:
    """Both parts are found where a matrix is made of such, and together they beat the low-rank one alone."""
    torch.manual_seed(0)
    weight = torch.randn(40, 2, dtype=torch.float64) @ torch.randn(2, 30, dtype=torch.float64)
    spikes = torch.randperm(1200)[:24].sort().values
    weight.view(-1)[spikes] += 4
    left, right, places = low_rank_sparse(weight, 2, 24)
    assert torch.equal(places, spikes)
    rest = (weight - left @ right).flatten()
    rest[places] = 0
    assert rest.norm() / weight.norm() < 0.05

    model = nn.Sequential(nn.Linear(30, 40))
    before = model[0].weight.detach().clone()
    alone = convert_(copy.deepcopy(model), "low_rank", rank=5).layers[0].relative_error
    report = convert_(model, "low_rank_sparse", rank=5, density=0.1)
    structure = model[0].weight
    assert isinstance(structure, Sum) and structure.terms[1].nonzeros == 120 and not structure.frozen
    full = structure.to_dense().detach()
    error = float((full - before).norm() / before.norm())
    assert report.layers[0].relative_error == pytest.approx(error, rel=1e-4) and error < alone
    assert report.layers[0].bytes_after == structure.nbytes == 4 * 5 * 70 + 8 * 120
    convert_(model, "dense")
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model[0].weight.detach(), full)


def test_converted_models_save_and_tied_ones_stay_tied(tmp_path: Path) -> None:
    base = conv1d_model()
    start = logits(base)
    convert_(base, "low_rank", rank=30, targets=["*"])
    assert base.lm_head.weight is base.transformer.wte.weight
    torch.testing.assert_close(logits(base), start, atol=1e-4, rtol=1e-3)
    rankfold.save(base, tmp_path / "model")
    rankfold.verify(base, tmp_path / "model")
    convert_(base, "dense", targets=["*"])
    assert base.lm_head.weight is base.transformer.wte.weight
    assert not hasattr(base.config, "quantization_config")
    torch.testing.assert_close(logits(base), start, atol=1e-4, rtol=1e-3)


def test_conversion_refuses_before_it_changes_anything() -> None:
    model = nn.Sequential(nn.Linear(30, 40))
    for options, words in (
        ({"to": "lora"}, "made by extract_lora_"),
        ({"to": "low_rank"}, "layer '0' is no product of two thin matrices"),
        ({"to": "low_rank", "rank": 0}, "rank=0"),
        ({"to": "low_rank", "rank": 3, "density": 0.1}, "density goes with"),
        ({"to": "dense", "rank": 3}, "neither a rank nor a density"),
        ({"to": "low_rank_sparse", "rank": 3}, "density=None"),
        ({"to": "low_rank_sparse", "rank": 3, "density": 1.0}, "density=1.0"),
        ({"to": "dense", "targets": ["x"]}, "No layer matches 'x'"),
    ):
        with pytest.raises(ValueError) as error:
            convert_(model, **options)
        assert words in str(error.value)
    assert type(model[0]) is nn.Linear
