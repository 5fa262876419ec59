"""Merging adapters into weights and back, freezing, and everything that is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold
from rankfold import recipes
from rankfold.adapted import adapted
from rankfold.adapters import freeze_, merge_, trainable
from rankfold.factorize import factorize_
from rankfold.hosts import hosts
from rankfold.methods import LoRA, PiSSA, WaRA
from rankfold.recipe import Recipe
from rankfold.structures import LowRank

IDS = torch.arange(4, 28).view(2, 12)


def trained(model: nn.Module, recipe: Recipe, **options: Any) -> nn.Module:
    """The model with adapters that are not zero."""
    factorize_(model, recipe, **options)
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(0.1 * torch.randn(p.shape))
    return model


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", ["lora", "wara", "wara_adaptive", "wara_feature", "wara_tiny", "pissa"])
def test_merged_is_dense_and_undone_bit_for_bit(name: str, tiny_llama: Callable[..., Any]) -> None:
    model = trained(tiny_llama(), recipes.get(name)(rank=4, alpha=8))
    before, outputs = state_of(model), model(IDS).logits
    held = merge_(model)
    assert not hosts(model) and not hasattr(model.config, "quantization_config")
    assert {type(model.get_submodule(layer)) for layer in held.errors} == {nn.Linear}
    assert max(held.errors.values()) < 1e-6
    torch.testing.assert_close(model(IDS).logits, outputs, rtol=1e-4, atol=1e-4)
    assert held.undo() is model
    assert same(state_of(model), before) and torch.equal(model(IDS).logits, outputs)
    assert model.config.quantization_config["structures"]
    with pytest.raises(ValueError, match="undone already"):
        held.undo()
    merge_(model)


def test_merging_twice_is_refused(tiny_llama: Callable[..., Any]) -> None:
    model = trained(tiny_llama(), recipes.wara(rank=2))
    merge_(model)
    after = state_of(model)
    with pytest.raises(ValueError, match="has no adapter to merge; one that was merged before is part"):
        merge_(model)
    assert same(state_of(model), after)
    with pytest.raises(ValueError, match=r"merge_\(size='half'\): choose one of exact, same, dense"):
        merge_(model, size="half")


@pytest.mark.parametrize("name", ["lora", "wara"])
def test_merging_under_autocast_is_merging_outside(name: str, tiny_llama: Callable[..., Any]) -> None:
    model = trained(tiny_llama(), recipes.get(name)(rank=4))
    twin = copy.deepcopy(model)
    merge_(model)
    with torch.autocast("cpu", torch.bfloat16):
        merge_(twin)
    assert same(state_of(model), state_of(twin))


@pytest.mark.parametrize("name", ["lora", "wara"])
def test_a_bfloat16_weight_is_rounded_once(name: str) -> None:
    model = trained(nn.Sequential(nn.Linear(32, 32).bfloat16(), nn.ReLU()), recipes.get(name)(rank=4))
    held = adapted(model)["0"].weight
    base, term = held.base, held.added[0]
    assert term.dtype == torch.float32
    true = (base.to_dense().float() + term.to_dense()).bfloat16()
    errors = merge_(model).errors
    assert torch.equal(model[0].weight, true) and type(model[0]) is nn.Linear
    assert 0 < errors["0"] < 0.004


def test_what_is_not_finite_is_refused_by_name(tiny_llama: Callable[..., Any]) -> None:
    model = trained(tiny_llama(), recipes.wara(rank=2))
    layer = "model.layers.1.self_attn.v_proj"
    with torch.no_grad():
        model.get_submodule(layer).weight.added[0].bands["LH1"].left.weight[0, 0] = float("inf")
    before = state_of(model)
    with pytest.raises(
        ValueError, match=rf"layer '{layer}': base \+ adapter has \d+ NaN or infinite entries"
    ):
        merge_(model)
    assert same(state_of(model), before) and len(adapted(model)) == 14


@pytest.mark.parametrize("name", ["lora", "wara"])
def test_into_low_rank_layers(name: str, tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    factorize_(model, recipes.svd, budget=0.5)
    ranks = {layer: host.weight.rank for layer, host in hosts(model).items()}
    bytes_before = sum(host.weight.nbytes for host in hosts(model).values())
    trained(model, recipes.get(name)(rank=2, alpha=4))
    before, outputs = state_of(model), model(IDS).logits
    done = merge_(model)
    extra = 2 if name == "lora" else 8
    assert {layer: host.weight.rank - extra for layer, host in hosts(model).items()} == ranks
    assert max(done.errors.values()) < 1e-6
    torch.testing.assert_close(model(IDS).logits, outputs, rtol=1e-4, atol=1e-4)
    done.undo()
    assert same(state_of(model), before)
    cut = merge_(model, size="same")
    assert {layer: host.weight.rank for layer, host in hosts(model).items()} == ranks
    assert sum(host.weight.nbytes for host in hosts(model).values()) == bytes_before
    assert all(0 < error < 1 for error in cut.errors.values())
    layer, host = next(iter(hosts(model).items()))
    held = cut._weights[layer]
    true = held.to_dense().detach().double()
    tail = torch.linalg.svdvals(true)[ranks[layer] :].norm() / true.norm()
    assert cut.errors[layer] == pytest.approx(float(tail), rel=1e-3)
    assert isinstance(host.weight, LowRank)
    cut.undo()
    merge_(model, size="dense")
    assert not hosts(model)
    torch.testing.assert_close(model(IDS).logits, outputs, rtol=1e-4, atol=1e-4)


def test_sparse_codes_merge_to_dense_only(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    factorize_(model, recipes.rocket, budget=0.7, batches=IDS)
    trained(model, recipes.lora(rank=2))
    outputs, before = model(IDS).logits, state_of(model)
    with pytest.raises(
        ValueError, match=r"of kind 'sparse_code' has no exact merged form; merge_\(size='dense'"
    ):
        merge_(model)
    assert same(state_of(model), before)
    done = merge_(model, size="dense")
    torch.testing.assert_close(model(IDS).logits, outputs, rtol=1e-3, atol=1e-3)
    done.undo()
    assert same(state_of(model), before)


def test_tied_weights_get_the_update_once(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    trained(model, recipes.lora(rank=2), targets=["lm_head", "*.embed_tokens"])
    outputs, before = model(IDS).logits, state_of(model)
    done = merge_(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model(IDS).logits, outputs, rtol=1e-4, atol=1e-4)
    done.undo()
    assert model.lm_head.weight is model.model.embed_tokens.weight and same(state_of(model), before)


def test_convolutions_merge_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, (1, 3), bias=False))
    for conv in ("channel", "spatial"):
        twin = trained(copy.deepcopy(model), recipes.wara(rank=1), conv=conv)
        x = torch.randn(2, 3, 9, 8)
        outputs = twin(x)
        merge_(twin)
        assert type(twin[0]) is nn.Conv2d and not hosts(twin)
        torch.testing.assert_close(twin(x), outputs, rtol=1e-4, atol=1e-5)


def test_freezing(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="has no adapters"):
        freeze_(model)
    factorize_(model, recipes.lora(rank=2), targets=["*.q_proj"])
    assert len(trainable(model)) == 4
    freeze_(model, keep=["lm_head*", "model.norm.*"])
    kept = {name for name in trainable(model) if "terms" not in name}
    assert kept == {"lm_head.weight", "model.norm.weight"}
    freeze_(model, keep=["*"])
    assert not [name for name in trainable(model) if "terms.0" in name], "a base is never trained"
    model.requires_grad_(True)
    assert len(trainable(freeze_(model))) == 4
    with pytest.raises(ValueError, match=r"No parameter matches 'lm_heat'\. Nearest: \['lm_head"):
        freeze_(model, keep=["lm_heat"])
    with pytest.raises(ValueError, match=r"keep is a list of globs, e\.g\. keep=\['lm_head"):
        freeze_(model, keep="lm_head*")


def test_a_second_adapter_is_refused(tiny_llama: Callable[..., Any]) -> None:
    model = trained(tiny_llama(), recipes.wara(rank=2), targets=["*.q_proj"])
    before = state_of(model)
    with pytest.raises(ValueError, match="q_proj' has an adapter already; merge_ it"):
        factorize_(model, recipes.lora(rank=2))
    assert same(state_of(model), before)
    merge_(model)
    factorize_(model, recipes.lora(rank=2))


def test_what_factorize_refuses(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    before = state_of(model)
    for recipe, options, says in (
        (recipes.wara, {"budget": 0.8}, r"budget=0\.8: recipe 'wara' puts adapters beside the weights"),
        (
            recipes.wara(rank=20),
            {},
            r"layer '.*k_proj': rank 20 does not fit band LL1 of a weight \(32, 64\): 16 x",
        ),
        (recipes.lora(rank=33), {}, r"layer '.*k_proj': rank 33 does not fit a weight \(32, 64\)"),
        (recipes.wara(rank=1, levels=6), {}, r"layer '.*k_proj': levels=6 is too deep .* 32 can be halved 5"),
        (recipes.wara, {"targets": ["*.qproj"]}, r"No layer matches '\*\.qproj'\. Did you mean '\*\.q_proj'"),
    ):
        with pytest.raises(ValueError, match=says):
            factorize_(model, recipe, **options)
    assert same(state_of(model), before) and not hosts(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="a SGD made earlier holds"):
        factorize_(model, recipes.wara(rank=2))
    del optimizer
    assert not hosts(model)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LoRA(0), r"LoRA\(rank=0\)"),
        (lambda: LoRA(2.0), r"LoRA\(rank=2\.0\)"),  # type: ignore[arg-type]
        (lambda: LoRA(2, alpha=0.0), r"LoRA\(alpha=0\.0\)"),
        (lambda: LoRA(2, alpha=float("nan")), r"LoRA\(alpha=nan\)"),
        (lambda: LoRA(2, init="he"), r"LoRA\(init='he'\): choose one of kaiming, gaussian"),
        (lambda: LoRA(2, seed=1.5), r"LoRA\(seed=1\.5\)"),  # type: ignore[arg-type]
        (lambda: PiSSA(-1), r"PiSSA\(rank=-1\)"),
        (lambda: WaRA(2, wavelet="sim4"), r"Unknown wavelet 'sim4'\. Did you mean .*'sym4'"),
        (lambda: WaRA(2, wavelet="bior2.2"), "is biorthogonal"),
        (lambda: WaRA(2, levels=0), r"WaRA\(levels=0\)"),
        (lambda: WaRA(2, domain="tokens"), r"wrap the layer in rankfold\.token_wavelet\.TokenWara"),
        (lambda: WaRA(2, domain="space"), r"WaRA\(domain='space'\): choose one of weight, feature"),
        (lambda: WaRA(2, of="update"), r"WaRA\(of='update'\): choose one of weight, gradient"),
        (lambda: WaRA(2, domain="feature", levels=2), "the bands share one pair"),
        (lambda: WaRA(2, domain="feature", bands="energy"), "the bands share one pair"),
        (lambda: WaRA(2, bands="some"), r"WaRA\(bands='some'\)"),
        (lambda: WaRA(2, bands={"LL2": 3}), "1 levels have the bands LL1, LH1, HL1, HH1"),
        (lambda: WaRA(2, bands={}), "1 levels have the bands"),
        (lambda: recipes.wara(r=4), r"recipe 'wara' has no option 'r'; its method has rank, alpha"),
    ],
)
def test_options_that_make_no_sense(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_recipes_are_json() -> None:
    for name in ("lora", "wara", "wara_adaptive", "wara_feature", "wara_tiny", "waveft", "pissa"):
        sizes = {"coefficients": 3, "scale": 2.0} if name == "waveft" else {"rank": 3, "alpha": 6.0}
        recipe = recipes.get(name)(**sizes)
        again = Recipe.from_json(recipe.to_json())
        assert again.method == recipe.method and again.to_json() == recipe.to_json()
    ranks = recipes.wara(bands={"LL1": 3})
    assert Recipe.from_json(ranks.to_json()).method == ranks.method


def test_adapters_compile() -> None:
    model = trained(nn.Sequential(nn.Linear(12, 10), nn.ReLU()), recipes.wara(rank=2, wavelet="db2"))
    x = torch.randn(5, 12)
    torch._dynamo.reset()
    found = torch.compile(model, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(found, model(x))


def test_make_dense_of_an_adapted_model(tiny_llama: Callable[..., Any]) -> None:
    model = trained(tiny_llama(), recipes.wara(rank=2))
    outputs = model(IDS).logits
    torch.testing.assert_close(rankfold.to_dense_(model)(IDS).logits, outputs, rtol=1e-4, atol=1e-4)
