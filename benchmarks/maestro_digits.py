"""Maestro on the digits of scikit-learn: a 64-128-128-10 network, one minute a seed.

lasso     λ of 3e-3 and 1e-3, an absolute eps of 1e-3, ranks looked at every 20 steps; against an SVD of the
          dense-trained network at the ranks that came out
prefixes  λ = 0, cut to ranks set by hand; against that SVD, and the same training without sampling
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import fashion
import setting
import torch
from maestro import train, truncated
from torch import nn

from rankfold.hosts import hosts
from rankfold.ordered_dropout import OrderedDropout

RANKS = ((3, 5, 4), (5, 10, 4), (8, 15, 4), (16, 32, 2), (32, 64, 5))  # of the digits network


def mlp(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, second = nn.Linear(64, 128), nn.Linear(128, 128)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(128, 10))


def digits_run(seed: int, steps: int) -> dict[str, Any]:
    """One seed of the digits: the lasso at two λ, then prefixes of λ = 0, without sampling, and of an SVD."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x, y = torch.tensor(bunch.data, dtype=torch.float32), torch.tensor(bunch.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    test, rest = order[:500], order[500:]
    x = (x - x[rest].mean(0)) / x[rest].std(0).clamp_min(1e-3)
    options: dict[str, Any] = {"steps": steps, "batch": 64, "rate": 0.05, "seed": seed, "noise": 0.3}
    options |= {"decay": 0.0}

    def score(model: nn.Module) -> float:
        return fashion.accuracy(model.eval(), x[test], y[test], 500)

    def run(regime: OrderedDropout | None, sample: bool = True) -> tuple[nn.Module, dict[str, int]]:
        model = mlp(seed)
        if regime is not None:
            regime.start_(model, targets=["*"])
        train(model, x[rest], y[rest], regime=regime if sample else None, **options)
        return model, {} if regime is None else regime.finish_()

    dense, _ = run(None)
    facts: dict[str, Any] = {"seed": seed, "dense": score(dense), "lasso": []}
    for penalty in (3e-3, 1e-3):
        regime = OrderedDropout(penalty=penalty, shrink_every=20, eps=1e-3, relative=False, seed=seed)
        model, ranks = run(regime)
        svd = score(truncated(dense, ranks))
        facts["lasso"].append({"penalty": penalty, "ranks": ranks, "Maestro": score(model), "SVD": svd})
    ordered, unsorted = (
        run(OrderedDropout(penalty=0, shrink_every=None, nested=True, seed=seed), sample)[0]
        for sample in (True, False)
    )
    facts["full"] = {"Maestro": score(ordered), "no sampling": score(unsorted)}
    facts["prefixes"] = []
    for ranks in RANKS:
        named = dict(zip(("0", "2", "4"), ranks, strict=True))
        row = {"ranks": ranks, "SVD": score(truncated(dense, named))}
        row |= {"Maestro": score(prefix(ordered, named)), "no sampling": score(prefix(unsorted, named))}
        facts["prefixes"].append(row)
    print("digits", facts, flush=True)
    return facts


def prefix(model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    """A copy with its products cut to `ranks`."""
    model = copy.deepcopy(model)
    for name, host in hosts(model).items():
        left, right = host.weight.left.weight, host.weight.right.weight  # type: ignore[union-attr]
        host.weight = type(host.weight).of(left[:, : ranks[name]].detach(), right[: ranks[name]].detach())  # type: ignore[attr-defined, index]
    return model


def digits_table(runs: list[dict[str, Any]]) -> str:
    lines = []
    for run in runs:
        lines.append([run["seed"], "dense", "-", run["dense"], "-"])
        for row in run["lasso"]:
            ranks = ", ".join(map(str, row["ranks"].values()))
            lines.append([run["seed"], f"λ = {row['penalty']:g}: {ranks}", row["Maestro"], row["SVD"], "-"])
        for row in run["prefixes"]:
            ranks = ", ".join(map(str, row["ranks"]))
            lines.append([run["seed"], f"λ = 0: {ranks}", row["Maestro"], row["SVD"], row["no sampling"]])
        full = run["full"]
        lines.append([run["seed"], "λ = 0: full", full["Maestro"], run["dense"], full["no sampling"]])
    return setting.table(["seed", "ranks", "Maestro", "SVD of dense", "no sampling"], lines)


def main() -> None:
    chosen = setting.arguments(
        __doc__,
        seeds={"type": int, "nargs": "+", "default": [0, 1, 2]},
        steps={"type": int, "default": 2500, "help": "batches of 64 (default 2500)"},
    )
    runs = [digits_run(seed, chosen.steps) for seed in chosen.seeds]
    facts: dict[str, Any] = {"steps": chosen.steps, "runs": runs}
    setting.finish("Maestro on digits", facts, digits_table(runs), chosen)


if __name__ == "__main__":
    main()
