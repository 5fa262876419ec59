"""Sparse coding: min over codes S with exactly s entries in every row of ‖Y − S D‖², for a fixed dictionary
D.

`omp` is the reference: orthogonal matching pursuit on the Gram of the atoms, with the inverse Cholesky factor
of every row's support. `pursue` is the default: backward elimination. It starts from the least-squares codes
on all atoms, lets the weakest entries of every row go in a few rounds, and re-solves by conjugate gradients
masked to the support, so that all work is a matrix product over all rows at once.

Shapes: Y (..., rows, in), D (..., atoms, in), values and index (..., rows, s); leading dimensions are
independent problems (blocks). Atoms need not have unit norm. float32 or float64, solved in the dtype of Y.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

MEMORY = 256 * 2**20  # bytes of scratch memory of one batch of rows
FEW = 32  # nonzeros up to which matching pursuit is the cheaper start
COHERENT = 10.0  # mean of [G⁻¹]ᵢᵢ, 1 for orthonormal atoms, above which matching pursuit is the better start
RIDGE = 1e-4  # of the unit diagonal of the atoms' Gram: decides between atoms that depend on each other


class Codes(NamedTuple):
    """Exactly s entries a row: `values` (..., rows, s) at the columns `index` (..., rows, s), int64,
    ascending."""

    values: Tensor
    index: Tensor

    def dense(self, atoms: int) -> Tensor:
        """The codes (..., rows, atoms), zeros included."""
        return self.values.new_zeros(*self.values.shape[:-1], atoms).scatter_(-1, self.index, self.values)


def largest(codes: Tensor, nonzeros: int) -> Codes:
    """The `nonzeros` largest magnitudes of every row of dense codes (..., rows, atoms). Among equals any, but
    always exactly that many."""
    index = codes.abs().topk(nonzeros, dim=-1, sorted=False).indices.sort(dim=-1).values
    return Codes(codes.gather(-1, index), index)


def support(codes: Tensor, nonzeros: int) -> Tensor:
    """Where `largest` looks, as a mask in the dtype of the codes: a product is faster than a selection."""
    size = codes.abs()
    # The k-th value costs half of the k largest; among equals it says too much.
    mask = size >= size.kthvalue(size.shape[-1] - nonzeros + 1, dim=-1, keepdim=True).values
    if int(mask.sum()) != nonzeros * mask[..., 0].numel():
        index = size.topk(nonzeros, dim=-1, sorted=False).indices
        mask = torch.zeros_like(mask).scatter_(-1, index, True)
    return mask.to(codes.dtype)


def squared_error(target: Tensor, dictionary: Tensor, codes: Codes) -> Tensor:
    """‖Y − S D‖² of every problem (...), in float64. Sums over rows in batches, so that S is never dense as a
    whole."""
    total = target.new_zeros(target.shape[:-2], dtype=torch.float64)
    for rows in _batches(target, dictionary.shape[-2] + 2 * target.shape[-1], MEMORY):
        part = Codes(codes.values[..., rows, :], codes.index[..., rows, :]).dense(dictionary.shape[-2])
        total += (target[..., rows, :] - part @ dictionary).square().sum(-1).sum(-1, dtype=torch.float64)
    return total


@torch.no_grad()
def omp(target: Tensor, dictionary: Tensor, nonzeros: int, *, memory: int = MEMORY) -> Codes:
    """Orthogonal matching pursuit of every row, batched over rows.

    With unit atoms U, G = U Uᵀ and b = y Uᵀ, each step takes the atom of the largest |b − c G| among those
    not yet taken and extends F, the inverse Cholesky factor of G on the support, by one row; its last row is
    the direction in which the codes c move. An atom in the span of the support (Schur complement below
    rounding) is taken with a zero coefficient: exactly `nonzeros` different atoms always, also for a zero
    row.

    memory  bytes; F takes nonzeros² numbers a row, so this sets how many rows go together

    Source: Pati et al. 1993; Rubinstein et al. 2008 for the Gram form. Raises ValueError as `check` does.
    """
    check(target, dictionary, nonzeros)
    atoms = dictionary.shape[-2]
    units, norms = unit(dictionary)
    gram = units @ units.mT
    found = []
    for rows in _batches(target, nonzeros**2 + 6 * atoms, memory):
        found.append(_omp(target[..., rows, :] @ units.mT, gram, nonzeros))
    return _joined(found, norms)


def _omp(goal: Tensor, gram: Tensor, nonzeros: int) -> Codes:
    """Codes over unit atoms, from goal = Y Uᵀ (..., rows, atoms) and gram (..., atoms, atoms)."""
    shape, atoms = goal.shape, goal.shape[-1]
    blocks, rows = gram.shape[:-2].numel(), shape[-2]
    goal, gram = goal.reshape(-1, atoms), gram.reshape(-1, atoms, atoms)
    block = torch.arange(blocks, device=goal.device).repeat_interleave(rows)
    row = torch.arange(len(goal), device=goal.device)
    floor = torch.finfo(goal.dtype).eps * atoms
    inverse = goal.new_zeros(len(goal), nonzeros, nonzeros)  # F
    index = torch.zeros(len(goal), nonzeros, dtype=torch.long, device=goal.device)
    values, slope = goal.new_zeros(len(goal), nonzeros), goal.clone()
    taken = torch.zeros_like(goal, dtype=torch.bool)
    for step in range(nonzeros):
        best = slope.abs().masked_fill_(taken, -1.0).argmax(-1)
        taken[row, best] = True
        near = gram[block, best]  # (rows, atoms)
        past = inverse[:, :step, :step]
        along = past @ near.gather(-1, index[:, :step])[..., None]  # F G[support, best]
        schur = near[row, best] - along.square().sum((-2, -1))
        scale = torch.where(schur > floor, schur.clamp_min(floor).rsqrt(), 0.0)
        inverse[:, step, :step] = (along.mT @ past)[:, 0] * -scale[:, None]
        inverse[:, step, step] = scale
        index[:, step] = best
        move = inverse[:, step, : step + 1] * (slope[row, best] * scale)[:, None]
        values[:, : step + 1] += move
        spread = torch.zeros_like(goal).scatter_(-1, index[:, : step + 1], move)
        slope -= (spread.reshape(blocks, rows, atoms) @ gram).reshape(-1, atoms)
    index, order = index.sort(-1)
    size = (*shape[:-1], nonzeros)
    return Codes(values.gather(-1, order).reshape(size), index.reshape(size))


@torch.no_grad()
def pursue(
    target: Tensor,
    dictionary: Tensor,
    nonzeros: int,
    *,
    start: Codes | None = None,
    rounds: int = 2,
    swaps: int = 3,
    memory: int = MEMORY,
) -> Codes:
    """Codes by backward elimination, or by improving `start`; as good as `omp` or better, and an order
    faster on the nearly orthogonal atoms of a learned dictionary.

    Where atoms are COHERENT, and up to FEW nonzeros, the start is `omp` itself. Elimination: from the
    (ridged) least-squares codes on all atoms, `rounds` times keep fewer entries of every row, until
    `nonzeros` are left. What an entry is worth is cᵢ² / [G⁻¹]ᵢᵢ, the error that its removal costs while all
    atoms are in play, and becomes cᵢ² as the support shrinks to nearly orthogonal atoms. Swaps: `swaps` times
    a gradient step, the `nonzeros` largest, and a new solution on them (hard-thresholding pursuit); a row
    whose error does not fall keeps its codes. With `start` (of any number of nonzeros) only the swaps are
    done, and no row ends worse than its start, cut to the `nonzeros` largest and solved.

    memory  bytes of scratch: sets how many rows go together; the result does not depend on it but for
    rounding

    Raises ValueError as `check` does.
    """
    check(target, dictionary, nonzeros)
    units, norms = unit(dictionary)
    gram = units @ units.mT
    plan, greedy = None, torch.ones(gram.shape[:-2], dtype=torch.bool, device=gram.device)
    if start is None:
        if nonzeros > FEW:
            plan, greedy = _elimination(units, nonzeros, rounds)
        if greedy.any():
            start = omp(target, dictionary, nonzeros, memory=memory)
    found = []
    for rows in _batches(target, 9 * units.shape[-2] + 2 * units.shape[-1], memory):
        part = target[..., rows, :]
        goal = part @ units.mT
        codes = mask = torch.zeros_like(goal)
        if start is not None:
            codes = Codes(start.values[..., rows, :], start.index[..., rows, :]).dense(units.shape[-2])
            codes *= norms[..., None, :]
            mask = support(codes, nonzeros)
            codes = conjugate_gradients(goal, gram, codes * mask, mask)
        if plan is not None and not greedy.all():
            weeded = _eliminate(goal, gram, *plan)
            codes, mask = (
                torch.where(greedy[..., None, None], one, other)
                for one, other in zip((codes, mask), weeded, strict=True)
            )
        for _ in range(swaps):
            codes, mask = _swap(goal, gram, codes, mask, nonzeros)
        # Once more from the residual itself: goal − codes gram has lost the digits that a small error needs.
        rest = (part - codes @ units) @ units.mT
        codes = codes + conjugate_gradients(rest, gram, torch.zeros_like(codes), mask, tolerance=1e-3)
        index = mask.topk(nonzeros, dim=-1, sorted=False).indices.sort(dim=-1).values
        found.append(Codes(codes.gather(-1, index), index))
    return _joined(found, norms)


def conjugate_gradients(
    goal: Tensor, gram: Tensor, codes: Tensor, mask: Tensor, *, steps: int = 10, tolerance: float = 0.1
) -> Tensor:
    """Codes closer to min ½ c G cᵀ − goal cᵀ of every row over the entries of `mask` (0 or 1), from `codes`,
    which are zero elsewhere. Every step lowers every row's objective. A row rests once its gradient has
    shrunk by `tolerance`; all stop after `steps`."""
    slope = (goal - codes @ gram) * mask
    size = slope.square().sum(-1, keepdim=True)
    enough, direction, tiny = size * tolerance**2, slope, torch.finfo(goal.dtype).tiny
    floor = torch.finfo(goal.dtype).eps * goal.shape[-1]
    for _ in range(steps):
        moving = size > enough
        if not moving.any():
            break
        image = (direction @ gram) * mask
        curvature = (direction * image).sum(-1, keepdim=True)
        # Where atoms depend on each other, a direction of no curvature is rounding.
        length = torch.where(moving & (curvature > floor * size), size / curvature, 0.0)
        codes = codes + length * direction
        slope = slope - length * image
        size, before = slope.square().sum(-1, keepdim=True), size
        direction = slope + (size / before.clamp_min(tiny)) * direction
    return codes


Plan = tuple[Tensor, list[tuple[int, Tensor]]]


def _elimination(units: Tensor, nonzeros: int, rounds: int) -> tuple[Plan, Tensor]:
    """The inverse of the ridged Gram with, for every round, how many entries stay and the weight (..., 1,
    atoms) of a code's magnitude; and which problems (...) are too coherent for it. In float64 on the way: a
    Gram rounded to float32 may not be positive."""
    atoms = units.shape[-2]
    ridged = units.double() @ units.double().mT
    ridged.diagonal(dim1=-2, dim2=-1).add_(RIDGE)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ridged))
    spread = inverse.diagonal(dim1=-2, dim2=-1)
    steps = []
    for done in range(1, rounds + 1):
        part = done / rounds
        weight = (spread ** (-(1 - part) / 2)).to(units.dtype)[..., None, :]
        steps.append((round(atoms + (nonzeros - atoms) * part), weight))
    return (inverse.to(units.dtype), steps), spread.mean(-1) > COHERENT


def _eliminate(
    goal: Tensor, gram: Tensor, inverse: Tensor, steps: list[tuple[int, Tensor]]
) -> tuple[Tensor, Tensor]:
    codes = goal @ inverse
    mask = torch.ones_like(codes)
    for count, weight in steps:
        mask = support(codes * weight * mask, count)
        codes = conjugate_gradients(goal, gram, codes * mask, mask)
    return codes, mask


def _swap(goal: Tensor, gram: Tensor, codes: Tensor, mask: Tensor, nonzeros: int) -> tuple[Tensor, Tensor]:
    slope = goal - codes @ gram
    step = codes + slope
    new = support(step, nonzeros)
    moved = conjugate_gradients(goal, gram, step * new, new)
    gain = (moved * (2 * goal - moved @ gram)).sum(-1) - (codes * (goal + slope)).sum(-1)
    better = (gain > 0)[..., None]
    return torch.where(better, moved, codes), torch.where(better, new, mask)


def unit(dictionary: Tensor) -> tuple[Tensor, Tensor]:
    """The atoms at unit length and their norms (..., atoms); a zero atom stays zero, with norm 1."""
    norms = dictionary.norm(dim=-1)
    norms = torch.where(norms > 0, norms, 1.0)
    return dictionary / norms[..., None], norms


def check(target: Tensor, dictionary: Tensor, nonzeros: int) -> None:
    """Raise ValueError unless 1 <= nonzeros <= atoms, the shapes fit, and everything is finite."""
    if target.dim() < 2 or dictionary.dim() != target.dim() or target.dtype != dictionary.dtype:
        raise ValueError(
            f"target {tuple(target.shape)} {target.dtype} and dictionary {tuple(dictionary.shape)} "
            f"{dictionary.dtype} need the same dtype and as many dimensions, two at least"
        )
    if target.shape[:-2] != dictionary.shape[:-2] or target.shape[-1] != dictionary.shape[-1]:
        raise ValueError(
            f"target {tuple(target.shape)} and dictionary {tuple(dictionary.shape)} must agree in all "
            "dimensions but the last but one"
        )
    if target.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"sparse coding works in float32 or float64, not {target.dtype}: cast the target")
    if not 1 <= nonzeros <= dictionary.shape[-2]:
        raise ValueError(
            f"nonzeros={nonzeros} of atoms={dictionary.shape[-2]} must lie between 1 and the number of atoms"
        )
    for name, tensor in (("target", target), ("dictionary", dictionary)):
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(f"the {name} {tuple(tensor.shape)} holds {bad} NaN or infinite entries")


def _batches(target: Tensor, numbers: int, memory: int) -> Iterator[slice]:
    """Slices of the rows such that `numbers` numbers for each row of every problem fit in `memory` bytes."""
    rows, problems = target.shape[-2], target.shape[:-2].numel()
    size = max(1, int(memory // (target.element_size() * numbers * max(problems, 1))))
    for first in range(0, rows, size):
        yield slice(first, first + size)


def _joined(parts: list[Codes], norms: Tensor) -> Codes:
    """One Codes of the batches, over the atoms as they were given."""
    values, index = (torch.cat(tensors, dim=-2) for tensors in zip(*parts, strict=True))
    scale = norms[..., None, :].expand(*index.shape[:-1], norms.shape[-1]).gather(-1, index)
    return Codes(values / scale, index)
