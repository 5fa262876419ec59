"""Straight-through training: the gradients of the page, choices that move and then stand, the export."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toy_codes import code, coded, master, train

import rankfold
from rankfold.masters import CodeMaster, WeightMaster
from rankfold.methods import SVD, Dictionary
from rankfold.sparse_code import SparseCode
from rankfold.straight_through import StraightThrough

METHOD = Dictionary(solver="ksvd", width=8, ratio=2.0, sweeps=3)


# Gradients


def example() -> CodeMaster:
    """The vector of the page: B, Z, one nonzero of three. Two rows of zeros go with it, as atoms may not
    outnumber both rows and columns."""
    basis = torch.tensor([[[1.0, 0], [0, 1], [0.6, 0.8]]])
    held = CodeMaster.of(SparseCode.of(basis, torch.zeros(3, 1, 1), torch.zeros(3, 1, 1, dtype=torch.long)))
    with torch.no_grad():
        held.codes[0, 0] = torch.tensor([3.0, 1, 2])
    held.select_(1)
    return held


GRADIENT = torch.tensor([[1.0, 1], [0, 0], [0, 0]])


def test_gradients_go_straight_through_the_mask() -> None:
    held = example()
    assert held.coefficients()[0].tolist() == [[3, 0, 0]]
    weight = held.to_dense()
    assert weight[0].tolist() == [3, 0]
    weight.backward(GRADIENT)
    assert held.dictionary.grad is not None and held.codes.grad is not None
    assert held.dictionary.grad.tolist() == [[[3, 3], [0, 0], [0, 0]]]
    torch.testing.assert_close(held.codes.grad[0], torch.tensor([[1.0, 1.0, 1.4]]))


def test_gradients_of_a_fixed_mask_stay_inside_it() -> None:
    held = example()
    held.straight = False
    held.to_dense().backward(GRADIENT)
    assert held.codes.grad is not None and held.codes.grad[0].tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("orient", ["in", "out"])
def test_dictionary_gradient_equals_finite_differences(orient: str) -> None:
    held = CodeMaster.of(code(orient=orient)).double()
    x = torch.randn(5, held.shape[1], dtype=torch.float64)

    def loss() -> Tensor:
        return held(x).sin().sum()

    loss().backward()
    assert held.dictionary.grad is not None
    for place in [(0, 0, 0), (1, 3, 2), (1, 5, 1)]:
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                held.dictionary[place] += step
                values.append(float(loss()))
                held.dictionary[place] -= step
        assert float(held.dictionary.grad[place]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("orient", ["in", "out"])
def test_gradient_of_the_codes_is_that_of_all_dense_codes(orient: str) -> None:
    """G Dᵀ at every place: what dense codes of the same product would have."""
    held = CodeMaster.of(code(orient=orient)).double()
    x = torch.randn(5, held.shape[1], dtype=torch.float64)
    held(x).sin().sum().backward()
    dense = (held.codes.detach() * held.mask).requires_grad_()
    product = torch.einsum("rba,baw->rbw", dense, held.dictionary.detach()).flatten(1)
    (x @ (product.mT if orient == "in" else product)).sin().sum().backward()
    assert held.codes.grad is not None and dense.grad is not None
    torch.testing.assert_close(held.codes.grad, dense.grad)
    assert bool((held.codes.grad[~held.mask] != 0).all())


def test_weight_gradient_is_the_identity() -> None:
    weight, x = torch.randn(6, 5), torch.randn(4, 5)
    held = WeightMaster.of(weight, SVD().fit(weight, rankfold.Metric(), 2))
    held(x).sum().backward()
    assert held.full.grad is not None
    torch.testing.assert_close(held.full.grad, torch.ones(4, 6).mT @ x)
    torch.testing.assert_close(held(x), held.fitted(x))
    assert all(p.grad is None and not p.requires_grad for p in held.fitted.parameters())


# Choices


@pytest.mark.parametrize("orient", ["in", "out"])
def test_a_master_is_its_structure(orient: str) -> None:
    held, x = code(orient=orient), torch.randn(3, 8 if orient == "in" else 12)
    twin = CodeMaster.of(held)
    torch.testing.assert_close(twin(x), held(x))
    torch.testing.assert_close(twin.to_dense(), held.to_dense())
    again = twin.export()
    assert torch.equal(again.support, held.support) and torch.equal(again.values, held.values)
    assert again.dictionary is held.dictionary and twin.moved() == 0


@pytest.mark.parametrize("orient", ["in", "out"])
def test_unused_codes_start_at_their_correlation_with_the_residual(orient: str) -> None:
    held = code(orient=orient)
    residual = 0.3 * torch.randn(held.shape)
    weight = held.to_dense().detach() + residual
    twin = CodeMaster.of(held, weight)
    assert torch.equal(twin.mask, twin.first) and torch.equal(twin.export().values, held.values)
    torch.testing.assert_close(twin.to_dense(), held.to_dense())
    model = nn.ModuleDict({"a": nn.Linear(*held.shape[::-1])})
    model["a"] = rankfold.Layer(model["a"]).wrap(held)
    StraightThrough(freeze=0).start_(model, weights={"a": weight})
    scaled = master(model)  # unit atoms
    before = scaled.mask.clone()
    scaled.select_(2)
    assert torch.equal(scaled.mask, before)
    parts = (residual if orient == "in" else residual.mT).unflatten(1, (2, 4))
    near = torch.einsum("rbw,baw->rba", parts, scaled.dictionary.detach())
    least = scaled.codes.detach().abs().masked_fill(~before, torch.inf).amin(-1, keepdim=True)
    expected = near.clamp(-least, least)[~before]
    torch.testing.assert_close(scaled.codes.detach()[~before], expected, rtol=1e-4, atol=1e-5)


def test_ties_and_zero_rows_keep_exactly_s() -> None:
    held = CodeMaster.of(code(nonzeros=3))
    with torch.no_grad():
        held.codes[0] = 0.0
        held.codes[1] = -2.0
        held.codes[2, 0] = torch.tensor([1.0, 1, 1, 1, 2, 0])
        held.codes[3, 0] = torch.tensor([0.0, 0, 0, 0, 0, 9])
    before = held.mask.clone()
    for count in (3, 3, 5, 6, 1, 3):
        held.select_(count)
        assert bool((held.mask.sum(-1) == count).all())
    held.mask.copy_(before)
    held.select_(3)
    assert torch.equal(held.mask[:2], before[:2])  # of equals, the ones in use stay
    assert held.mask[2, 0, 4] and held.mask[3, 0, 5]
    assert held.export().index().shape == (12, 2, 3)
    held.mask.zero_()
    held.select_(3)
    assert held.mask[2, 0].tolist() == [True, True, False, False, True, False]  # the first ones win


def test_fold_leaves_the_product() -> None:
    """The page's vector, and the same on random codes; equal choices whatever the rows were scaled by."""
    basis, place = torch.tensor([[[3.0, 4.0]]]), torch.zeros(1, 1, 1, dtype=torch.long)
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    model[0] = rankfold.Layer(model[0]).wrap(SparseCode.of(basis, torch.tensor([[[2.0]]]), place))
    StraightThrough(freeze=0).start_(model)
    torch.testing.assert_close(master(model).dictionary, torch.tensor([[[0.6, 0.8]]]))
    assert master(model).codes.tolist() == [[[10]]]

    plain, scaled = coded(), None
    scaled = copy.deepcopy(plain)
    factor = torch.rand(2, 6, 1) * 4 + 0.1
    with torch.no_grad():
        held = master(scaled)
        held.dictionary.mul_(factor)
        spread = factor[..., 0].expand(12, 2, 6).gather(-1, held.index().long())
        held.values.div_(spread)
    before = master(plain).to_dense().detach()
    for model in (plain, scaled):
        StraightThrough(freeze=0).start_(model)
        torch.testing.assert_close(master(model).to_dense().detach(), before)
        torch.testing.assert_close(master(model).dictionary.norm(dim=-1), torch.ones(2, 6))
    for model in (plain, scaled):
        master(model).select_(1)
    assert torch.equal(master(plain).mask, master(scaled).mask)


