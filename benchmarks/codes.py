"""Applying codes times a dictionary, against dense and low rank of the same bytes, one layer at a time.

    python benchmarks/codes.py --threads 1 --out codes.json

Layers are random: only bytes and arithmetic matter. For a share of the dense bytes that is kept, the sizes
are CoSpaDi's with two atoms to an entry, the bit mask charged: atoms = keep·out·in / (in + out/2 + out/b), b
the bits of a value, nonzeros = atoms / 2. Beside it, in the same run, in turns, on the same inputs:

    dense       torch, the whole layer; every other time is divided by its own
    same bytes  torch, a dense layer with keep·out outputs: what a product bound by memory could reach
    low rank    torch, two factors of keep·out·in / (out + in) columns

Every way has several copies of its layer, more than a cache holds, as a model's layers are. With one thread
the clock is that thread's own, which stands still while other programs have the processor.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import setting
import torch
from torch import Tensor
from torch.nn.functional import linear

from rankfold.codes import Codes, factored, path_of
from rankfold.packing import pack_support, support_bytes

SHAPES = ((1536, 576), (576, 1536), (4096, 4096), (4096, 11008))
KEEPS = (0.8, 0.6, 0.5)
CACHE = 96 << 20  # bytes that the copies of a layer exceed
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def codes_of(out: int, inner: int, keep: float, dtype: torch.dtype) -> tuple[Tensor, Codes]:
    """A random dictionary (1, atoms, in) and codes of the bytes that `keep` allows."""
    atoms = int(keep * out * inner / (inner + out / 2 + out / (8 * dtype.itemsize)))
    some = torch.rand(64, atoms).argsort(1)[:, : atoms // 2].sort(1).values
    index = some[torch.randint(64, (out,))]  # which places are taken does not change the work
    codes = Codes(
        rows=out,
        blocks=1,
        atoms=atoms,
        nonzeros=atoms // 2,
        packing="mask",
        support=pack_support("mask", index, atoms),
        values=torch.randn(out, atoms // 2, dtype=dtype),
    )
    return torch.randn(1, atoms, inner, dtype=dtype), codes


def ways(
    out: int, inner: int, keep: float, dtype: torch.dtype, copies: int
) -> dict[str, Callable[[Tensor, int], Tensor]]:
    """Each way to apply a layer, as a function of the input and of the copy to take."""

    def random(*shape: int) -> list[Tensor]:
        return [torch.randn(shape, dtype=dtype) for _ in range(copies)]

    whole, same, rank = (
        random(out, inner),
        random(int(keep * out), inner),
        int(keep * out * inner / (out + inner)),
    )
    right, left = random(rank, inner), random(out, rank)
    first, codes = codes_of(out, inner, keep, dtype)
    coded = [(first.clone(), Codes(**_copied(codes))) for _ in range(copies)]
    return {
        "dense": lambda x, i: linear(x, whole[i]),
        "same bytes": lambda x, i: linear(x, same[i]),
        "low rank": lambda x, i: linear(linear(x, right[i]), left[i]),
        "codes": lambda x, i: factored(x, *coded[i]),
    }


def _copied(codes: Codes) -> dict[str, Any]:
    sizes = dict(zip(("rows", "blocks", "atoms", "nonzeros"), codes.layout, strict=True))
    tensors = {"support": codes.support.clone(), "values": codes.values.clone()}
    return {**sizes, **tensors, "packing": codes.packing}


@torch.no_grad()
def measured(out: int, inner: int, keep: float, dtype: torch.dtype, chosen: Any) -> list[dict[str, Any]]:
    """One row of facts for every number of tokens."""
    copies = max(2, CACHE // int(out * inner * dtype.itemsize * keep))
    here, rows = ways(out, inner, keep, dtype, copies), []
    _, codes = codes_of(out, inner, keep, dtype)
    clock = time.thread_time if chosen.threads == 1 else time.perf_counter
    stored = codes.columns * inner * dtype.itemsize + codes.values.numel() * dtype.itemsize
    stored += support_bytes("mask", out, codes.columns, codes.count)
    for tokens in chosen.tokens:
        seconds: dict[str, list[float]] = {name: [] for name in here}
        rounds = max(1, (chosen.repeats if tokens < 64 else min(chosen.repeats, 4)) // copies)
        for turn in range(-1, rounds * copies):  # the first is the warm-up
            x = torch.randn(tokens, inner, dtype=dtype)
            for name, way in here.items():
                start = clock()
                way(x, turn % copies)
                if turn >= 0:
                    seconds[name].append(clock() - start)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        rows.append(
            {
                "shape": [out, inner],
                "keep": keep,
                "kept bytes": stored / (out * inner * dtype.itemsize),
                "dtype": str(dtype).removeprefix("torch."),
                "tokens": tokens,
                "atoms": codes.columns,
                "nonzeros": codes.count,
                "path": path_of(codes, tokens),
                "seconds": medians,
                "ratio": {name: median / medians["dense"] for name, median in medians.items()},
            }
        )
    return rows


def main() -> None:
    chosen = setting.arguments(
        __doc__,
        tokens={"type": int, "nargs": "+", "default": [1, 512], "help": "inputs at once (default 1 and 512)"},
        repeats={
            "type": int,
            "default": 40,
            "help": "timed runs of each way (default 40; 4 from 64 tokens on)",
        },
        dtypes={"nargs": "+", "choices": DTYPES, "default": list(DTYPES), "help": "default: both"},
        shapes={
            "nargs": "+",
            "default": ["x".join(map(str, shape)) for shape in SHAPES],
            "help": "outxin ...",
        },
    )
    torch.manual_seed(0)
    rows = []
    for name in chosen.dtypes:
        for shape in chosen.shapes:
            out, inner = map(int, shape.split("x"))
            for keep in KEEPS:
                rows += measured(out, inner, keep, DTYPES[name], chosen)
                setting.said(f"{name} {shape}", 1, 1)
    headings = [
        "dtype",
        "layer",
        "tokens",
        "keep",
        "dense, ms",
        "same bytes",
        "low rank",
        "codes",
        "codes / low rank",
    ]
    lines = [
        [
            row["dtype"],
            "×".join(map(str, row["shape"])),
            row["tokens"],
            row["keep"],
            1000 * row["seconds"]["dense"],
            *(row["ratio"][name] for name in ("same bytes", "low rank", "codes")),
            row["ratio"]["codes"] / row["ratio"]["low rank"],
        ]
        for row in rows
    ]
    paths = {(row["tokens"], row["dtype"]): row["path"] for row in rows}
    notes = "\n".join(
        f"- {tokens} tokens, {dtype}: {path}" for (tokens, dtype), path in sorted(paths.items())
    )
    table = setting.table(headings, lines)
    text = f"Time over dense time, medians:\n\n{table}\n\nHow codes are applied:\n\n{notes}"
    setting.finish("Codes times a dictionary", {"rows": rows}, text, chosen)


if __name__ == "__main__":
    main()
