"""Sweeps of dictionary learning: codes and dictionary, each once.

A sweep maps a `State` of Y (unit atoms D, dense codes S with zeros off the support, residual E = Y − S D) to
the next. It is told which part of all sweeps is done, 0 at the first and 1 at the last.

Shapes: Y, E (..., rows, in), D (..., atoms, in), S (..., rows, atoms).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rankfold.dictionary_atoms import eigenvectors, ksvd_, mod, procrustes, reseeded
from rankfold.pursuit import FEW, conjugate_gradients, largest, omp, pursue, support, unit

# Over the sweeps of "fast", found on whitened weights (docs/sparse_coding.md):
RELAXATION = (1.0, 1.8)  # of the least-squares step; anything below 2 lowers the error
BOLDNESS = (3.0, 1.75)  # weight of an entry outside the support against those within


class State(NamedTuple):
    """What a sweep works on: unit atoms, dense codes with zeros off the support, residual Y − S D."""

    dictionary: Tensor
    codes: Tensor
    residual: Tensor


def sweeps_of(
    solver: str, pursuit: str, power_iterations: int
) -> Callable[[Tensor, State, int, float], State]:
    """The sweep of a solver: (Y, state, nonzeros, part done) -> state."""
    if solver == "fast":
        return fast_sweep
    if solver == "compot":
        return orthonormal_sweep

    def sweep(target: Tensor, state: State, nonzeros: int, part: float) -> State:
        """Pursuit (not in the first sweep, whose start is coded already), then the dictionary."""
        dictionary, codes, residual = state
        if part > 0:
            if pursuit == "omp":
                found = omp(target, dictionary, nonzeros)
            else:
                before = None if nonzeros <= FEW else largest(codes, nonzeros)
                found = pursue(target, dictionary, nonzeros, start=before)
            codes = found.dense(dictionary.shape[-2])
            residual = target - codes @ dictionary
        if solver == "mod":
            return settled(target, mod(dictionary, codes, residual), codes)
        dictionary, codes, residual = (tensor.clone() for tensor in (dictionary, codes, residual))
        ksvd_(dictionary, codes, residual, power_iterations)
        return State(dictionary, codes, residual)

    return sweep


def fast_sweep(target: Tensor, state: State, nonzeros: int, part: float = 1.0) -> State:
    """Over-relaxed least-squares dictionary; then the codes.

    With C the codes and g = E Dᵀ, the new support of a row is the `nonzeros` largest of |C + boldness · g|: C
    lives on the old support and g, near a solution, outside of it. Boldness above 1 moves supports that a
    plain gradient step would keep, which the next dictionary pays back; it falls with the `part` of the
    sweeps that is done. On the support a gradient step and two conjugate-gradient steps. With few nonzeros
    matching pursuit is as fast, and finds new supports every time.
    """
    relaxation, boldness = (first + (last - first) * part for first, last in (RELAXATION, BOLDNESS))
    dictionary, codes, residual = settled(target, mod(*state, relaxation=relaxation), state.codes)
    if nonzeros <= FEW:
        codes = omp(target, dictionary, nonzeros).dense(dictionary.shape[-2])
    else:
        slope = residual @ dictionary.mT
        mask = support(codes + boldness * slope, nonzeros)
        moved = (codes + slope) * mask
        gram = dictionary @ dictionary.mT
        rest = slope - (moved - codes) @ gram
        still = torch.zeros_like(codes)
        codes = moved + conjugate_gradients(rest * mask, gram, still, mask, steps=2, tolerance=0.0)
    return State(dictionary, codes, target - codes @ dictionary)


def orthonormal_sweep(target: Tensor, state: State, nonzeros: int, part: float = 1.0) -> State:
    """COMPOT: the orthonormal dictionary that fits the codes best, then the exact codes, the largest entries
    of Y Dᵀ. Never raises the error."""
    dictionary = procrustes(target, state.codes)
    codes = target @ dictionary.mT
    codes = codes * support(codes, nonzeros)
    return State(dictionary, codes, target - codes @ dictionary)


def one_shot(
    target: Tensor, atoms: int, nonzeros: int, atom_weight: Callable[[Tensor], Tensor] | None = None
) -> State:
    """ROCKET: codes Z = Y Uᵀ on the leading eigenvectors, the `nonzeros` largest |z| · weight of every row,
    then the least-squares dictionary."""
    vectors = eigenvectors(target, atoms)
    codes = target @ vectors.mT
    worth = codes if atom_weight is None else codes * atom_weight(vectors).to(codes)[..., None, :]
    codes = codes * support(worth, nonzeros)
    dictionary = mod(vectors, codes, target - codes @ vectors)
    return settled(target, dictionary, codes)


def settled(target: Tensor, dictionary: Tensor, codes: Tensor) -> State:
    """Unit atoms, their norms in the codes; atoms that nobody uses become the worst-coded rows."""
    dictionary, norms = unit(dictionary)
    codes = codes * norms[..., None, :]
    residual = target - codes @ dictionary
    return State(reseeded(dictionary, codes, residual), codes, residual)
