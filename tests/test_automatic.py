"""One call for any model, without the faults of its model: the traps of the paper's page, one test each."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toy_automatic import SOLVERS, count, low, net

from rankfold.automatic import auto, auto_, plan
from rankfold.hosts import Linear, hosts

# Trap 1


def test_works_without_transformers_and_knows_its_conv1d_where_it_is_there() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import torch; from rankfold.automatic import auto_\n"
        "model = torch.nn.Sequential(torch.nn.Linear(32, 32))\n"
        "print(len(auto_(model, 4).layers))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.stdout.strip() == "1", run.stderr
    from transformers.pytorch_utils import Conv1D  # what is there is recognised

    layer, x = Conv1D(48, 32), torch.randn(3, 32)
    u, s, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)  # (in, out)
    made, _ = auto(layer, 6)
    wanted = x @ (u[:, :6] * s[:6]) @ v[:6] + layer.bias
    torch.testing.assert_close(made(x), wanted, rtol=0, atol=1e-5)


# Trap 2


def test_what_the_page_prints_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parent.parent / "papers" / "greenformers.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    exec(code, scope := {})
    assert "multihead_attn" in capsys.readouterr().out
    model = scope["model"]
    assert (
        len(hosts(model)) == 4 * 2 + 8 * 2 + 2 * 4
        and model(torch.randn(2, 5, 64), torch.randn(2, 3, 64)).shape
    )


# Trap 3


@pytest.mark.parametrize("solver", SOLVERS)
def test_root_level_and_bare_linears_are_factorized(solver: str) -> None:
    model = net()
    report = auto_(model, 4, solver=solver)
    assert [row.name for row in report.layers] == ["0", "2"] and sorted(hosts(model)) == ["0", "2"]
    layer = nn.Linear(32, 48)
    with pytest.raises(ValueError, match="itself a single layer, which cannot be replaced in place"):
        auto_(layer, 4)
    made, report = auto(layer, 4, solver=solver)
    assert isinstance(made, Linear) and made.weight.rank == 4 and len(report.layers) == 1
    assert made(torch.randn(2, 32)).shape == (2, 48)
    assert type(layer.weight) is nn.Parameter


def test_every_skipped_layer_is_in_the_report_with_its_reason() -> None:
    model = nn.Sequential(
        nn.Embedding(50, 32),
        nn.Linear(32, 48),
        nn.Linear(48, 2),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Linear(48, 48),
        nn.MultiheadAttention(16, 4),
    )
    report = auto_(model, 8, skip=["4"])
    assert {row.name: row.reason for row in report.skipped} == {
        "0.weight": "embedding",
        "2.weight": "rank 8 saves nothing, the largest that does is 1",
        "3.weight": "grouped convolution (2 groups)",
        "4.weight": "not among the targets",
        "5.in_proj_weight": "rank 8 saves nothing, the largest that does is 7",
        "5.out_proj.weight": "rank 8 saves nothing, the largest that does is 7",
    }
    assert [row.name for row in report.layers] == ["1"]
    for row in report.skipped:
        assert row.reason in report.to_text(200)


# Traps 4 and 5


@pytest.mark.parametrize("solver", SOLVERS)
def test_all_four_projections_of_torch_s_attention_are_low_rank(solver: str) -> None:
    """In encoder, decoder and cross-attention; and the layers run in train and eval, with equal outputs."""
    model = nn.Transformer(16, 4, 1, 1, 24, dropout=0.0, batch_first=True)
    report = auto_(model, 4, solver=solver)
    projections = [f"{part}_proj" for part in "qkv"] + ["out_proj"]
    for attention in (
        "encoder.layers.0.self_attn",
        "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
    ):
        assert {low(model, f"{attention}.{name}").rank for name in projections} == {4}
    assert len(report.layers) == 16 and not report.skipped
    src, tgt = torch.randn(2, 6, 16), torch.randn(2, 5, 16)
    trained = model.train()(src, tgt)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(src, tgt), trained)
        torch.testing.assert_close(model(src, tgt), model.train()(src, tgt))


def test_only_the_ffn_of_torch_s_layer_can_be_factorized_too() -> None:
    """Then torch's fused path meets a structure where it looks for `linear1.weight`."""
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    auto_(layer, 4, targets=["linear*"])
    assert type(layer.self_attn) is nn.MultiheadAttention  # not unpacked for nothing
    x = torch.randn(2, 6, 16)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), layer.train()(x))


# Trap 6


