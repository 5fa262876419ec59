"""Sparse coding: the worked examples of the literature, exact recovery, and inputs that break pursuits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankfold.dictionary import fit
from rankfold.pursuit import Codes, conjugate_gradients, largest, omp, pursue, squared_error, support

CODERS = [omp, pursue]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthonormal(size: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(random(size, size, seed=seed)).Q


def well_formed(codes: Codes, atoms: int, nonzeros: int) -> None:
    assert codes.values.shape == codes.index.shape and codes.index.shape[-1] == nonzeros
    assert torch.isfinite(codes.values).all()
    assert (codes.index.diff(dim=-1) > 0).all(), "ascending, no index twice"
    assert codes.index.min() >= 0 and codes.index.max() < atoms


THREE = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0, 0, 1], [0, 0.6, 0.8]], dtype=torch.float64)
Y3 = torch.tensor([[2.0, 1.0, 0.5]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("nonzeros", "index", "values", "residual"),
    [
        (1, [1], [2.2], [0.24, -0.32, 0.5]),
        (2, [1, 2], [2.2, 0.5], [0.24, -0.32, 0.0]),
        (3, [0, 1, 2], [2 / 3, 5 / 3, 0.5], [0.0, 0.0, 0.0]),
    ],
)
def test_matching_pursuit_takes_the_atoms_of_the_worked_example(nonzeros, index, values, residual):
    codes = omp(Y3, THREE, nonzeros)
    assert codes.index.tolist() == [index]
    assert torch.allclose(codes.values, torch.tensor([values], dtype=torch.float64))
    rest = Y3 - codes.dense(4) @ THREE
    assert torch.allclose(rest, torch.tensor([residual], dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("coder", CODERS)
def test_two_dimensional_example(coder):
    atoms = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)
    codes = coder(torch.tensor([[1.0, 3.0]], dtype=torch.float64), atoms, 2)
    assert squared_error(torch.tensor([[1.0, 3.0]], dtype=torch.float64), atoms, codes) < 1e-20
    if coder is omp:
        assert codes.index.tolist() == [[0, 1]]
        assert torch.allclose(codes.values, torch.tensor([[-1.25, 3.75]], dtype=torch.float64))


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_rows_over_incoherent_atoms_are_found_exactly(coder, dtype):
    atoms = orthonormal(48)[:40] + 0.01 * random(40, 48, seed=1)
    true = random(30, 40, seed=2).sign() + 0.3 * random(30, 40, seed=3)
    true = true * support(random(30, 40, seed=4), 6)
    codes = coder((true @ atoms).to(dtype), atoms.to(dtype), 6)
    well_formed(codes, 40, 6)
    assert torch.allclose(codes.dense(40).double(), true, atol=1e-5 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("nonzeros", [40, 50])
def test_elimination_also_recovers_beyond_the_few(nonzeros):
    atoms = orthonormal(128)[:100] + 0.003 * random(100, 128, seed=1)
    true = (random(20, 100, seed=2).sign() + 0.3 * random(20, 100, seed=3)) * support(
        random(20, 100, seed=4), nonzeros
    )
    codes = pursue(true @ atoms, atoms, nonzeros)
    assert torch.allclose(codes.dense(100), true, atol=1e-5)


@pytest.mark.parametrize("coder", CODERS)
def test_orthonormal_atoms_give_the_largest_projections(coder):
    atoms, target = orthonormal(80)[:70], random(25, 80, seed=1)
    best = largest(target @ atoms.mT, 35)
    codes = coder(target, atoms, 35)
    assert torch.equal(codes.index, best.index)
    assert torch.allclose(codes.values, best.values)


@pytest.mark.parametrize("coder", CODERS)
def test_all_atoms_solve_least_squares(coder):
    target, atoms = random(20, 50, seed=1), orthonormal(50)[:40] + 0.05 * random(40, 50, seed=2)
    codes = coder(target, atoms, 40)
    exact = torch.linalg.lstsq(atoms.mT, target.mT).solution.mT
    assert codes.index.tolist() == [list(range(40))] * 20
    assert torch.allclose(codes.values, exact, atol=1e-4)


def test_coefficients_are_the_least_squares_of_their_support():
    target, atoms = random(7, 20, seed=1), random(24, 20, seed=2)
    codes = omp(target, atoms, 9)
    for row, values, index in zip(target, *codes, strict=True):
        assert torch.allclose(torch.linalg.lstsq(atoms[index].mT, row[:, None]).solution[:, 0], values)


@pytest.mark.parametrize("coder", CODERS)
def test_lengths_of_atoms_change_only_the_coefficients(coder):
    target, atoms = random(12, 60, seed=1), random(60, 60, seed=2)
    length = torch.logspace(-4, 4, 60, dtype=torch.float64)[:, None]
    plain, scaled = coder(target, atoms, 40), coder(target, atoms * length, 40)
    assert torch.equal(plain.index, scaled.index)
    assert torch.allclose(scaled.dense(60) * length.mT, plain.dense(60))


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("nonzeros", [8, 40])
def test_blocks_together_are_blocks_one_by_one(coder, nonzeros):
    target, atoms = random(2, 3, 15, 48, seed=1), random(2, 3, 60, 48, seed=2)
    together = coder(target, atoms, nonzeros)
    well_formed(together, 60, nonzeros)
    for i in range(2):
        for j in range(3):
            alone = coder(target[i, j], atoms[i, j], nonzeros)
            assert torch.equal(together.index[i, j], alone.index)
            assert torch.allclose(together.values[i, j], alone.values)


def test_a_coherent_block_does_not_change_its_neighbour():
    target = random(2, 15, 60, seed=1)
    atoms = torch.stack(
        [orthonormal(60)[:50] + 0.03 * random(50, 60, seed=2), target[0, :1] + target[0, :5].repeat(10, 1)]
    )
    together = pursue(target, atoms, 40)
    for block in range(2):
        alone = pursue(target[block], atoms[block], 40)
        assert torch.equal(together.index[block], alone.index)
        assert torch.allclose(together.values[block], alone.values, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), atoms=st.integers(34, 90), part=st.floats(0.2, 1.0))
def test_pursue_is_never_worse_than_matching_pursuit_on_coherent_atoms(seed, atoms, part):
    target = random(20, 40, seed=seed)
    dictionary = random(atoms, 12, seed=seed + 1) @ random(12, 40, seed=seed + 2)
    dictionary += 0.1 * random(atoms, 40, seed=seed + 3)
    nonzeros = max(1, round(part * atoms))
    reference = squared_error(target, dictionary, omp(target, dictionary, nonzeros))
    assert (
        squared_error(target, dictionary, pursue(target, dictionary, nonzeros))
        <= (1 + 1e-6) * reference + 1e-9
    )


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("nonzeros", [8, 40])
def test_memory_sets_the_batches_and_not_the_result(coder, nonzeros):
    target, atoms = random(2, 25, 64, seed=1), random(2, 60, 64, seed=2)
    whole, single = coder(target, atoms, nonzeros), coder(target, atoms, nonzeros, memory=1)
    assert torch.equal(whole.index, single.index)
    assert torch.allclose(whole.values, single.values)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nonzeros", [1, 5, 40, 60])
def test_degenerate_inputs_keep_exactly_s_finite_entries(coder, dtype, nonzeros):
    atoms = random(60, 30, seed=1, dtype=dtype)  # over-complete
    atoms[1] = atoms[0]  # twice the same
    atoms[2] = -3 * atoms[0]
    atoms[3] = 0  # none at all
    atoms[4] = atoms[5] + atoms[6]
    target = random(12, 30, seed=2, dtype=dtype)
    target[0] = 0
    target[1] = atoms[0]
    target[2] *= 1e-20
    codes = coder(target, atoms, nonzeros)
    well_formed(codes, 60, nonzeros)
    error = (target - codes.dense(60) @ atoms).square().sum(-1)
    assert (error <= target.square().sum(-1) * (1 + 1e-5)).all()
    assert error[1] <= 1e-6 * target[1].square().sum()


@pytest.mark.parametrize("coder", CODERS)
def test_a_gram_of_rank_one(coder):
    atoms = torch.ones(50, 1, dtype=torch.float64) @ random(1, 20)
    codes = coder(random(6, 20, seed=1), atoms, 40)
    well_formed(codes, 50, 40)
    one = coder(random(6, 20, seed=1), atoms, 1)
    assert torch.allclose(codes.dense(50) @ atoms, one.dense(50) @ atoms, atol=1e-6)


def test_pursue_is_as_good_as_matching_pursuit_on_learned_atoms():
    target = random(200, 100, seed=1) * torch.logspace(0, -1, 100, dtype=torch.float64)
    atoms = fit(target, 90, 45, sweeps=5).dictionary
    reference = squared_error(target, atoms, omp(target, atoms, 45))
    assert squared_error(target, atoms, pursue(target, atoms, 45)) <= 1.02 * reference  # 1 % of the error


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), nonzeros=st.integers(1, 50), first=st.integers(1, 50))
def test_a_start_never_gets_worse(seed, nonzeros, first):
    target, atoms = random(9, 40, seed=seed), random(50, 40, seed=seed + 1)
    start = largest(random(9, 50, seed=seed + 2), first)
    mask = support(start.dense(50), nonzeros)
    better = pursue(target, atoms, nonzeros, start=start)
    well_formed(better, 50, nonzeros)
    before = (target - (start.dense(50) * mask) @ atoms).square().sum(-1)
    after = (target - better.dense(50) @ atoms).square().sum(-1)
    assert (after <= before * (1 + 1e-9)).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999))
def test_conjugate_gradients_lower_every_rows_objective(seed):
    atoms = random(30, 40, seed=seed)
    gram, goal = atoms @ atoms.mT, random(8, 40, seed=seed + 1) @ atoms.mT
    mask = support(random(8, 30, seed=seed + 2), 11)
    last = torch.full((8,), math.inf, dtype=torch.float64)
    for steps in range(5):
        codes = conjugate_gradients(goal, gram, torch.zeros_like(goal), mask, steps=steps, tolerance=0.0)
        assert ((codes != 0) <= (mask != 0)).all()
        value = (codes * (0.5 * codes @ gram - goal)).sum(-1)
        assert (value <= last + 1e-9).all()
        last = value


def test_ties_and_zeros_keep_exactly_s():
    assert largest(torch.zeros(3, 8), 5).index.shape == (3, 5)
    assert support(torch.ones(3, 8), 5).sum(-1).tolist() == [5.0] * 3


@pytest.mark.parametrize(
    ("target", "atoms", "nonzeros", "words"),
    [
        (random(3, 4), random(5, 4), 0, "nonzeros=0 of atoms=5"),
        (random(3, 4), random(5, 4), 6, "nonzeros=6 of atoms=5"),
        (random(3, 4), random(5, 3), 2, "agree"),
        (random(3, 4), random(2, 5, 4), 2, "as many dimensions"),
        (random(3, 4), random(5, 4).float(), 2, "same dtype"),
        (random(3, 4).half(), random(5, 4).half(), 2, "float32 or float64"),
        (random(3, 4) * math.nan, random(5, 4), 2, "target .* holds 12 NaN"),
        (random(3, 4), random(5, 4) * math.inf, 2, "dictionary .* holds 20 NaN or infinite"),
    ],
)
@pytest.mark.parametrize("coder", CODERS)
def test_bad_input_is_named(coder, target, atoms, nonzeros, words):
    with pytest.raises(ValueError, match=words):
        coder(target, atoms, nonzeros)