def test_places_move_then_stand_and_outputs_agree() -> None:
    model, regime = coded(), StraightThrough(freeze=0.5)
    regime.start_(model, steps=20)
    held = master(model)
    first = held.mask.clone()
    masks = []
    original = regime.after_step

    def after() -> None:
        original()
        masks.append(held.mask.clone())

    regime.after_step = after  # type: ignore[method-assign]
    losses = train(model, regime, 20)
    assert losses[-1] < losses[0]
    assert not torch.equal(masks[9], first)
    assert all(torch.equal(mask, masks[9]) for mask in masks[10:])
    assert all(bool((mask.sum(-1) == 2).all()) for mask in masks)
    torch.testing.assert_close(held.dictionary.norm(dim=-1), torch.ones(2, 6), rtol=0.5, atol=0.5)
    x = torch.randn(7, 8)
    trained, evaluated = model.train()(x), model.eval()(x)
    assert torch.equal(trained, evaluated)
    moved = regime.finish_()
    expected = float((masks[-1] & ~first).sum() / first.sum())
    assert moved == {"0": pytest.approx(expected)} and 0 < expected <= 1
    torch.testing.assert_close(model(x), evaluated, rtol=1e-5, atol=1e-6)


def test_rows_have_unit_norm_while_places_move() -> None:
    model, regime = coded(), StraightThrough(freeze=0)
    regime.start_(model)
    train(model, regime, 3)
    torch.testing.assert_close(master(model).dictionary.norm(dim=-1), torch.ones(2, 6))


