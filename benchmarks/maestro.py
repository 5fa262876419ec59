"""Maestro: ordered dropout with the group lasso, against an SVD of the dense-trained network at its ranks.

fashion  Fashion-MNIST, four convolutions with batch norm; the lasso finds the ranks. Everything is compared
         after batch norms were recalibrated on the same images, and figures before that are printed too
nested   the same network at λ = 0, cut to several budgets with `cut_` and no further training

Dense and Maestro share seed, batches, steps, rate, clipping and weight decay. λ was chosen on validation
images; `cut_` itself was revised after its first figures of `nested`, which are of test images.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import fashion
import setting
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold import recipes
from rankfold.batch_norm import recalibrate_
from rankfold.cut import cut_
from rankfold.footprint import macs_per_token
from rankfold.layers import replace_, select
from rankfold.methods import SVD
from rankfold.metric import Metric
from rankfold.ordered_dropout import OrderedDropout

CONVS = ["3", "6", "9"]  # all but the first, whose 9 inputs leave nothing to factorize
BUDGETS = (0.5, 0.25, 0.125)
CALIBRATION = 12_800  # images for batch norms


def convnet(seed: int) -> nn.Sequential:
    """Images (N, 1, 28, 28) -> logits (N, 10); 1.1 M multiply-adds an image."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inner, outer, stride in ((1, 16, 2), (16, 32, 2), (32, 64, 2), (64, 64, 1)):
            conv = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
            layers += [conv, nn.BatchNorm2d(outer), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    batch: int,
    rate: float,
    decay: float,
    seed: int,
    noise: float = 0.0,
    regime: OrderedDropout | None = None,
    positions: Mapping[str, int] | None = None,
) -> float:
    """SGD, momentum 0.9, rate x 0.1 at 1/2 and 3/4, gradients clipped to norm 1. Returns the mean over the
    steps of the regime's expected multiply-adds in training, as a share of dense."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=decay)
    generator, order, costs = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long), []
    model.train()
    for step in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(x), generator=generator)
        index, order = order[:batch], order[batch:]
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.1 ** ((step >= steps // 2) + (step >= 3 * steps // 4))
        images = x[index]
        if noise:
            images = images + noise * torch.randn(images.shape, generator=generator)
        if regime is not None:
            regime.before_step()
            macs = regime.macs(positions)
            costs.append(macs["training"] / macs["dense"])
        loss = F.cross_entropy(model(images), y[index])
        optimizer.zero_grad()
        (loss if regime is None else loss + regime.penalty()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if regime is not None:
            regime.after_step()
    model.eval()
    return statistics.fmean(costs) if costs else 1.0


def truncated(
    model: nn.Module, ranks: Mapping[str, int | None], metrics: Mapping[str, Metric] | None = None
) -> nn.Module:
    """A copy with the layers of `ranks` factorized post training; None, or a rank that saves nothing, leaves
    a layer dense."""
    model = copy.deepcopy(model)
    for name, layer in select(model, list(ranks)).items():
        (out, inner), rank = layer.shape, ranks[name]
        if rank is not None and rank * (out + inner) < out * inner:
            fit = SVD().fit(layer.matrix(), (metrics or {}).get(name, Metric()), rank)
            replace_(model, name, layer.wrap(fit))
    return model


def fashion_run(data: Path, seed: int, steps: int, penalty: float) -> dict[str, Any]:
    """One seed: a dense network, Maestro with the lasso; at Maestro's ranks SVDs of the dense one, and the
    SVD of the initial weights, trained as long (which the ranks had to be known for)."""
    x, y, tx, ty, vx, vy, dense = _trained(data, seed, steps)
    model = convnet(seed)
    regime = OrderedDropout(penalty=penalty, shrink_every=50, seed=seed)
    regime.start_(model, targets=CONVS)
    positions = {"3": 49, "6": 16, "9": 16}
    options: dict[str, Any] = {"steps": steps, "batch": 128, "rate": 0.1, "decay": 1e-4, "seed": seed}
    training = train(model, x, y, regime=regime, positions=positions, **options)
    ranks = regime.finish_()
    scratch = truncated(convnet(seed), ranks)
    train(scratch, x, y, **options)
    example, full = x[:1], macs_per_token(dense, x[:1])
    metrics = recipes.svd_llm.metric(dense, select(dense, CONVS), x[:2048].split(128))
    entries = {
        "dense": copy.deepcopy(dense),
        "Maestro": model,
        "SVD of dense": truncated(dense, ranks),
        "SVD-LLM of dense": truncated(dense, ranks, metrics),
        "those ranks from scratch": scratch,
    }
    facts: dict[str, Any] = {"seed": seed, "penalty": penalty, "ranks": ranks, "training_macs": training}
    for name, each in entries.items():
        stale = fashion.accuracy(each, tx, ty)
        recalibrate_(each, x[:CALIBRATION])
        facts[name] = {
            "validation": fashion.accuracy(each, vx, vy),
            "test": fashion.accuracy(each, tx, ty),
            "not_recalibrated": stale,
            "fewer_macs": full / macs_per_token(each, example),
        }
    print("fashion", facts, flush=True)
    return facts


@cache
def _trained(data: Path, seed: int, steps: int) -> tuple[Any, ...]:
    x, y, tx, ty = fashion.load(data)
    x, y, vx, vy = fashion.split(x, y)
    dense = convnet(seed)
    train(dense, x, y, steps=steps, batch=128, rate=0.1, decay=1e-4, seed=seed)
    return x, y, tx, ty, vx, vy, dense


def nested_run(data: Path, seed: int, steps: int) -> dict[str, Any]:
    """One seed: Maestro at λ = 0 and no weight decay, and cuts of it."""
    x, y, tx, ty, _, _, dense = _trained(data, seed, steps)
    model = convnet(seed)
    regime = OrderedDropout(penalty=0, shrink_every=None, nested=True, seed=seed)
    regime.start_(model, targets=CONVS)
    train(model, x, y, steps=steps, batch=128, rate=0.1, decay=0, seed=seed, regime=regime)
    regime.finish_()
    plain = copy.deepcopy(dense)  # the dense network as products of full rank, to be cut the same way
    regime = OrderedDropout(penalty=0, nested=True)
    regime.start_(plain, targets=CONVS)
    regime.finish_()
    pairs = list(zip(x[:2560].split(128), y[:2560].split(128), strict=True))
    rows = []
    for budget in (1.0, *BUDGETS):
        row: dict[str, Any] = {"seed": seed, "budget": budget}
        kinds: dict[str, tuple[nn.Module, dict[str, Any]]] = {
            "Maestro, curves": (model, {}),
            "Maestro, greedy": (model, {"method": "greedy"}),
            "SVD of dense, curves": (plain, {"order": "svd"}),
        }
        for name, (each, options) in kinds.items():
            each = copy.deepcopy(each)
            cut = cut_(each, budget=budget, batches=pairs, unit="params", **options)
            recalibrate_(each, x[:CALIBRATION])
            row[name] = fashion.accuracy(each, tx, ty)
            row[f"{name}: ranks"] = list(cut.ranks.values())
            if name == "Maestro, curves":
                same = truncated(dense, cut.ranks)
                recalibrate_(same, x[:CALIBRATION])
                row["SVD of dense, same ranks"] = fashion.accuracy(same, tx, ty)
        rows.append(row)
        print("nested", row, flush=True)
    return {"seed": seed, "rows": rows}


def fashion_table(runs: list[dict[str, Any]]) -> str:
    names = ("dense", "Maestro", "SVD of dense", "SVD-LLM of dense", "those ranks from scratch")
    rows = []
    for run in runs:
        found = [run[name]["test"] for name in names]
        stale = [run[name]["not_recalibrated"] for name in names[1:3]]
        ranks = ", ".join(map(str, run["ranks"].values()))
        fewer, training = run["Maestro"]["fewer_macs"], run["training_macs"]
        rows.append([run["seed"], run["penalty"], ranks, fewer, training, *found, *stale])
    headings = ["seed", "λ", "ranks", "fewer MACs", "training MACs / dense"]
    return setting.table([*headings, *names, *(f"{name}, stale norms" for name in names[1:3])], rows)


def nested_table(runs: list[dict[str, Any]]) -> str:
    rows = [row for run in runs for row in run["rows"]]
    names = ("Maestro, curves", "Maestro, greedy", "SVD of dense, same ranks", "SVD of dense, curves")
    lines = [
        [row["seed"], row["budget"], row["Maestro, curves: ranks"], *(row[name] for name in names)]
        for row in rows
    ]
    return setting.table(["seed", "parameters kept", "ranks (curves)", *names], lines)


def main() -> None:
    chosen = setting.arguments(
        __doc__,
        parts={"nargs": "+", "default": ["fashion", "nested"], "help": "fashion, nested (default: both)"},
        data={"type": Path, "default": fashion.FOLDER, "help": "folder of Fashion-MNIST"},
        seeds={"type": int, "nargs": "+", "default": [0, 1, 2]},
        steps={"type": int, "default": 1000, "help": "batches of 128 (default 1000)"},
        penalty={"type": float, "nargs": "+", "default": [3e-3], "help": "λ (default 3e-3)"},
    )
    facts: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(chosen).items() if k != "data"}}
    text = []
    for part in chosen.parts:
        if part == "fashion":
            settings = [(seed, penalty) for penalty in chosen.penalty for seed in chosen.seeds]
            runs = [fashion_run(chosen.data, seed, chosen.steps, penalty) for seed, penalty in settings]
            text.append(fashion_table(runs))
        elif part == "nested":
            runs = [nested_run(chosen.data, seed, chosen.steps) for seed in chosen.seeds]
            text.append(nested_table(runs))
        else:
            raise SystemExit(f"unknown part {part!r}; known: fashion, nested")
        facts[part] = runs
    setting.finish("Maestro against an SVD of the dense network", facts, "\n\n".join(text), chosen)


if __name__ == "__main__":
    main()
