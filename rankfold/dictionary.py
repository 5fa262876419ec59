"""Dictionary learning: Y ≈ S D with exactly s entries in every row of the codes S, ‖Y − S D‖² small.

`fit` alternates a coding step and a dictionary step. Its solvers: "fast", a hard-thresholding step of all
codes with an over-relaxed least-squares dictionary; "ksvd", pursuit with rank-one updates of atom after atom;
"mod", pursuit with least squares; "compot", an orthonormal dictionary; "rocket", one shot from the
eigenvectors of YᵀY. Each dictionary step is a function of its own.

Shapes: Y (..., rows, in), D (..., atoms, in) with atoms of unit norm, S (..., rows, atoms). Leading
dimensions are independent problems (blocks). Computed in the dtype of Y; eigenvectors and small solves in
float64. [CoSpaDi, ROCKET, COMPOT, DSFormer]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rankfold.dictionary_atoms import eigenvectors, resized, sampled_rows
from rankfold.dictionary_sweeps import State, one_shot, orthonormal_sweep, sweeps_of
from rankfold.pursuit import Codes, largest, pursue, squared_error

SOLVERS = ("fast", "ksvd", "mod", "compot", "rocket")


@dataclass(frozen=True, eq=False)
class Coded:
    """Y ≈ S D.

    dictionary  (..., atoms, in), unit rows
    values      (..., rows, nonzeros)
    index       (..., rows, nonzeros) int64, ascending
    error       ‖Y − S D‖² over all rows and problems (weighted by row_weight)
    history     the same after every sweep, the start first
    """

    dictionary: Tensor
    values: Tensor
    index: Tensor
    error: float
    history: tuple[float, ...]

    @property
    def codes(self) -> Codes:
        return Codes(self.values, self.index)


@torch.no_grad()
def fit(
    target: Tensor,
    atoms: int,
    nonzeros: int,
    solver: str = "fast",
    *,
    sweeps: int = 30,
    power_iterations: int = 8,
    pursuit: str = "fast",
    start: str = "eigen",
    atom_weight: Callable[[Tensor], Tensor] | None = None,
    row_weight: Tensor | None = None,
    tolerance: float = 0.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    warm: Coded | None = None,
) -> Coded:
    """The best iterate of `sweeps` sweeps on Y (..., rows, in), in any number of leading dimensions.

    solver      one of SOLVERS. "rocket" is one shot: it takes no sweeps, no start and no warm
    pursuit     coding step of "ksvd" and "mod": "fast" (`pursue`, from the previous codes) or "omp"
    start       first atoms: "eigen", eigenvectors of YᵀY, or "rows", random rows of Y
    atom_weight rocket: the eigenvectors (..., atoms, in) -> what a unit of code on each is worth (..., atoms)
    row_weight  (..., rows) >= 0: the error is Σ weight · ‖row‖²
    tolerance   stop when a sweep lowers the error by less than this part of it; 0 never stops
    progress    called as (sweeps done, sweeps) before every sweep and at the end
    warm        a result on the same Y with another size to start from, instead of `start`

    Raises ValueError for sizes that do not fit, unknown names, a NaN in Y, and, for "compot" and "rocket",
    more atoms than inputs.
    """
    check_fit(target, atoms, nonzeros, solver, pursuit, start)
    scale = None if row_weight is None else _scale(row_weight, target)
    if scale is not None:
        target = target * scale
        warm = warm and replace(warm, values=warm.values * scale)
    if solver == "rocket":
        best, history = one_shot(target, atoms, nonzeros, atom_weight), []
        history.append(_energy(best.residual))
    else:
        step = sweeps_of(solver, pursuit, power_iterations)
        state = _begin(target, atoms, nonzeros, start, seed, warm)
        if solver == "compot":
            state = orthonormal_sweep(target, state, nonzeros, 0)
        best, history = state, [_energy(state.residual)]
        lowest = history[0]
        for sweep in range(sweeps):
            if progress:
                progress(sweep, sweeps)
            # What a warm start has found is not to be shaken: it goes on where a fit ends.
            state = step(target, state, nonzeros, 1.0 if warm else sweep / max(sweeps - 1, 1))
            history.append(_energy(state.residual))
            if history[-1] < lowest:
                best, lowest = state, history[-1]
            if tolerance and history[-2] - history[-1] < tolerance * history[-2]:
                break
    if progress:
        progress(sweeps, sweeps)
    codes = largest(best.codes, nonzeros)
    if solver == "fast":  # its sweeps solve for the codes only roughly
        codes = pursue(target, best.dictionary, nonzeros, start=codes)
    error = float(squared_error(target, best.dictionary, codes).sum())
    values = codes.values if scale is None else codes.values / scale
    return Coded(best.dictionary, values, codes.index, error, tuple(history))


@torch.no_grad()
def curve(target: Tensor, sizes: Sequence[tuple[int, int]]) -> list[float]:
    """‖Y − S D‖² at every (atoms, nonzeros), for D the leading eigenvectors of YᵀY: where `fit` starts, hence
    an upper bound of what it reaches from there.

    All from one decomposition, Z = Y Uᵀ: error = ‖Y‖² − Σ of the `nonzeros` largest squares of the first
    `atoms` columns of every row; it never rises along nested sizes. Summed over problems. More atoms than
    directions count as all of them.
    """
    _finite(target)
    full = min(target.shape[-2:])
    squares = (target @ eigenvectors(target, full).mT).square()
    total = _energy(target)
    errors = []
    for atoms, nonzeros in sizes:
        if not 1 <= nonzeros <= atoms:
            raise ValueError(
                f"nonzeros={nonzeros} of atoms={atoms} must lie between 1 and the number of atoms"
            )
        part = squares[..., : min(atoms, full)]
        if nonzeros < part.shape[-1]:
            part = part.topk(nonzeros, dim=-1, sorted=False).values
        errors.append(max(total - float(part.sum(dtype=torch.float64)), 0.0))
    return errors


def _begin(target: Tensor, atoms: int, nonzeros: int, start: str, seed: int, warm: Coded | None) -> State:
    full = min(target.shape[-2:])
    if warm is not None:
        dictionary, codes = resized(target, warm.dictionary, warm.codes, atoms)
        found = pursue(target, dictionary, nonzeros, start=largest(codes, nonzeros))
    elif start == "eigen":
        # Atoms beyond the directions of Y begin as rows that nobody uses yet: pursuit among so many coherent
        # atoms would take ten times as long, and end no better.
        dictionary = eigenvectors(target, min(atoms, full))
        found = largest(target @ dictionary.mT, min(nonzeros, full))
        if atoms > full:
            rows = sampled_rows(target, atoms, seed)[..., full:, :]
            dictionary = torch.cat([dictionary, rows], dim=-2)
    else:
        dictionary = sampled_rows(target, atoms, seed)
        found = pursue(target, dictionary, nonzeros)
    codes = found.dense(atoms)
    return State(dictionary, codes, target - codes @ dictionary)


def _scale(row_weight: Tensor, target: Tensor) -> Tensor:
    """√weight as a column. A row of no weight keeps a trace of one, so that it is coded too."""
    if (
        row_weight.shape != target.shape[:-1]
        or not torch.isfinite(row_weight).all()
        or (row_weight < 0).any()
    ):
        raise ValueError(
            f"row_weight {tuple(row_weight.shape)} needs a finite number >= 0 for each of the rows "
            f"{tuple(target.shape[:-1])}"
        )
    weight = row_weight.double()
    top = weight.amax()
    weight = weight.clamp_min(1e-8 * float(top)) if top > 0 else torch.ones_like(weight)
    return weight.sqrt()[..., None].to(target.dtype)


def _energy(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64).square())


def _finite(target: Tensor) -> None:
    if not torch.isfinite(target).all():
        bad = int((~torch.isfinite(target)).sum())
        raise ValueError(f"the target {tuple(target.shape)} holds {bad} NaN or infinite entries")


def check_fit(target: Tensor, atoms: int, nonzeros: int, solver: str, pursuit: str, start: str) -> None:
    """Raise ValueError for what `fit` cannot do."""
    for name, value, known in (
        ("solver", solver, SOLVERS),
        ("pursuit", pursuit, ("fast", "omp")),
        ("start", start, ("eigen", "rows")),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} is none of {', '.join(map(repr, known))}")
    if target.dim() < 2 or target.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the target {tuple(target.shape)} {target.dtype} must be (..., rows, in) in float32 or float64"
        )
    rows, inner = target.shape[-2:]
    if not 1 <= nonzeros <= atoms:
        raise ValueError(f"nonzeros={nonzeros} of atoms={atoms} must lie between 1 and the number of atoms")
    if atoms > rows:
        raise ValueError(
            f"atoms={atoms} of {rows} rows: as many atoms as rows hold the rows themselves; take fewer, or "
            "leave the matrix dense"
        )
    if solver in ("compot", "rocket") and atoms > inner:
        raise ValueError(
            f"solver={solver!r} needs orthogonal atoms, and {atoms} do not fit into {inner} inputs; "
            "take fewer atoms, or solver='fast'"
        )
    _finite(target)
