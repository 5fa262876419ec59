"""SLTrain in whole models: the published counts, training, files, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import rankfold
from rankfold import factorize_, recipes
from rankfold.hosts import hosts
from rankfold.layers import select
from rankfold.methods import Scratch
from rankfold.structures import Sum

SLTRAIN = recipes.sltrain(rank=8, sparsity=0.03, alpha=2.0)
IDS = torch.arange(4, 100).view(4, 24)

# hidden, ff, layers, rank, sparsity; parameters dense, low rank, SLTrain; nonzeros; GB full, low rank and
# SLTrain with int64 and with int32 indices: weights, two Adam moments in bfloat16, and indices, G = 1e9.
PAPER = {
    "60M": (
        512,
        1376,
        8,
        128,
        0.03,
        58_073_600,
        42_770_944,
        43_529_832,
        758_888,
        (0.348, 0.257, 0.267, 0.264),
    ),
    "130M": (
        *(768, 2048, 12, 256, 0.03, 134_105_856, 93_997_824, 96_545_796, 2_547_972),
        (0.805, 0.564, 0.600, 0.589),
    ),
    "350M": (
        *(1024, 2736, 24, 256, 0.03, 367_969_280, 185_222_144, 194_293_544, 9_071_400),
        (2.208, 1.111, 1.238, 1.202),
    ),
    "1B": (
        *(2048, 5461, 24, 512, 0.03, 1_339_082_752, 609_310_720, 645_547_960, 36_237_240),
        (8.034, 3.656, 4.163, 4.018),
    ),
    "7B": (
        *(4096, 11008, 32, 1024, 0.05, 6_738_415_616, 2_820_935_680, 3_144_735_808, 323_800_128),
        (40.430, 16.926, 21.459, 20.164),
    ),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models(name: str) -> None:
    hidden, ff, layers, rank, sparsity, dense, low, sparse, nonzeros, gigabytes = PAPER[name]
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32000,
                hidden_size=hidden,
                intermediate_size=ff,
                num_hidden_layers=layers,
                num_attention_heads=8,
            )
        )
    whole = sum(p.numel() for p in model.parameters())
    chosen = select(model)
    assert len(chosen) == 7 * layers  # what the paper factorizes; embeddings, head and norms stay
    rest = whole - sum(math.prod(layer.shape) for layer in chosen.values())

    def totals(method: Scratch) -> tuple[int, int]:
        made = [method.empty(layer.shape, *method.menu(layer.shape)) for layer in chosen.values()]
        indices = sum(one.nbytes - 4 * one.params for one in made)
        return rest + sum(one.params for one in made), indices

    assert totals(Scratch(rank=rank)) == (low, 0)
    assert totals(Scratch(rank=rank, sparsity=sparsity)) == (sparse, 4 * nonzeros)
    assert whole == dense
    held = [6 * dense, 6 * low, 6 * sparse + 8 * nonzeros, 6 * sparse + 4 * nonzeros]
    assert tuple(round(n / 1e9, 3) for n in held) == gigabytes


def test_block_linears_of_a_small_model() -> None:
    shapes = [*[(128, 128)] * 4, (344, 128), (344, 128), (128, 344)] * 3

    def params(**options: Any) -> int:
        method = Scratch(**options)
        return sum(method.empty(shape, *method.menu(shape)).params for shape in shapes)

    assert sum(map(math.prod, shapes)) == 592_896
    assert [params(rank=12), params(rank=15)] == [87_840, 109_800]
    assert [params(rank=r, sparsity=s) for r, s in ((12, 0.03), (8, 0.06), (12, 0.1))] == [
        105_612,
        94_125,
        147_123,
    ]


def test_overhead() -> None:
    """4·rank / 3·rows: two more products for W, and one for each factor's gradient."""
    out, inner = 1376, 512

    def overhead(rows: int, rank: int) -> float:
        return 8 * out * inner * rank / (6 * rows * out * inner)

    assert round(100 * overhead(65_536, 128), 2) == 0.26 and round(100 * overhead(512, 128), 1) == 33.3


def trained(model: nn.Module, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.dim())
    assert state == 2 * sum(p.nbytes for p in model.parameters())  # two moments of what is stored, no mask
    return losses