@pytest.mark.parametrize("host", [nn.Linear(32, 32), nn.Conv2d(16, 16, 3), nn.Embedding(32, 32)])
def test_an_unknown_solver_raises_for_all_hosts(host: nn.Module) -> None:
    for solver in ("sdv", "", None):
        with pytest.raises(ValueError, match=r"is not offered; choose one of \('svd', 'random'\)"):
            auto_(nn.Sequential(host), 2, solver=solver, targets=["0"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="init='zeros'"):
        auto_(nn.Sequential(host), 2, solver="random", init="zeros", targets=["0"])
    with pytest.raises(ValueError, match=r"init='torch' is for solver='random'"):
        auto_(nn.Sequential(host), 2, init="torch", targets=["0"])


# Traps 7 and 8


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_grouped_convolution_stays_dense_with_a_reason(solver: str) -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3, groups=4), nn.Conv2d(16, 16, 3))
    x = torch.randn(1, 16, 6, 6)
    wanted = model[0](x)
    report = auto_(model, 4, solver=solver)
    assert torch.equal(model[0](x), wanted)
    assert [row.reason for row in report.skipped] == ["grouped convolution (4 groups)"]


def test_the_limit_of_a_convolution_counts_its_kernel() -> None:
    for rank, able in ((57, True), (58, False)):
        model = nn.Sequential(nn.Conv2d(64, 64, 3))
        before = count(model)
        report = auto_(model, rank, solver="random")
        assert bool(report.layers) == able and (count(model) < before) == able
    assert plan(nn.Sequential(nn.Conv2d(64, 64, 3)), 31, limit="channels").ranks == {"0": 31}
    assert plan(nn.Sequential(nn.Conv2d(64, 64, 3)), 32, limit="channels").ranks == {}
    assert plan(nn.Sequential(nn.Conv2d(64, 64, 3)), 0.5).ranks == {"0": 28}  # of 57
    assert plan(nn.Sequential(nn.Conv2d(64, 64, 3)), 0.5, limit="channels").ranks == {"0": 16}  # of 32
    with pytest.raises(ValueError, match="limit='kernel' is not one of"):
        plan(net(), 4, limit="kernel")
    twice = nn.Sequential(nn.Conv2d(32, 64, 3), nn.Conv2d(288, 64, 1))  # both (64, 288)
    with pytest.raises(ValueError, match=r"gives '0' rank 10 and '1', also \(64, 288\), rank 26"):
        auto_(twice, 0.5, limit="channels")


# Trap 9


@pytest.mark.parametrize("rank", [1.0, 3.7, 0, 0.0, -1, -0.5, True, "8", None, float("nan"), float("inf")])
def test_a_size_is_a_count_or_a_fraction(rank: Any) -> None:
    model = net()
    with pytest.raises(ValueError, match="is neither a count, an int of at least 1, nor a fraction"):
        auto_(model, rank)
    assert not hosts(model)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_fraction_that_resolves_to_zero_leaves_the_layer_dense(solver: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3))
    report = auto_(model, 0.03, solver=solver, limit="channels")
    assert type(model[0]) is nn.Conv2d and not report.layers
    assert report.skipped[0].reason == "the fraction 0.03 of its limit 2 is less than one"
    assert plan(model, 0.999999).ranks.keys() == {"0", "1"}  # below break-even, whatever the rounding


# Traps 10 to 14: tests/test_automatic_factors.py; 15: tests/test_linformer.py; 16


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("targets", [None, ["*.linear1", "0"]])
def test_factorizing_twice_is_idempotent(solver: str, targets: list[str] | None) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.TransformerEncoderLayer(16, 4, 24))
    auto_(model, 4, solver=solver, targets=targets)
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    report = auto_(model, 3, solver=solver, targets=targets)
    assert not report.layers and report.totals["params_before"] == count(model)
    assert {name: id(p) for name, p in model.named_parameters()} == {n: i for n, (i, _) in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    assert type(report).from_json(json.loads(json.dumps(report.to_json()))).to_text() == report.to_text()
    assert len(auto_(model, 4, solver=solver).layers) == (0 if targets is None else 5)  # the others
    with pytest.raises(ValueError, match=r"No layer matches '\*\.lineer1'"):
        auto_(model, 4, targets=["*.lineer1"])


# What is no trap


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = nn.TransformerEncoderLayer(16, 4, 24)
    with torch.no_grad():
        model.linear1.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        auto_(model, 4)
    assert type(model.self_attn) is nn.MultiheadAttention and not hosts(model)


def test_attention_that_cannot_be_unpacked_stays_as_it_is() -> None:
    model = nn.Sequential(nn.MultiheadAttention(16, 4, add_zero_attn=True), nn.Linear(16, 16))
    report = auto_(model, 4)
    assert hosts(model).keys() == {"1"} and {row.name for row in report.skipped} == {
        "0.in_proj_weight",
        "0.out_proj.weight",
    }
