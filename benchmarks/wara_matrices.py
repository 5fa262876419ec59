"""How well adapters of one parameter count can represent an update: low rank against bands of a wavelet.

    python benchmarks/wara_matrices.py --out runs/wara_matrices.json

Best approximations in the Frobenius norm, no training: LoRA of rank 8 by truncated SVD, bands of rank 4 each,
and the same count of parameters given to the bands by energy. Relative errors ‖ΔW − W′‖ / ‖ΔW‖ of 128 x 128
targets, mean and standard deviation over seeds. The columns by energy are
told the target, which an adapter at its start is not: they bound what choosing ranks can do.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rankfold.wavelet_bands import count, energies, energy_ranks, equal_ranks, nearest
from rankfold.wavelet_transform import filters

SIDE, RANK = 128, 8


def exact_rank(random: torch.Generator) -> Tensor:
    return _normal(random, SIDE, 8) @ _normal(random, 8, SIDE)


def white_noise(random: torch.Generator) -> Tensor:
    return _normal(random, SIDE, SIDE)


def smooth_field(random: torch.Generator) -> Tensor:
    """Noise under a Gaussian filter with a standard deviation of two entries, around the edges."""
    steps = torch.fft.fftfreq(SIDE, dtype=torch.float64)
    gain = torch.exp(-2 * (torch.pi * 2.0 * steps).square())
    return torch.fft.ifft2(torch.fft.fft2(_normal(random, SIDE, SIDE)) * gain[:, None] * gain).real


def sparse_blocks(random: torch.Generator) -> Tensor:
    """Eight constant blocks of 4 to 24 entries a side anywhere, and noise of 3 % of their norm."""
    field = torch.zeros(SIDE, SIDE, dtype=torch.float64)
    for _ in range(8):
        tall, wide = (int(torch.randint(4, 25, (), generator=random)) for _ in range(2))
        top, left = (int(torch.randint(SIDE - n + 1, (), generator=random)) for n in (tall, wide))
        field[top : top + tall, left : left + wide] += torch.randn((), generator=random, dtype=torch.float64)
    noise = _normal(random, SIDE, SIDE)
    return field + noise * (0.03 * field.norm() / noise.norm())


def repeated(random: torch.Generator) -> Tensor:
    """M ⊗ I₂ with rank(M) = 4: what one shared pair of Haar bands makes."""
    half = _normal(random, SIDE // 2, 4) @ _normal(random, 4, SIDE // 2)
    return torch.kron(half, torch.eye(2, dtype=torch.float64))


TARGETS: dict[str, Callable[[torch.Generator], Tensor]] = {
    "exact rank 8": exact_rank,
    "white noise": white_noise,
    "smooth random field": smooth_field,
    "sparse blocks": sparse_blocks,
    "M ⊗ I₂, rank(M) = 4": repeated,
}


def low_rank(target: Tensor) -> float:
    return float(torch.linalg.svdvals(target)[RANK:].norm() / target.norm())


def bands(target: Tensor, wavelet: str, levels: int, by_energy: bool) -> float:
    taps, budget = filters(wavelet), RANK * 2 * SIDE
    ranks = equal_ranks(RANK // 2, 1)
    if by_energy:
        ranks = energy_ranks(energies(target, taps, levels), (SIDE, SIDE), budget)
    assert count(ranks, (SIDE, SIDE)) <= budget
    found = nearest(target, ranks, taps, levels).to_dense().detach()
    return float((found - target).norm() / target.norm())


COLUMNS: dict[str, Callable[[Tensor], float]] = {
    "LoRA, rank 8": low_rank,
    "equal, rank 4 a band": lambda target: bands(target, "db1", 1, False),
    "energy": lambda target: bands(target, "db1", 1, True),
    "energy, db2": lambda target: bands(target, "db2", 1, True),
    "energy, two levels": lambda target: bands(target, "db1", 2, True),
}


def run(seeds: int) -> dict[str, dict[str, list[float]]]:
    table: dict[str, dict[str, list[float]]] = {}
    for name, make in TARGETS.items():
        table[name] = {column: [] for column in COLUMNS}
        for seed in range(seeds):
            target = make(torch.Generator().manual_seed(seed))
            for column, measure in COLUMNS.items():
                table[name][column].append(measure(target))
    return table


def markdown(table: dict[str, dict[str, list[float]]]) -> str:
    lines = [f"| target | {' | '.join(COLUMNS)} |", "| --- |" + " ---: |" * len(COLUMNS)]
    for name, row in table.items():
        cells = (f"{statistics.fmean(v):.3f} ± {statistics.stdev(v):.3f}" for v in row.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="targets of each kind, at least 2")
    parser.add_argument("--out", type=Path, help="write every number as JSON")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds {options.seeds}: a standard deviation needs at least 2")
    table = run(options.seeds)
    print(markdown(table))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(table, indent=1), encoding="utf-8")


def _normal(random: torch.Generator, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=random, dtype=torch.float64)


if __name__ == "__main__":
    main()
