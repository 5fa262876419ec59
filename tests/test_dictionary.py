"""Dictionary learning: what each step may and may not do to the error, and fits that must come out exact."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankfold.dictionary import SOLVERS, Coded, curve, fit
from rankfold.dictionary_atoms import eigenvectors, ksvd_, mod, procrustes, reseeded, resized, sampled_rows
from rankfold.pursuit import largest, squared_error, support


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def decaying(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A matrix like a whitened weight: random, with a spectrum over three decades."""
    right = torch.linalg.qr(random(*shape[:-2], shape[-1], shape[-1], seed=seed + 7)).Q
    scale = torch.logspace(0, -3, shape[-1], dtype=torch.float64)
    return (random(*shape, seed=seed) * scale @ right).to(dtype)


def sparse(rows: int, atoms: int, nonzeros: int, seed: int = 0) -> Tensor:
    signs = random(rows, atoms, seed=seed).sign() + 0.3 * random(rows, atoms, seed=seed + 1)
    return signs * support(random(rows, atoms, seed=seed + 2), nonzeros)


def well_formed(coded: Coded, target: Tensor, atoms: int, nonzeros: int) -> None:
    lead, (rows, inner) = target.shape[:-2], target.shape[-2:]
    assert coded.dictionary.shape == (*lead, atoms, inner)
    assert coded.values.shape == coded.index.shape == (*lead, rows, nonzeros)
    assert (coded.index.diff(dim=-1) > 0).all() and coded.index.min() >= 0 and coded.index.max() < atoms
    assert torch.isfinite(coded.dictionary).all() and torch.isfinite(coded.values).all()
    norms = coded.dictionary.norm(dim=-1)
    assert ((norms - 1).abs() < 1e-5).logical_or(norms == 0).all()
    assert coded.error == pytest.approx(
        float(squared_error(target, coded.dictionary, coded.codes).sum()), rel=1e-6, abs=1e-30
    )


def error(target: Tensor, dictionary: Tensor, codes: Tensor) -> Tensor:
    return (target - codes @ dictionary).square().sum((-2, -1))


# --- steps -------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), dead=st.booleans(), twice=st.booleans(), blocks=st.sampled_from([(), (3,)]))
def test_a_dictionary_step_never_raises_the_error(seed, dead, twice, blocks):
    target, dictionary = random(*blocks, 40, 16, seed=seed), random(*blocks, 12, 16, seed=seed + 1)
    dictionary = dictionary / dictionary.norm(dim=-1, keepdim=True)
    codes = random(*blocks, 40, 12, seed=seed + 2)
    if dead:
        codes[..., 3] = 0
        codes[..., :7] = 0
    if twice:
        codes[..., 8] = codes[..., 9]
    codes = codes * support(codes, 4)
    before = error(target, dictionary, codes) * (1 + 1e-12)
    residual = target - codes @ dictionary
    for relaxation in (1.0, 1.8):
        moved = mod(dictionary, codes, residual, relaxation=relaxation)
        assert (error(target, moved, codes) <= before).all()
    one, two, three = (x.clone() for x in (dictionary, codes, residual))
    ksvd_(one, two, three, power_iterations=3)
    assert (error(target, one, two) <= before).all()
    assert torch.allclose(three, target - two @ one, atol=1e-12), "the residual is up to date"
    assert torch.allclose(one.norm(dim=-1), torch.ones(*blocks, 12, dtype=torch.float64))
    assert ((two != 0) <= (codes != 0)).all(), "the support stays"
    assert (error(target, procrustes(target, codes), codes) <= error(target, eye(target, 12), codes)).all()


def eye(target: Tensor, atoms: int) -> Tensor:
    return torch.eye(atoms, target.shape[-1], dtype=target.dtype).expand(*target.shape[:-2], -1, -1)


def test_least_squares_dictionary_is_the_pseudo_inverse_solution():
    target, codes = random(60, 20, seed=1), sparse(60, 10, 4)
    start = torch.zeros(10, 20, dtype=torch.float64)
    exact = torch.linalg.lstsq(codes, target).solution
    assert torch.allclose(mod(start, codes, target - codes @ start), exact, atol=1e-4)


