"""Reports for the tests: a plausible one, and every degenerate one that can occur."""

from __future__ import annotations

import math
from typing import Any

from rankfold.report import LayerRow, Report, SkippedRow

SHAPES = {"q_proj": (576, 576), "k_proj": (192, 576), "up_proj": (1536, 576), "down_proj": (576, 1536)}


def row(name: str, shape: tuple[int, int] = (576, 576), rank: int | None = 96, **other: Any) -> LayerRow:
    m, n = shape
    stored = m * n if rank is None else rank * (m + n)
    numbers = [part for part in name.split(".") if part.isdigit()]
    values: dict[str, Any] = {
        "name": name,
        "type": name.rpartition(".")[2],
        "block": int(numbers[0]) if numbers else None,
        "host": "Linear",
        "shape": shape,
        "structure": "dense" if rank is None else "low_rank",
        "size": rank,
        "spec": None if rank is None else {"kind": "low_rank", "shape": [m, n], "rank": rank},
        "bytes_before": 4 * m * n,
        "bytes_after": 4 * stored,
        "params_before": m * n,
        "params_after": stored,
        "macs_before": m * n,
        "macs_after": stored,
        "error": 0.0 if rank is None else 1.5,
        "relative_error": 0.0 if rank is None else 0.1234,
        "loss_share": 0.0 if rank is None else 0.25,
        "note": "stays dense: worth its bytes" if rank is None else "",
        "spectrum": [math.exp(-i / 20) for i in range(128)],
        "full_rank": min(shape),
    }
    return LayerRow(**(values | other))


def make(blocks: int = 2, evaluation: bool = True, **other: Any) -> Report:
    rows = [
        row(f"model.layers.{b}.{'mlp' if 'p_' in kind or 'down' in kind else 'self_attn'}.{kind}", shape, 96)
        for b in range(blocks)
        for kind, shape in SHAPES.items()
    ]
    before, after = sum(r.bytes_before for r in rows), sum(r.bytes_after for r in rows)
    measured = {
        "data": {"spec": "wiki:even:12x512", "windows": 12},
        "dense": {
            "perplexity": 22.9,
            "decode_ms_per_token": 30.0,
            "prefill_ms": 400.0,
            "bytes_on_disk": 10**8,
        },
        "compressed": {
            "perplexity": 31.4,
            "kl": 0.31,
            "decode_ms_per_token": 33.0,
            "prefill_ms": 360.0,
            "bytes_on_disk": 8 * 10**7,
        },
        "generation": {
            "prompt": "The capital",
            "dense": " of France",
            "compressed": " 東京は日本の首都です。 القاهرة",
            "repetition_dense": 0.0,
            "repetition_compressed": 0.1,
        },
        "warnings": ["the sample loops"],
    }
    values: dict[str, Any] = {
        "model": "owner/model",
        "recipe": {"name": "svd_llm", "method": {"kind": "svd"}, "allocate": "lagrangian"},
        "budget": 0.8,
        "reached": 0.7991,
        "layers": rows,
        "skipped": [
            SkippedRow(name="model.embed.weight", shape=(1000, 576), bytes=2304000, reason="embedding")
        ],
        "totals": {
            "selected_before": before,
            "selected_after": after,
            "model_before": before + 2304000,
            "model_after": after + 2304000,
        },
        "allocation": {
            "allocator": "lagrangian",
            "error": 2.0,
            "bound": 1.99,
            "gap": 0.005,
            "cost": 9,
            "budget": 9,
        },
        "timings": {"calibrate": 41.0, "decompose": 9.5},
        "versions": {"rankfold": "0.1.0", "torch": "2.9"},
        "seed": 0,
        "data": {"spec": "wiki:odd", "hash": "abc"},
        "weights_hash": "def",
        "dtype": "float32",
        "warnings": ["little data"],
        "evaluation": measured if evaluation else None,
    }
    return Report(**(values | other))


def degenerate() -> dict[str, Report]:
    broken = make()
    assert broken.evaluation is not None
    broken.evaluation["compressed"] |= {"perplexity": math.nan, "kl": math.inf}
    ragged = make(1)
    ragged.evaluation = {"dense": {"perplexity": 3.0}, "compressed": {"novel_metric": 2.5, "accuracy": None}}
    texts = make(1)
    texts.evaluation = {"generation": {"prompt": "\ud800\x1b[31m", "compressed": "```\n</pre>"}}
    return {
        "bare": Report(recipe={}, budget=0.5, reached=1.0, layers=[]),
        "one layer": make(0, evaluation=False, layers=[row("proj")], totals={}, allocation={}, timings={}),
        "all dense": make(layers=[row(f"layers.{i}.q", rank=None) for i in range(3)]),
        "no evaluation": make(evaluation=False),
        "500 layers": make(125),
        "no blocks": make(layers=[row(f"stage_{i}.conv", (64, 27), 8) for i in range(60)]),
        "experts": make(layers=[row(f"l.{b}.experts.{e}.up") for b in range(3) for e in range(8)]),
        "other sizes": make(
            layers=[row(f"l.{b}.q", size=[64, 8], structure="sparse_code") for b in range(3)]
        ),
        "empty matrix": make(layers=[row(f"l.{b}.q", (0, 4), None, spectrum=[]) for b in range(3)]),
        "odd spectrum": make(layers=[row("q", spectrum=[0.0, 0.0]), row("k", spectrum=[math.nan, 1.0, 0.0])]),
        "larger than before": make(layers=[row(f"l.{b}.q", rank=500) for b in range(3)]),
        "long names": make(layers=[row(f"l.{b}." + "name_" * 80) for b in range(3)], model="m" * 300),
        "broken": broken,
        "ragged": ragged,
        "texts": texts,
    }


CASES = degenerate()