def test_from_config_to_a_folder_and_back(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_llama()
    report = factorize_(model, SLTRAIN)
    made = hosts(model)
    assert len(made) == 14 and all(type(host.weight) is Sum for host in made.values())
    assert report.totals["params_after"] == sum(p.numel() for p in model.parameters())
    assert report.totals["selected_after"] == sum(host.weight.nbytes for host in made.values())
    assert report.allocation["allocator"] == "fixed" and report.reached < 0.4
    assert {row.name for row in report.skipped} >= {"model.embed_tokens.weight", "lm_head.weight"}
    losses = trained(model, 8)
    assert losses[-1] < losses[0] - 0.5
    places = {name: host.weight.terms[1].places for name, host in made.items()}
    folder = rankfold.save(model.eval(), tmp_path / "model", report=report)
    again = AutoModelForCausalLM.from_pretrained(folder)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            assert torch.equal(again(IDS).logits, model(IDS).logits)
    for name, host in hosts(again).items():
        assert torch.equal(host.weight.terms[1].places, places[name])
    keys = [f"{name}.weight.terms.1.places" for name in places]
    assert set(keys) <= set(model.state_dict())
    first = trained(again, 2)  # the file trains on
    assert all(math.isfinite(loss) for loss in first)


def test_equal_layers_draw_differently_and_equal_seeds_alike(tiny_llama: Callable[..., Any]) -> None:
    models = [tiny_llama() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.manual_seed(seed + 5)
        factorize_(model, SLTRAIN, seed=seed)
    one, two, other = ({n: h.weight.terms[1].places for n, h in hosts(m).items()} for m in models)
    assert all(torch.equal(places, two[name]) for name, places in one.items())
    assert not any(torch.equal(places, other[name]) for name, places in one.items())
    assert torch.equal(models[0](IDS).logits, models[1](IDS).logits)
    blocks = [one[f"model.layers.{i}.mlp.up_proj"] for i in (0, 1)]
    assert not torch.equal(*blocks) and not torch.equal(blocks[0], one["model.layers.0.mlp.gate_proj"])


def test_only_what_the_pattern_says(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    model.mlp_gauge = nn.Linear(64, 64)
    factorize_(model, SLTRAIN, targets=["model.layers.*.mlp.*"])
    assert len(hosts(model)) == 6 and type(model.mlp_gauge) is nn.Linear
    assert model.to(torch.float64) is model and model(IDS).logits.dtype == torch.float64


def test_rank_of_the_product_and_tail_of_the_sum(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama().double()
    factorize_(model, SLTRAIN)
    trained(model)
    for host in hosts(model).values():
        low, rest = host.weight.terms
        values = torch.linalg.svdvals(low.to_dense().detach())
        assert float(values[8]) < 1e-9 * float(values[0]) < float(values[7])
        assert float(torch.linalg.svdvals(host.weight.to_dense().detach())[8]) > 1e-3 * float(values[0])
        torch.testing.assert_close(host.to_dense().weight, low.to_dense() + rest.to_dense())


@pytest.mark.parametrize("how", ["autocast", "bfloat16", "checkpointing", "reentrant"])
def test_ways_of_training(how: str, tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    plain = tiny_llama()
    factorize_(plain, SLTRAIN)
    if how == "bfloat16":
        model = model.to(torch.bfloat16)
    factorize_(model, SLTRAIN)
    if how in ("checkpointing", "reentrant"):
        name = "activation_checkpointing_enable"  # "gradient_…" before transformers 5.2x
        enable = getattr(model, name, None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": how == "reentrant"})
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        losses, expected = trained(model, 4), trained(plain, 4)
    exact = how in ("checkpointing", "reentrant")
    assert losses == pytest.approx(expected, rel=1e-6 if exact else 0.02)


def test_weights_that_were_loaded_and_live_optimizers(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for recipe in (SLTRAIN, recipes.low_rank):
        with pytest.raises(ValueError, match="would discard the weights"):
            factorize_(loaded, recipe)
    kept = recipes.low_rank(rank=0.9, init="svd_of_dense")
    report = factorize_(loaded, kept)
    assert all(0 < row.relative_error < 0.7 for row in report.layers)
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="a AdamW made earlier holds"):
        factorize_(model, SLTRAIN)
    assert optimizer and not hosts(model)


def test_other_refusals(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"k_proj.*\(32, 64\).*rank 24 and 61 nonzeros.*above='dense'"):
        factorize_(model, recipes.sltrain(rank=24))
    with pytest.raises(ValueError, match=r"budget=0.1 is below the smallest possible 0.28"):
        factorize_(model, SLTRAIN, budget=0.1)
    with pytest.raises(ValueError, match="no option 'density'"):
        recipes.sltrain(density=0.1)
    with pytest.raises(ValueError, match=r"q_proj.*float16"):
        factorize_(tiny_llama().half(), SLTRAIN)
    assert not hosts(model)
    report = factorize_(model, recipes.sltrain(rank=24, above="dense"))
    dense = [row.name.rpartition(".")[2] for row in report.layers if row.structure == "dense"]
    assert dense == ["k_proj", "v_proj"] * 2


def test_lora_on_a_factor_takes_part(tiny_llama: Callable[..., Any]) -> None:
    """PEFT wraps the factors: the product must go through its modules, and not read their weights."""
    peft = pytest.importorskip("peft")
    model = tiny_llama()
    factorize_(model, SLTRAIN)
    trained(model)
    start = model.eval()(IDS).logits.detach()
    config = peft.LoraConfig(target_modules=["left", "right"], r=2, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    torch.testing.assert_close(adapted(IDS).logits, start)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    changed = adapted.eval()(IDS).logits
    assert float((changed - start).detach().abs().max()) > 0.01
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, changed, rtol=1e-3, atol=1e-3)
