"""Healing in memory: the loss by hand, what trains and what cannot move, storage, and the way back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_heal import sharp, small, windows

from rankfold import recipes, refine_trainer
from rankfold.evaluate import kl_to
from rankfold.factorize import factorize_
from rankfold.hosts import hosts
from rankfold.refine import heal_
from rankfold.refine_state import Trainable, nbytes
from rankfold.refine_trainer import divergence
from rankfold.sparse_code import SparseCode
from rankfold.straight_through import StraightThrough

Make = Callable[..., Any]
TRAIN, HELD = windows(16, 1), windows(4, 2)
QUICK: dict[str, Any] = {"batch_size": 4, "lr": 3e-4, "warmup": 0.0, "eval_every": 2}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(
        a.dtype == two[key].dtype and torch.equal(a, two[key]) for key, a in one.items()
    )


def by_hand(original: Tensor, healed: Tensor, ids: Tensor, lm: float) -> Tensor:
    p = original.softmax(-1)
    kl = (p * (p.clamp_min(1e-300).log() - healed.log_softmax(-1))).sum(-1).mean()
    own = F.cross_entropy(healed[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return (1 - lm) * kl + lm * own


@pytest.mark.parametrize("lm", [0.0, 0.3])
def test_the_loss_and_its_gradient(lm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor([[1, 4, 0, 2], [3, 3, 1, 0]])
    original, found = torch.randn(2, 4, 5), torch.randn(2, 4, 5, requires_grad=True)
    for chunk in (2**24, 10):  # all at once, and two tokens at a time
        monkeypatch.setattr(refine_trainer, "CHUNK", chunk)
        exact = found.detach().double().requires_grad_()
        (2 * by_hand(original.double(), exact, ids, lm)).backward()
        found.grad = None
        loss = divergence(original, found, ids, lm)
        (2 * loss).backward()
        torch.testing.assert_close(loss.detach(), by_hand(original, found, ids, lm).detach())
        assert exact.grad is not None
        torch.testing.assert_close(found.grad, exact.grad.float(), atol=1e-6, rtol=1e-5)
    equal = divergence(original, original.clone().requires_grad_(), ids)
    assert abs(float(equal.detach())) < 1e-6


def test_the_loss_of_masked_logits_and_of_bfloat16() -> None:
    ids = torch.tensor([[1, 0, 2]])
    one, two = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    one[..., 3] = two[..., 3] = -torch.inf
    found = two.clone().requires_grad_()
    loss = divergence(one, found, ids, 0.5)
    loss.backward()
    assert loss.isfinite() and found.grad is not None and found.grad.isfinite().all()
    half = two[..., :3].bfloat16().requires_grad_()
    rough = divergence(one[..., :3].bfloat16(), half, ids)
    rough.backward()
    assert rough.dtype == torch.float32 and half.grad is not None and half.grad.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"logits \(1, 3, 4\).*\(1, 3, 3\)"):
        divergence(one, two[..., :3], ids)


RECIPES = {
    "low rank": recipes.svd_llm,
    "codes": recipes.rocket,
    "shared": recipes.basis_sharing,
    "grouped codes": recipes.cospadi_grouped,
}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("low rank", "grouped codes")]


@pytest.mark.parametrize("name", ["codes", "shared", *SLOW])
def test_healing_keeps_structure_and_bytes(name: str, tiny_llama: Make) -> None:
    original, model = sharp(tiny_llama()), small(tiny_llama, RECIPES[name]).train()
    was, specs, size = state(model), {n: h.weight.spec() for n, h in hosts(model).items()}, nbytes(model)
    teacher, said = state(original), []
    first = next(model.parameters()).requires_grad_(False)
    before = kl_to(original, model, HELD)
    found = heal_(model, original, TRAIN, HELD, say=said.append, **QUICK)
    assert found.before == pytest.approx(before) and found.after < before and found.step in (2, 4)
    assert found.after == found.attempt == kl_to(original, model, HELD)
    assert [step for step, _ in found.held] == [0, 2, 4] and len(found.train) == 4 and len(said) == 2
    assert {n: h.weight.spec() for n, h in hosts(model).items()} == specs and nbytes(model) == size
    now = state(model)
    moved = {key for key in was if not torch.equal(was[key], now[key])}
    frozen = {"model.embed_tokens.weight", "lm_head.weight"}
    assert moved == {key for key, t in was.items() if t.is_floating_point() and key not in frozen}
    assert same(teacher, state(original)) and model.training and not original.training
    assert not first.requires_grad and all(p.grad is None for p in model.parameters())
    assert model.config.use_cache and found.memory["optimizer"] == 8 * found.trained
    shared = {id(p) for host in hosts(model).values() for p in host.weight.parameters()}
    assert (len(shared) < 2 * len(hosts(model))) == ("shared" in name or "grouped" in name)


@pytest.mark.parametrize(
    ("storage", "dtype"),
    [
        ("bf14", torch.float32),
        ("int8", torch.bfloat16),
        pytest.param("bf14", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("int8", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_packed_values_train_and_are_packed_again(storage: str, dtype: torch.dtype, tiny_llama: Make) -> None:
    original, model = sharp(tiny_llama()), small(tiny_llama, storage=storage).to(dtype)
    was, size = state(model), nbytes(model)
    found = heal_(model, original, TRAIN, HELD, **QUICK)
    now = state(model)
    assert 0 < found.step and found.after == kl_to(original, model, HELD) < found.before
    assert nbytes(model) == size and was.keys() == now.keys()
    assert all(now[key].dtype == tensor.dtype for key, tensor in was.items())
    key = "packed" if storage == "bf14" else "quantized"
    assert any(not torch.equal(was[name], now[name]) for name in was if name.endswith(key))
    supports = [key for key in was if key.endswith("support")]
    assert supports and all(torch.equal(was[key], now[key]) for key in supports)
    assert {h.weight.spec()["storage"] for h in hosts(model).values()} == {storage}


@pytest.mark.parametrize(
    ("storage", "dtype"),
    [
        ("", torch.float32),
        ("int8", torch.bfloat16),
        pytest.param("", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("bf14", torch.float32, marks=pytest.mark.slow),
        pytest.param("bf14", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_a_model_that_cannot_be_better_is_left_as_it_was(
    storage: str, dtype: torch.dtype, tiny_llama: Make
) -> None:
    model = small(tiny_llama, storage=storage).to(dtype)
    twin, was = copy.deepcopy(model), state(model)
    found = heal_(model, twin, TRAIN[:4], HELD, **QUICK)
    assert found.step == 0 and found.after == found.before == pytest.approx(0, abs=1e-6)
    assert same(was, state(model)) and kl_to(twin, model, HELD) == found.before


def test_packing_that_undoes_the_gain_is_noticed(tiny_llama: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    original, model = sharp(tiny_llama()), small(tiny_llama, storage="int8")
    was, pack = state(model), SparseCode.of

    def worse(dictionary: Tensor, values: Tensor, *rest: Any, **options: Any) -> SparseCode:
        return pack(dictionary, values * 3, *rest, **options)

    close_ = Trainable.close_

    def spoilt(opened: Trainable) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(SparseCode, "of", worse)
            close_(opened)

    monkeypatch.setattr(Trainable, "close_", spoilt)
    found = heal_(model, original, TRAIN, HELD, **QUICK)
    assert found.step == 0 and found.attempt > found.before == found.after
    assert same(was, state(model))


def interrupt(_: str) -> None:
    raise KeyboardInterrupt


def test_an_exception_leaves_the_model_as_it_was(tiny_llama: Make) -> None:
    original, model = sharp(tiny_llama()), small(tiny_llama, storage="bf14").bfloat16()
    was = state(model)
    with pytest.raises(KeyboardInterrupt):
        heal_(model, original, TRAIN, HELD, say=interrupt, **QUICK)
    assert same(was, state(model))
    with pytest.raises(ValueError, match="diverged"):
        heal_(model, original, TRAIN, HELD, **{**QUICK, "lr": 1e30, "clip": 0.0})
    assert same(was, state(model)) and model.config.use_cache


@pytest.mark.slow
def test_options_of_the_loss_and_of_what_trains(tiny_llama: Make) -> None:
    original, compressed = sharp(tiny_llama()), small(tiny_llama)
    found = {}
    for name, more in (
        ("plain", {}),
        ("again", {}),
        ("lm", {"lm": 0.5}),
        ("embeddings", {"embeddings": True}),
        ("halves", {"batch_size": 2, "accumulate": 2}),
        ("autocast", {"dtype": "bfloat16"}),
    ):
        model = copy.deepcopy(compressed)
        heal_(model, original, TRAIN[:4], HELD, **{**QUICK, **more})
        found[name] = state(model)
    assert same(found["plain"], found["again"])
    for name in ("lm", "embeddings", "autocast"):
        assert not same(found["plain"], found[name]), name
    table = "model.embed_tokens.weight"
    assert not torch.equal(found["embeddings"][table], found["plain"][table])
    assert found["autocast"][table].dtype == torch.float32
    for key, tensor in found["plain"].items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, found["halves"][key], atol=1e-4, rtol=1e-3)


def test_models_that_do_not_go_together(tiny_llama: Make) -> None:
    original, model = sharp(tiny_llama()), small(tiny_llama)
    for message, left, right, more in (
        ("no factorized layer", sharp(tiny_llama()), original, {}),
        ("one object", model, model, {}),
        (r"logits \(1, 2, 128\).*\(1, 2, 64\)", model, tiny_llama(vocab_size=64), {}),
        ("not a causal language model", nn.Linear(2, 2), original, {}),
        ("--lm 1:", model, original, {"lm": 1.0}),
        ("--lr", model, original, {"lr": -1.0}),
        ("less than one step of 32", model, original, {"batch_size": 32}),
        ("reads from 2 to 8", model, tiny_llama(max_position_embeddings=8), {}),
    ):
        with pytest.raises(ValueError, match=message):
            heal_(left, right, TRAIN, HELD, **{**QUICK, **more})
    with pytest.raises(ValueError, match=r"windows \(16, 16\) and held_out \(4, 8\)"):
        heal_(model, original, TRAIN, HELD[:, :8])
    tuned = copy.deepcopy(model)
    tuned.peft_config = {"default": {}}
    with pytest.raises(ValueError, match="has adapters on it"):
        heal_(tuned, original, TRAIN, HELD, **QUICK)
    StraightThrough().start_(model)
    with pytest.raises(ValueError, match="in training by a regime"):
        heal_(model, original, TRAIN, HELD, **QUICK)


def test_low_rank_plus_sparse_heals(tiny_llama: Make) -> None:
    original, model = sharp(tiny_llama()), sharp(tiny_llama())
    factorize_(model, recipes.sltrain(rank=8, sparsity=0.05))
    places = {key: tensor for key, tensor in state(model).items() if not tensor.is_floating_point()}
    found = heal_(model, original, TRAIN, HELD, **QUICK)
    assert found.after < found.before and places
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in places.items())


def test_the_code_of_the_page_runs(tiny_llama: Make, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent / "docs/healing.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    original, model = sharp(tiny_llama()), small(tiny_llama)
    exec(code, {"model": model, "original": original, "windows": TRAIN, "held_out": HELD})
    before, after, step = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert float(after) < float(before) and int(step) > 0