def test_power_iterations_reach_the_best_rank_one_update():
    """One atom: the update is the leading singular pair, also from a start that is almost orthogonal to
    it."""
    target = decaying(30, 12)
    _, s, v = torch.linalg.svd(target, full_matrices=False)
    for start in (v[0] + v[1], v[5] + 1e-4 * v[0]):
        dictionary, codes = (start / start.norm())[None].clone(), target @ (start / start.norm())[:, None]
        residual = target - codes @ dictionary
        ksvd_(dictionary, codes, residual, power_iterations=60)
        assert torch.allclose((dictionary @ v[0]).abs(), torch.ones(1, dtype=torch.float64), atol=1e-6)
        assert torch.allclose(codes.norm(), s[0], rtol=1e-9)
        assert torch.allclose(residual.norm(), s[1:].norm(), rtol=1e-9)


def test_atoms_without_use_become_different_badly_coded_rows():
    target, dictionary = random(2, 20, 8, seed=1), random(2, 6, 8, seed=2)
    codes = random(2, 20, 6, seed=3)
    codes[0, :, 2] = codes[0, :, 4] = codes[1, :, 5] = 0
    residual = target - codes @ dictionary
    worst = residual.norm(dim=-1).argsort(dim=-1, descending=True)

    def unit(block: int, turn: int) -> Tensor:
        row = residual[block, worst[block, turn]]
        return row / row.norm()

    new = reseeded(dictionary, codes, residual)
    assert torch.allclose(new[0, 2], unit(0, 0)) and torch.allclose(new[0, 4], unit(0, 1))
    assert torch.allclose(new[1, 5], unit(1, 0)) and torch.equal(new[1, :5], dictionary[1, :5])
    one, two, three = (
        x.clone() for x in (dictionary / dictionary.norm(dim=-1, keepdim=True), codes, residual)
    )
    ksvd_(one, two, three)
    assert torch.allclose(one.norm(dim=-1), torch.ones(2, 6, dtype=torch.float64))
    assert (one[0, 2] - one[0, 4]).norm() > 0.1


def test_eigenvectors_are_orthonormal_from_either_side():
    for shape in ((30, 12), (12, 30), (3, 20, 20)):
        target = decaying(*shape)
        found = eigenvectors(target, 10)
        assert torch.allclose(
            found @ found.mT, torch.eye(10, dtype=torch.float64).expand(*shape[:-2], 10, 10)
        )
        tail = torch.linalg.svdvals(target)[..., 10:].square().sum(-1)
        assert torch.allclose((target - target @ found.mT @ found).square().sum((-2, -1)), tail)
    for target in (torch.zeros(6, 9), torch.ones(6, 9), torch.ones(9, 6), 1e-30 * torch.ones(6, 9)):
        found = eigenvectors(target, 5)
        assert torch.allclose(found @ found.mT, torch.eye(5), atol=1e-5)


