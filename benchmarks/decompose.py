"""Truncating real whitened matrices: rankfold's way against gesdd and against the randomized SVD.

The matrices are SmolLM2's weights with the Grams C = E[x xᵀ] of their inputs, at the rank of 0.8 of the
bytes. In one run, interleaved, medians of the time, and the excess error:

    ours            rankfold.methods.svd.truncate(W, Metric(right=C), rank), float64
    gesdd           Cholesky C = L Lᵀ, torch.linalg.svd(W L) in float32, triangular solve for L⁻¹  [SVD-LLM]
    root + gesdd    the same with C^½ and its pseudo-inverse, which exist where Cholesky fails  [SVD-LLM V2]
    svd_lowrank n   Cholesky, torch.svd_lowrank(W L, q=rank, niter=n) in float32, triangular solve

*Alone* leaves out whitening and unwhitening: all start from W L. *Excess* is the squared error above the
optimum, relative to it; the optimum is the tail of the float64 singular values.
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
from torch import Tensor

from rankfold import recipes
from rankfold.factorize import calibrate
from rankfold.layers import select
from rankfold.loading import Opened
from rankfold.methods.svd import ridged, truncate
from rankfold.metric import Metric, root

Factors = tuple[Tensor, Tensor]
TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WHOLE = ("ours", "gesdd", "root + gesdd", "svd_lowrank 2", "svd_lowrank 4")
ALONE = ("ours", "gesdd", "svd_lowrank 2", "svd_lowrank 4")


def whole(weight: Tensor, gram: Tensor, rank: int) -> dict[str, Callable[[], Factors]]:
    """Each way from weight (out, in) float32 and Gram (in, in) float64 to factors (out, rank), (rank, in)."""
    metric = Metric(right=gram)

    def whitened(decompose: Callable[[Tensor], Factors]) -> Factors:
        side = torch.linalg.cholesky(gram)
        left, right = decompose((weight.double() @ side).float())
        return left, torch.linalg.solve_triangular(side, right.double(), upper=False, left=False)

    def rooted() -> Factors:
        side = root(gram)
        left, right = gesdd((weight.double() @ side).float(), rank)
        return left, metric.unwhiten_right(right)

    return {
        "ours": lambda: truncate(weight.double(), metric, rank),
        "gesdd": lambda: whitened(lambda m: gesdd(m, rank)),
        "root + gesdd": rooted,
        "svd_lowrank 2": lambda: whitened(lambda m: lowrank(m, rank, 2)),
        "svd_lowrank 4": lambda: whitened(lambda m: lowrank(m, rank, 4)),
    }


def alone(matrix: Tensor, rank: int) -> dict[str, Callable[[], Factors]]:
    """Each way from a whitened matrix in float64 to its factors."""
    single = matrix.float()
    return {
        "ours": lambda: truncate(matrix, Metric(), rank),
        "gesdd": lambda: gesdd(single, rank),
        "svd_lowrank 2": lambda: lowrank(single, rank, 2),
        "svd_lowrank 4": lambda: lowrank(single, rank, 4),
    }


def gesdd(matrix: Tensor, rank: int) -> Factors:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


def lowrank(matrix: Tensor, rank: int, niter: int) -> Factors:
    u, s, v = torch.svd_lowrank(matrix, q=rank, niter=niter)
    return u * s, v.mT


def measured(weight: Tensor, gram: Tensor, rank: int, repeats: int) -> dict[str, Any]:
    """{"whole" | "alone": {way: (median seconds, excess)}} of one matrix."""
    gram = ridged(gram)
    assert gram is not None
    matrix = weight.double() @ torch.linalg.cholesky(gram)
    optimum = float(torch.linalg.svdvals(matrix)[rank:].square().sum())
    metric, result = Metric(right=gram), {}
    errors = {
        "whole": lambda left, right: metric.error(weight.double() - left.double() @ right.double()),
        "alone": lambda left, right: float((matrix - left.double() @ right.double()).square().sum()),
    }
    for scope, ways in (("whole", whole(weight, gram, rank)), ("alone", alone(matrix, rank))):
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        excess = {name: errors[scope](*way()) / optimum - 1 for name, way in ways.items()}  # also the warm-up
        for _ in range(repeats):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - start)
        result[scope] = {name: (statistics.median(seconds[name]), excess[name]) for name in ways}
    return result


def grams(
    opened: Opened, blocks: list[int], sequences: int, cache: Path | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """{layer: (weight, Gram)} of the blocks asked for."""
    layers = select(opened.model, [f"*layers.{block}.*" for block in blocks])
    windows = setting.calibration(opened, sequences)
    if cache is not None and cache.exists():
        metrics = setting.statistics(opened, windows, cache)
    else:
        metrics = calibrate(opened.model, recipes.svd_llm, layers, windows.input_ids, progress=setting.said)
    found = {name: metrics[name].right for name in layers}
    return {name: (layers[name].matrix(), gram) for name, gram in found.items() if gram is not None}


def row(name: str, results: list[dict[str, Any]], scope: str, ways: tuple[str, ...]) -> list[Any]:
    """One line: gesdd's time over each way's time, by summed medians, and the worst excess."""
    total = {way: sum(result[scope][way][0] for result in results) for way in ways}
    cells: list[Any] = [name]
    for way in ways:
        worst = max(result[scope][way][1] for result in results)
        excess = f"{worst:.0e}" if worst > 1e-9 else "< 1e-9"  # below that the subtraction rounds
        cells.append(f"{total['gesdd'] / total[way]:.2f}×, {excess}")
    return cells


def main() -> None:
    chosen = setting.arguments(
        __doc__,
        blocks={"type": int, "nargs": "+", "default": [0, 10, 20, 29], "help": "blocks of the model to take"},
        repeats={"type": int, "default": 5, "help": "timed runs of each way (default 5)"},
        metrics={
            "type": Path,
            "help": "read the Grams from this file (written by quality.py or allocate.py)",
        },
    )
    opened = setting.open_smollm2()
    results: dict[str, dict[str, Any]] = {}
    for name, (weight, gram) in grams(opened, chosen.blocks, chosen.sequences, chosen.metrics).items():
        out, inner = weight.shape
        rank = math.floor(0.8 * out * inner / (out + inner))
        results[name] = {"shape": [out, inner], "rank": rank, **measured(weight, gram, rank, chosen.repeats)}
    parts = []
    for scope, ways, what in (
        ("whole", WHOLE, "Whitening, decomposition, unwhitening"),
        ("alone", ALONE, "Decomposition of the whitened matrix alone"),
    ):
        rows = []
        for kind in TYPES:
            members = [result for name, result in results.items() if name.endswith(kind)]
            shape = "×".join(map(str, members[0]["shape"]))
            rows.append(row(f"{kind} {shape}, rank {members[0]['rank']}", members, scope, ways))
        rows.append(row("**all**", list(results.values()), scope, ways))
        parts.append(
            f"{what} (speed relative to gesdd, worst excess):\n\n" + setting.table(["matrix", *ways], rows)
        )
    facts = {
        "blocks": chosen.blocks,
        "repeats": chosen.repeats,
        "sequences": chosen.sequences,
        "results": results,
    }
    setting.finish("Decomposition", facts, "\n\n".join(parts), chosen)


if __name__ == "__main__":
    main()
