"""TRP against plain SVD on Fashion-MNIST: what does the final decomposition into small convolutions cost?

For every seed one network is trained normally (`base`) and one by `Truncate` for every e, from the same
initial weights and the same order of batches. Then, at the very same ranks,

    TRP        finish_ of the network that was trained with truncations
    plain SVD  the base network, its layers truncated to TRP's ranks
    own ranks  the base network, truncated by its own energies to at most TRP's multiply-adds

each with batch norm recalibrated on the same training images, without any fine-tuning. Speed-up is that of
the multiply-adds of all convolutions and the last layer, counted on the modules as they run. `--pilot`
measures on the validation split instead of the test set: what options were chosen by. `--keep FILE` goes on
from the rows there, `--table` prints them.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fashion
import setting
import torch
from torch import Tensor, nn

from rankfold.batch_norm import recalibrate_
from rankfold.footprint import macs_per_token
from rankfold.hosts import hosts
from rankfold.layers import Layer, replace_
from rankfold.methods import SVD
from rankfold.metric import Metric
from rankfold.truncate import Truncate
from rankfold.truncate_layers import kept

Data = tuple[Tensor, Tensor]
WAYS = ("TRP", "plain SVD", "own ranks")


def decomposed(base: nn.Module, ranks: Mapping[str, int], spatial: bool) -> nn.Module:
    """A copy of `base` whose named layers are replaced by their best approximation at these ranks."""
    model = copy.deepcopy(base)
    for name, rank in ranks.items():
        layer = Layer(model.get_submodule(name), spatial)
        replace_(model, name, layer.wrap(SVD().fit(layer.matrix(), Metric(), rank)))
    return model


def own_ranks(base: nn.Module, names: list[str], spatial: bool, limit: int, example: Tensor) -> nn.Module:
    """`base` at the ranks that keep one share of energy in every layer, the largest share within `limit`
    multiply-adds."""
    spectra = {n: torch.linalg.svdvals(Layer(base.get_submodule(n), spatial).matrix()) for n in names}
    low, high, best = 0.0, 1.0, {name: 1 for name in names}
    for _ in range(12):
        e = (low + high) / 2
        ranks = {name: kept(sigma, e) for name, sigma in spectra.items()}
        if macs_per_token(decomposed(base, ranks, spatial), example) <= limit:
            high, best = e, ranks
        else:
            low = e
    return decomposed(base, best, spatial)


def measured(model: nn.Module, images: Sequence[Tensor], test: Data) -> tuple[float, float]:
    """Accuracy (percent) as the model is, and with batch norm recalibrated."""
    before = fashion.accuracy(model, *test)
    recalibrate_(model, images)
    return before, fashion.accuracy(model, *test)


def fresh(seed: int, chosen: Any) -> nn.Module:
    model = fashion.resnet(chosen.width, chosen.blocks, seed)
    # The same function, faster on the CPU.
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def run(seed: int, e: float, base: nn.Module, train: Data, test: Data, chosen: Any) -> dict[str, Any]:
    """One row: TRP at e, and what it makes of `base`, the same network trained normally."""
    images = train[0][: chosen.recalibrate].split(chosen.batch)
    spatial, example = chosen.scheme == "spatial", train[0][:1]
    model = fresh(seed, chosen)
    regime = Truncate(e, every=chosen.every, nuclear=chosen.nuclear, scheme=chosen.scheme)
    regime.start_(model, steps=chosen.steps)
    fit(model, seed, train, chosen, regime)
    row: dict[str, Any] = {"seed": seed, "e": e, "base": fashion.accuracy(base, *test)}
    row["before"] = fashion.accuracy(model, *test)
    ranks = regime.finish_(example)
    row["ranks"] = {name: ranks[name] for name in hosts(model)}
    row["left dense"] = sorted(ranks.keys() - row["ranks"].keys())
    row["macs"] = [macs_per_token(base, example), macs_per_token(model, example)]
    row["speedup"] = row["macs"][0] / row["macs"][1]
    plain = decomposed(base, row["ranks"], spatial)
    assert macs_per_token(plain, example) == row["macs"][1]
    own = own_ranks(base, list(row["ranks"]), spatial, row["macs"][1], example)
    for way, net in zip(WAYS, (model, plain, own), strict=True):
        row[way] = measured(net, images, test)
    row["drop"] = row["before"] - row["TRP"][1]
    row["drop of SVD"] = row["base"] - row["plain SVD"][1]
    return row


def fit(model: nn.Module, seed: int, train: Data, chosen: Any, regime: Truncate | None = None) -> None:
    options = {"steps": chosen.steps, "batch": chosen.batch, "rate": chosen.rate, "seed": seed}
    fashion.train(model, *train, regime=regime, **options)


def all_rows(chosen: Any, train: Data, test: Data) -> list[dict[str, Any]]:
    """The rows of every e and seed; those that the file `--keep` has, with the same options, are not run."""
    names = (
        "steps",
        "batch",
        "rate",
        "width",
        "blocks",
        "every",
        "nuclear",
        "scheme",
        "recalibrate",
        "pilot",
    )
    options = {name: getattr(chosen, name) for name in names}
    lines = chosen.keep.read_text().splitlines() if chosen.keep and chosen.keep.exists() else []
    had = [row for row in map(json.loads, lines) if row["options"] == options]
    rows = {(row["e"], row["seed"]): row for row in had}
    bases: dict[int, nn.Module] = {}
    wanted = [(e, seed) for e in chosen.e for seed in chosen.seeds]
    for e, seed in wanted:
        if (e, seed) in rows or chosen.table:
            continue
        if seed not in bases:
            bases[seed] = fresh(seed, chosen)
            fit(bases[seed], seed, train, chosen)
        rows[e, seed] = {"options": options, **run(seed, e, bases[seed], train, test, chosen)}
        print(cells(rows[e, seed]), file=sys.stderr, flush=True)
        if chosen.keep:
            with chosen.keep.open("a") as file:
                print(json.dumps(rows[e, seed]), file=file)
    return [rows[key] for key in wanted if key in rows]


def cells(row: Mapping[str, Any]) -> list[Any]:
    ranks = " ".join(str(rank) for rank in row["ranks"].values())
    numbers = [f"{row[key]:.2f}" for key in ("speedup", "base", "before")]
    accuracies = [f"{row[way][0]:.2f} / {row[way][1]:.2f}" for way in WAYS]
    drops = [f"{row[key]:.2f}" for key in ("drop", "drop of SVD")]
    return [row["e"], row["seed"], ranks, *numbers, *accuracies, *drops]


def spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def summary(rows: list[dict[str, Any]]) -> list[Any]:
    """Mean ± standard deviation over the seeds of one e."""
    fine = [spread([row[way][1] for row in rows]) for way in WAYS]
    ours, theirs = (statistics.mean(row[key] for row in rows) for key in ("drop", "drop of SVD"))
    below = [statistics.mean(row["base"] - row["TRP"][1] for row in rows)]
    return [
        rows[0]["e"],
        len(rows),
        f"{min(row['speedup'] for row in rows):.2f} to {max(row['speedup'] for row in rows):.2f}",
        spread([row["base"] for row in rows]),
        spread([row["before"] for row in rows]),
        *fine,
        spread([row["drop"] for row in rows]),
        spread([row["drop of SVD"] for row in rows]),
        f"{ours / theirs:.2f}" if theirs > 0 else "–",
        f"{below[0] / theirs:.2f}" if theirs > 0 else "–",
    ]


def main() -> None:
    chosen = setting.arguments(
        __doc__,
        data={"type": Path, "default": fashion.FOLDER, "help": "folder of the four idx files"},
        seeds={"type": int, "nargs": "+", "default": [0, 1, 2, 3, 4]},
        e={
            "type": float,
            "nargs": "+",
            "default": [0.02, 0.05, 0.1, 0.2],
            "help": "shares of energy dropped",
        },
        every={"type": int, "default": 20, "help": "steps between truncations (default 20)"},
        nuclear={"type": float, "default": 3e-4, "help": "λ (default 3e-4)"},
        scheme={"choices": ["spatial", "channel"], "default": "spatial"},
        width={"type": int, "default": 16},
        blocks={"type": int, "default": 1, "help": "residual blocks in each of the three stages (default 1)"},
        steps={"type": int, "default": 1000},
        batch={"type": int, "default": 64},
        rate={"type": float, "default": 0.1},
        recalibrate={"type": int, "default": 6400, "help": "images for batch norm (default 6400)"},
        keep={"type": Path, "help": "a file of JSON lines: rows done are read from it, new ones added"},
        table={"action": "store_true", "help": "run nothing: print what --keep has"},
        pilot={"action": "store_true", "help": "measure on the validation split"},
    )
    x, y, test_x, test_y = fashion.load(chosen.data)
    x, y, held_x, held_y = fashion.split(x, y)
    test = (held_x, held_y) if chosen.pilot else (test_x, test_y)
    rows = all_rows(chosen, (x, y), test)
    by_e = [found for e in chosen.e if (found := [row for row in rows if row["e"] == e])]
    fine = [f"{way}, recalibrated" for way in WAYS]
    text = setting.table(
        [
            "e",
            "seeds",
            "speed-up",
            "base",
            "TRP before",
            *fine,
            "drop of TRP",
            "drop of plain SVD",
            "ratio",
            "ratio to base",
        ],
        map(summary, by_e),
    )
    text += "\n\nEvery seed; accuracies as decomposed / batch norm recalibrated:\n\n"
    text += setting.table(
        ["e", "seed", "ranks", "speed-up", "base", "TRP before", *WAYS, "drop of TRP", "drop of plain SVD"],
        (cells(row) for rows in by_e for row in rows),
    )
    options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(chosen).items()}
    setting.finish("TRP on Fashion-MNIST", {"options": options, "rows": rows}, text, chosen)


if __name__ == "__main__":
    main()