def test_rows_to_start_from_follow_the_seed():
    target = random(20, 5, seed=1)
    target[3] = 0
    first, again, other = (sampled_rows(target, 20, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.allclose(first.norm(dim=-1), torch.ones(20, dtype=torch.float64))


# --- fits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(60, 24), (40, 50), (2, 3, 30, 16)])
def test_every_solver_returns_codes_of_its_size_and_the_best_iterate(solver, dtype, shape):
    target = decaying(*shape, dtype=dtype)
    atoms, nonzeros = 14, 6
    coded = fit(target, atoms, nonzeros, solver, sweeps=4)
    well_formed(coded, target, atoms, nonzeros)
    start = curve(target, [(atoms, nonzeros)])[0]
    assert coded.error <= min(coded.history) * (1 + 1e-5) and coded.error <= start * (1 + 1e-5)
    if solver in ("fast", "ksvd", "mod"):
        assert coded.error < 0.8 * start
    again = fit(target, atoms, nonzeros, solver, sweeps=4)
    assert torch.equal(coded.values, again.values) and torch.equal(coded.dictionary, again.dictionary)


@pytest.mark.parametrize("solver", SOLVERS)
def test_blocks_together_are_blocks_one_by_one(solver):
    target = decaying(3, 40, 16)
    together = fit(target, 12, 5, solver, sweeps=1)
    for block in range(3):
        alone = fit(target[block], 12, 5, solver, sweeps=1)
        assert torch.equal(together.index[block], alone.index)
        assert torch.allclose(
            together.codes.dense(12)[block] @ together.dictionary[block],
            alone.codes.dense(12) @ alone.dictionary,
            atol=1e-9,
        )


@pytest.mark.parametrize("solver", SOLVERS)
def test_as_many_nonzeros_as_inputs_reproduce_the_matrix(solver):
    target = decaying(30, 12)
    coded = fit(target, 12, 12, solver, sweeps=2)
    assert coded.error <= 1e-20 * float(target.square().sum())
    subspace = fit(target, 7, 7, solver, sweeps=2)
    tail = float(torch.linalg.svdvals(target)[7:].square().sum())
    assert subspace.error == pytest.approx(tail, rel=1e-6), "s = k is the truncated decomposition"


@pytest.mark.parametrize("solver", ["fast", "ksvd", "mod"])
def test_a_planted_dictionary_is_a_fixed_point(solver):
    dictionary = torch.linalg.qr(random(64, 64)).Q[:40] + 0.01 * random(40, 64, seed=1)
    dictionary = dictionary / dictionary.norm(dim=-1, keepdim=True)
    codes = sparse(300, 40, 4, seed=2)
    target = codes @ dictionary
    planted = Coded(dictionary, *largest(codes, 4), 0.0, ())
    coded = fit(target, 40, 4, solver, sweeps=2, warm=planted)
    assert coded.error <= 1e-18 * float(target.square().sum())
    assert torch.equal(coded.index, planted.index)


@pytest.mark.parametrize(("solver", "pursuit"), [("ksvd", "omp"), ("ksvd", "fast"), ("mod", "omp")])
def test_dictionary_is_learned_from_rows(solver, pursuit):
    """Planted, 3 of 20: a few sweeps from random rows explain nearly all of it."""
    dictionary = random(20, 16, seed=1)
    target = sparse(600, 20, 3, seed=2) @ (dictionary / dictionary.norm(dim=-1, keepdim=True))
    coded = fit(target, 20, 3, solver, sweeps=25, start="rows", pursuit=pursuit, seed=3)
    assert coded.error < 0.1 * float(target.square().sum())
    assert (coded.values < 0).any(), "negative coefficients occur"


def test_compot_is_orthonormal_and_never_rises():
    coded = fit(decaying(80, 30), 20, 8, "compot", sweeps=12)
    assert torch.allclose(
        coded.dictionary @ coded.dictionary.mT, torch.eye(20, dtype=torch.float64), atol=1e-10
    )
    history = torch.tensor(coded.history, dtype=torch.float64)
    assert (history.diff() <= 1e-12).all()


def test_rocket_weighs_its_atoms():
    target = decaying(50, 20)
    asked = []

    def weight(vectors: Tensor) -> Tensor:
        asked.append(vectors)
        return torch.cat([torch.full((3,), 1e9), torch.ones(9)]).double()

    coded = fit(target, 12, 5, "rocket", atom_weight=weight)
    assert torch.equal(coded.index[:, :3], torch.arange(3).expand(50, 3)), "what weighs most is always kept"
    assert torch.equal(asked[0], eigenvectors(target, 12))
    assert coded.error >= fit(target, 12, 5, "rocket").error * 0.999


def test_row_weight_is_the_weighted_problem():
    target, weight = decaying(50, 20), random(50, seed=5).abs()
    weight[4] = 0
    coded = fit(target, 12, 5, sweeps=5, row_weight=weight)
    residual = target - coded.codes.dense(12) @ coded.dictionary
    assert coded.error == pytest.approx(float((weight * residual.square().sum(-1)).sum()), rel=1e-6)
    assert float(residual[4].square().sum()) <= float(target[4].square().sum()), (
        "a row of no weight is coded too"
    )
    weight = torch.where(torch.arange(50) < 10, 1000.0, 1.0).double()
    coded, plain = fit(target, 12, 5, sweeps=5, row_weight=weight), fit(target, 12, 5, sweeps=5)
    rest = target - plain.codes.dense(12) @ plain.dictionary
    assert coded.error < float((weight * rest.square().sum(-1)).sum())
    again = fit(target, 12, 5, sweeps=0, row_weight=weight, warm=coded)
    assert again.error <= coded.error * (1 + 1e-9)
    assert torch.allclose(
        fit(target, 12, 5, sweeps=2, row_weight=torch.full((50,), 4.0)).values,
        fit(target, 12, 5, sweeps=2).values,
    )


def test_warm_starts_in_both_directions():
    target = decaying(80, 30)
    small = fit(target, 12, 5, sweeps=10)
    larger = fit(target, 16, 8, sweeps=3, warm=small)
    well_formed(larger, target, 16, 8)
    assert larger.error < small.error
    back = fit(target, 12, 5, sweeps=3, warm=larger)
    well_formed(back, target, 12, 5)
    assert back.error < curve(target, [(12, 5)])[0]
    wide = fit(target, 50, 8, sweeps=1, warm=small)  # beyond a basis
    well_formed(wide, target, 50, 8)
    dictionary, codes = resized(target, small.dictionary, small.codes, 20)
    assert torch.allclose(codes @ dictionary, small.codes.dense(12) @ small.dictionary)


# --- curve -------------------------------------------------------------------------------------------------


def test_curve_is_the_start_of_the_fit_and_falls_with_the_size():
    for shape in ((60, 24), (24, 60), (3, 20, 16)):
        target = decaying(*shape)
        sizes = [(2, 1), (4, 1), (4, 2), (8, 2), (8, 4), (12, 8), (16, 16), (70, 35), (70, 70)]
        errors = curve(target, sizes)
        assert all(later <= earlier for earlier, later in pairwise(errors))
        assert errors[-1] < 1e-10
        assert errors[4] == pytest.approx(fit(target, 8, 4, sweeps=0).history[0], rel=1e-9)


# --- bad and degenerate input ------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_targets_stay_finite(solver, dtype):
    repeated = random(1, 12, dtype=dtype).expand(30, 12).clone()
    some_zero = random(30, 12, seed=1, dtype=dtype)
    some_zero[::2] = 0
    for target in (
        torch.zeros(30, 12, dtype=dtype),
        repeated,
        some_zero,
        1e-18 * some_zero,
        1e12 * some_zero,
    ):
        for start in ("eigen", "rows"):
            for atoms, nonzeros in ((1, 1), (10, 3), (12, 12)):
                coded = fit(target, atoms, nonzeros, solver, sweeps=3, start=start)
                well_formed(coded, target, atoms, nonzeros)
                assert coded.error <= float(target.double().square().sum()) * (1 + 1e-5)
    assert fit(repeated, 5, 2, solver, sweeps=2).error <= 1e-9 * float(repeated.square().sum())


@pytest.mark.parametrize("solver", ["fast", "ksvd", "mod"])
@pytest.mark.parametrize("start", ["eigen", "rows"])
def test_more_atoms_than_inputs(solver, start):
    target = random(60, 8)
    coded = fit(target, 20, 3, solver, sweeps=5, start=start)
    well_formed(coded, target, 20, 3)
    assert coded.error < fit(target, 8, 3, solver, sweeps=5).error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"atoms": 0, "nonzeros": 0}, "nonzeros=0 of atoms=0"),
        ({"nonzeros": 0}, "nonzeros=0"),
        ({"nonzeros": 9}, "nonzeros=9 of atoms=8"),
        ({"atoms": 31}, "atoms=31 of 30 rows"),
        ({"atoms": 13, "solver": "compot"}, "13 do not fit into 12"),
        ({"atoms": 13, "solver": "rocket"}, "13 do not fit into 12"),
        ({"solver": "best"}, "solver='best' is none of 'fast'"),
        ({"start": "zero"}, "start='zero'"),
        ({"pursuit": "lasso"}, "pursuit='lasso'"),
        ({"target": torch.full((30, 12), math.nan)}, "360 NaN"),
        ({"target": torch.ones(30, 12).half()}, "float32 or float64"),
        ({"row_weight": torch.ones(3)}, "row_weight"),
        ({"row_weight": -torch.ones(30)}, "row_weight"),
    ],
)
def test_bad_input_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        fit(**{"target": random(30, 12), "atoms": 8, "nonzeros": 3, **change})


def test_curve_refuses_sizes_that_are_none():
    with pytest.raises(ValueError, match="nonzeros=5 of atoms=4"):
        curve(random(9, 9), [(4, 5)])
    with pytest.raises(ValueError, match="NaN"):
        curve(torch.full((3, 3), math.nan), [(1, 1)])


def test_progress_and_interrupt():
    calls: list[tuple[int, int]] = []
    fit(decaying(30, 12), 8, 3, sweeps=4, progress=lambda *call: calls.append(call))
    assert calls == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    target = decaying(30, 12)
    kept = target.clone()

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(target, 8, 3, sweeps=4, progress=stop)
    assert torch.equal(target, kept)


def test_no_gradient_is_recorded():
    target = decaying(30, 12).requires_grad_()
    coded = fit(target, 8, 3, "ksvd", sweeps=2)
    assert not coded.dictionary.requires_grad and not coded.values.requires_grad


def test_tolerance_stops_early():
    target = decaying(60, 24)
    full, early = fit(target, 12, 5, sweeps=40), fit(target, 12, 5, sweeps=40, tolerance=0.05)
    assert len(early.history) < len(full.history) == 41
    assert dataclasses.is_dataclass(early) and early.error >= full.error
