"""Sparse coding of real whitened matrices: the fast pursuit against matching pursuit, and every solver.

The matrices are SmolLM2's weights, Y = W C^½ with the Gram C = E[x xᵀ] of their inputs, at the (atoms,
nonzeros) that keep a fraction of the bytes: 16 bits a number and one mask bit a code, atoms = 2 · nonzeros.
In one run, medians of the time, errors ‖Y − S D‖ / ‖Y‖:

    pursuit   rankfold.pursuit.omp (batched Cholesky OMP on the Gram of the atoms) and pursue, interleaved,
    for
              the dictionary that three sweeps of K-SVD leave, and for random rows of Y
    solvers   rankfold.dictionary.fit from eigenvectors; "low rank" is the optimum at the same bytes
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import setting
import torch
from decompose import TYPES, grams
from torch import Tensor

from rankfold.dictionary import Coded, fit
from rankfold.dictionary_atoms import sampled_rows
from rankfold.metric import Metric
from rankfold.pursuit import Codes, omp, pursue, squared_error

SOLVERS: dict[str, dict[str, Any]] = {
    "rocket": {"solver": "rocket"},
    "compot 20": {"solver": "compot", "sweeps": 20},
    "fast 10": {"solver": "fast", "sweeps": 10},
    "fast 30": {"solver": "fast", "sweeps": 30},
    "fast 60": {"solver": "fast", "sweeps": 60},
    "mod 10": {"solver": "mod", "sweeps": 10},
    "ksvd 10": {"solver": "ksvd", "sweeps": 10},
    "ksvd 10, omp": {"solver": "ksvd", "sweeps": 10, "pursuit": "omp"},
}


def size(shape: tuple[int, int], keep: float) -> tuple[int, int]:
    """(atoms, nonzeros) of `keep` of the bytes in 16-bit numbers, mask included, with two atoms a nonzero."""
    out, inner = shape
    atoms = math.floor(keep * out * inner / (inner + out / 2 + out / 16))
    return atoms, atoms // 2


def timed(runs: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds and the result of each, one after the other, `repeats` times."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    results = {}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            results[name] = run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}, results


def coding(target: Tensor, dictionary: Tensor, nonzeros: int, repeats: int) -> dict[str, Any]:
    """{"seconds" | "error": {"omp" | "pursue": ...}} for a dictionary that stays."""
    norm = float(target.double().norm())

    def relative(codes: Codes) -> float:
        return math.sqrt(float(squared_error(target, dictionary, codes))) / norm

    seconds, codes = timed(
        {
            "omp": lambda: omp(target, dictionary, nonzeros),
            "pursue": lambda: pursue(target, dictionary, nonzeros),
        },
        repeats,
    )
    return {"seconds": seconds, "error": {name: relative(found) for name, found in codes.items()}}


def solved(target: Tensor, atoms: int, nonzeros: int, names: list[str]) -> dict[str, Any]:
    """{"seconds" | "error": {solver: ...}}, each run once."""
    norm = float(target.double().norm())
    runs = {name: lambda name=name: fit(target, atoms, nonzeros, **SOLVERS[name]) for name in names}
    seconds, found = timed(runs, 1)
    coded: dict[str, Coded] = found
    return {
        "seconds": seconds,
        "error": {name: math.sqrt(result.error) / norm for name, result in coded.items()},
    }


def measured(weight: Tensor, gram: Tensor, keep: float, repeats: int, solvers: list[str]) -> dict[str, Any]:
    out, inner = weight.shape
    target = Metric(right=gram).whiten(weight).float()
    atoms, nonzeros = size((out, inner), keep)
    tail = torch.linalg.svdvals(target.double()).square()
    rank = math.floor(keep * out * inner / (out + inner))
    trained = fit(target, atoms, nonzeros, solver="ksvd", sweeps=3).dictionary
    return {
        "shape": [out, inner],
        "size": [atoms, nonzeros],
        "rank": rank,
        "low rank": math.sqrt(float(tail[rank:].sum() / tail.sum())),
        "trained": coding(target, trained, nonzeros, repeats),
        "rows": coding(target, sampled_rows(target, atoms, 0), nonzeros, repeats),
        "solvers": solved(target, atoms, nonzeros, solvers),
    }


def pursuit_row(name: str, results: list[dict[str, Any]]) -> list[Any]:
    """Seconds of both, how much faster the pursuit is (by summed times), and the worst ratio of the
    errors."""
    cells: list[Any] = [name]
    for kind in ("trained", "rows"):
        sums = [sum(r[kind]["seconds"][way] for r in results) for way in ("omp", "pursue")]
        worst = max(r[kind]["error"]["pursue"] / r[kind]["error"]["omp"] for r in results)
        cells += [f"{sums[0]:.2f}", f"{sums[1]:.2f}", f"{sums[0] / sums[1]:.1f}×", f"{worst:.4f}"]
    return cells


def solver_row(name: str, results: list[dict[str, Any]], solvers: list[str]) -> list[Any]:
    """Mean relative error and mean seconds."""
    cells: list[Any] = [name, f"{statistics.mean(r['low rank'] for r in results):.4f}"]
    for solver in solvers:
        error, seconds = (
            statistics.mean(r["solvers"][what][solver] for r in results) for what in ("error", "seconds")
        )
        cells.append(f"{error:.4f}, {seconds:.2f} s")
    return cells


def main() -> None:
    chosen = setting.arguments(
        __doc__,
        blocks={"type": int, "nargs": "+", "default": [10], "help": "blocks of the model (default 10)"},
        types={
            "nargs": "+",
            "choices": TYPES,
            "default": ["k_proj", "o_proj", "gate_proj", "down_proj"],
            "help": "which linears of a block",
        },
        solvers={"nargs": "+", "choices": list(SOLVERS), "default": list(SOLVERS), "help": "which solvers"},
        keep={"type": float, "default": 0.8, "help": "fraction of the bytes kept (default 0.8)"},
        repeats={"type": int, "default": 3, "help": "timed runs of each pursuit (default 3)"},
        metrics={"type": Path, "help": "read the Grams from this file (of quality.py or allocate.py)"},
    )
    opened = setting.open_smollm2()
    results: dict[str, dict[str, Any]] = {}
    for name, (weight, gram) in grams(opened, chosen.blocks, chosen.sequences, chosen.metrics).items():
        if name.endswith(tuple(chosen.types)):
            results[name] = measured(weight, gram, chosen.keep, chosen.repeats, chosen.solvers)
            setting.said(name, len(results), len(chosen.blocks) * len(chosen.types))
    pursuits, solvers = [], []
    for kind in (kind for kind in TYPES if kind in chosen.types):
        members = [result for name, result in results.items() if name.endswith(kind)]
        shape, (atoms, nonzeros) = "×".join(map(str, members[0]["shape"])), members[0]["size"]
        pursuits.append(pursuit_row(f"{kind} {shape}, {atoms}, {nonzeros}", members))
        solvers.append(solver_row(f"{kind} {shape}", members, chosen.solvers))
    pursuits.append(pursuit_row("**all**", list(results.values())))
    solvers.append(solver_row("**mean**", list(results.values()), chosen.solvers))
    columns = ["omp s", "pursue s", "faster", "error / omp's"]
    headings = ["matrix, atoms, nonzeros", *columns, *(f"rows: {column}" for column in columns)]
    text = (
        "Coding alone, trained dictionary and random rows:\n\n"
        + setting.table(headings, pursuits)
        + f"\n\nRelative error and seconds at {chosen.keep} of the bytes:\n\n"
        + setting.table(["matrix", "low rank", *chosen.solvers], solvers)
    )
    facts = {"keep": chosen.keep, "blocks": chosen.blocks, "repeats": chosen.repeats, "results": results}
    setting.finish("Sparse coding", facts, text, chosen)


if __name__ == "__main__":
    main()