def test_finish_leaves_a_small_structure_and_no_master(tmp_path: Path) -> None:
    model, regime = coded(nonzeros=3, atoms=5), StraightThrough()
    small = master(model).nbytes
    bias = model[0].bias
    regime.start_(model, steps=6)
    assert master(model).nbytes > small
    train(model, regime, 6)
    regime.finish_()
    held = master(model)
    assert type(held) is SparseCode and held.nbytes == small and held.nonzeros == 3
    assert {name for name, _ in model.named_parameters()} == {
        "0.weight.dictionary",
        "0.weight.values",
        "0.bias",
        "2.weight",
        "2.bias",
    }
    assert all(p.requires_grad for p in model.parameters()) and model[0].bias is bias
    folder = rankfold.save(model, tmp_path / "model")
    again = rankfold.load_(nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3)), folder)
    assert torch.equal(again(torch.ones(1, 8)), model(torch.ones(1, 8)))


def test_frozen_from_the_first_step_is_ordinary_tuning() -> None:
    """The control of the ablation: factorize, freeze the support, tune."""
    one = coded()
    two = copy.deepcopy(one)
    regime = StraightThrough(freeze=1.0)
    regime.start_(one)
    mine, theirs = train(one, regime, 15), train(two, None, 15)
    assert mine == pytest.approx(theirs, rel=1e-4)
    assert regime.finish_() == {"0": 0.0}
    torch.testing.assert_close(master(one).values, master(two).values, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(master(one).dictionary, master(two).dictionary, rtol=1e-3, atol=1e-4)


def test_ramp_goes_from_all_atoms_to_the_target() -> None:
    model, regime = coded(), StraightThrough(freeze=0.25, ramp=0.5)
    regime.start_(model, steps=8)
    held, counts = master(model), []
    original = regime.before_step

    def before() -> None:
        original()
        counts.append(int(held.mask.sum(-1)[0, 0]))
        assert bool((held.mask.sum(-1) == counts[-1]).all())

    regime.before_step = before  # type: ignore[method-assign]
    train(model, regime, 8)
    assert counts == [6, 5, 4, 3, 2, 2, 2, 2]


def test_a_ramp_cut_short_exports_the_target() -> None:
    model, regime = coded(), StraightThrough(freeze=0.25, ramp=0.5)
    regime.start_(model, steps=100)
    train(model, regime, 3)
    assert int(master(model).mask.sum(-1).max()) > 2
    regime.finish_()
    assert master(model).nonzeros == 2 and master(model).index().shape == (12, 2, 2)


def test_decay_is_the_gradient_of_the_penalty_and_of_unused_codes_alone() -> None:
    model, regime = coded(), StraightThrough(decay=0.3, freeze=0.5)
    regime.start_(model, steps=4)
    held = master(model)
    with torch.no_grad():
        held.codes.copy_(torch.randn_like(held.codes))
    held.select_(2)
    regime.before_step()
    penalty = regime.penalty()
    unused = held.codes.detach() * ~held.mask
    assert penalty.item() == pytest.approx(0.15 * float(unused.square().sum()), rel=1e-5)
    penalty.backward()
    torch.testing.assert_close(held.codes.grad, 0.3 * unused)
    held.codes.grad = torch.zeros_like(held.codes)
    regime.penalty_gradients_()
    torch.testing.assert_close(held.codes.grad, 0.3 * unused)
    regime.schedule(4, step=2)
    assert float(regime.penalty()) == 0.0


def test_codes_and_dictionaries_do_not_decay() -> None:
    model, regime = coded(), StraightThrough(freeze=0)
    model[2].bias.requires_grad_(False)
    regime.start_(model)
    decayed, plain = regime.parameter_groups(0.1)
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert {id(p) for p in decayed["params"]} == {id(model[2].weight)}
    held = master(model)
    assert {id(p) for p in plain["params"]} == {id(held.codes), id(held.dictionary), id(model[0].bias)}
