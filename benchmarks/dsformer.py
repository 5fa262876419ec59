"""DSFormer's ablation: at equal bytes, is it worth letting the places of sparse codes move while tuning?

    python benchmarks/dsformer.py --out runs/dsformer             # five seeds, about an hour on one core
    python benchmarks/dsformer.py --out runs/dsformer --table     # the Markdown tables of what is done
    python benchmarks/dsformer.py --out runs/dsformer --choose    # how the rate and the epochs were chosen

MiniLM, tuned on movie-review snippets as in benchmarks/fwsvd.py, is factorized to equal bytes and tuned again
by four arms: codes with moving places (stf), the same codes with the places of the start (frozen), FWSVD,
SVD. Data, order, schedule and rate are one. A line of results.jsonl is one (seed, size, arm); what is there
is skipped. `--arms` names other variants, for the explanation.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from fwsvd import TARGETS, Setting, Study, recipe_of, rows_of, spread, weight_error
from safetensors.torch import load_file
from torch import nn

from rankfold import checkpoint
from rankfold.factorize import factorize_
from rankfold.layers import replace_, select
from rankfold.manifest import stamp_
from rankfold.metric import Metric
from rankfold.recipes import dsformer
from rankfold.straight_through import StraightThrough
from rankfold.trainer_callback import RegimeCallback

SIZES = ((32, 8), (64, 16))  # atoms, nonzeros: the paper's operating points
CLAIM = ("stf", "frozen", "fwsvd", "svd")


@dataclass(frozen=True)
class Tuning:
    """The one recipe of all arms, chosen on seed 0's training snippets (`--choose`)."""

    rate: float = 3e-4
    epochs: int = 1


def regime_of(arm: str) -> StraightThrough | None:
    """None for the low-rank arms, which the Trainer tunes as they are."""
    return {
        "stf": lambda: StraightThrough(),
        "frozen": lambda: StraightThrough(freeze=1.0),
        # For the explanation. The second word of a name: what differs from the first.
        "stf_ramp": lambda: StraightThrough(ramp=0.5),
        "stf_decay": lambda: StraightThrough(decay=1e-2),
        "stf_zero": lambda: StraightThrough(),  # unused codes start at zero
        "stf_fast": lambda: StraightThrough(),  # ten times the rate for codes
        "stf_weight": lambda: StraightThrough(dsformer.method, reading="weight", refit=4),
        "stf_fisher": lambda: StraightThrough(),  # codes found in FWSVD's metric
        "frozen_fisher": lambda: StraightThrough(freeze=1.0),
    }.get(arm, lambda: None)()


def fast(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW with ten times the rate for codes: a step of Adam changes a number by at most the rate."""
    codes = [p for name, p in model.named_parameters() if name.endswith(".codes")]
    held = {id(p) for p in codes}
    rest = [p for p in model.parameters() if id(p) not in held]
    groups = [{"params": rest}, {"params": codes, "lr": 10 * rate}]
    return torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)


class Ablation(Study):
    """One seed of FWSVD's study, with other arms."""

    def start(self, size: tuple[int, int], metrics: Mapping[str, Metric] | None = None) -> Any:
        """A fresh copy of the tuned model with sparse codes of one size everywhere, atoms of unit norm."""
        from transformers import AutoModelForSequenceClassification

        folder = self.out / f"codes{'-fisher' if metrics else ''}-{self.seed}-{size[0]}-{size[1]}"
        if not (folder / "config.json").is_file():
            model, method = self.model(), dsformer.method
            for name, layer in select(model, TARGETS).items():
                metric = metrics[name] if metrics else Metric()
                replace_(model, name, layer.wrap(method.fit(layer.matrix(), metric, list(size))))
            stamp_(model, dsformer.to_json())
            regime = StraightThrough(freeze=0.0)
            regime.start_(model)  # scales the atoms: all arms with codes start from one parametrisation
            regime.finish_()
            checkpoint.save(model, folder, overwrite=True)
        return AutoModelForSequenceClassification.from_pretrained(folder)

    def arm(self, name: str, size: tuple[int, int], tuning: Tuning) -> dict[str, Any]:
        started, dense = time.perf_counter(), self.model()
        before = {n: layer.matrix().clone() for n, layer in select(dense, TARGETS).items()}
        coded = self.start(size, self.calibrated("fwsvd") if name.endswith("_fisher") else None)
        budget = on_disk(coded)["bytes"] / sum(4 * w.numel() for w in before.values())
        regime, model = regime_of(name), coded
        if name in ("svd", "fwsvd"):
            model, recipe, metrics = dense, recipe_of(name), self.calibrated(name)
            factorize_(model, recipe, budget=budget, targets=TARGETS, metrics=metrics)
        row: dict[str, Any] = {"weight_error": weight_error(before, model)}
        if regime is None or name.startswith("frozen"):  # the other codes start where these do
            row |= self.tested(model)
        trainer = self.trainer(model, tuning.epochs, self.seed + 1000)
        trainer.args.learning_rate = tuning.rate
        trainer.args.max_grad_norm = 0.0  # a clip would count the gradients of places not in use
        if regime is not None:
            regime.start_(model, weights={} if name == "stf_zero" else before)
            if name.endswith("_fast"):
                trainer.optimizer = fast(model, tuning.rate)
            callback = RegimeCallback(regime)
            trainer.add_callback(callback)
        row["train_loss"] = trainer.train().training_loss
        if regime is not None and regime.reading == "coefficient":
            row["moved"] = statistics.mean(callback.facts.values())
        row |= {f"{key}_tuned": value for key, value in self.tested(model).items()}
        return row | on_disk(model) | {"seconds": round(time.perf_counter() - started, 1)}

    def run_arms(self, arms: Sequence[str], size: tuple[int, int], tuning: Tuning) -> None:
        """Do what is missing."""
        label = {"seed": self.seed, "size": list(size), **asdict(tuning)}
        done = [row for row in rows_of(self.out) if label.items() <= row.items()]
        for name in arms:
            if name not in {row["arm"] for row in done}:
                row = {**label, "arm": name, **self.arm(name, size, tuning)}
                with (self.out / "results.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


def on_disk(model: nn.Module) -> dict[str, int]:
    """Bytes of the encoder's structures, indices included, and of the whole weight file, as written."""
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint.save(model, Path(folder) / "model") / "model.safetensors"
        inside = sum(
            t.nbytes for key, t in load_file(path).items() if "encoder." in key and ".weight." in key
        )
        return {"bytes": inside, "file": path.stat().st_size}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a (size, arm), over the seeds; then the inequalities of the claim, seed by seed."""
    lines = [
        "| (k, s) | arm | seeds | bytes | weight error | loss | accuracy % "
        "| tuned: loss | accuracy % | moved % |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    figures = [("weight_error", 1, 3), ("loss", 1, 3), ("accuracy", 100, 1)]
    figures += [("loss_tuned", 1, 3), ("accuracy_tuned", 100, 1), ("moved", 100, 1)]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((tuple(row["size"]), row["arm"]), []).append(row)
    order = [*CLAIM, *sorted({arm for _, arm in groups} - set(CLAIM))]
    for size, arm in sorted(groups, key=lambda key: (key[0], order.index(key[1]))):
        group = groups[size, arm]
        cells = [
            spread([row[key] * by for row in group if key in row], digits) for key, by, digits in figures
        ]
        lead = [f"{size}", f"`{arm}`", str(len(group)), f"{statistics.mean(r['bytes'] for r in group):,.0f}"]
        lines.append("| " + " | ".join([*lead, *cells]) + " |")
    lines += [
        "",
        "| (k, s) | paired difference | loss | standard error | better "
        "| accuracy (points) | standard error | better |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in sorted({size for size, _ in groups}):
        for one, two in pairwise(CLAIM):
            pairs = [
                (a, b)
                for a in groups.get((size, one), [])
                for b in groups.get((size, two), [])
                if a["seed"] == b["seed"]
            ]
            if len(pairs) < 2:
                continue
            cells = []
            for key, by, digits, sign in (("loss_tuned", 1, 3, -1), ("accuracy_tuned", 100, 1, 1)):
                gaps = [by * (a[key] - b[key]) for a, b in pairs]
                error = statistics.stdev(gaps) / math.sqrt(len(gaps))
                better = sum(sign * gap > 0 for gap in gaps)
                cells += [spread(gaps, digits, "+"), f"{error:.{digits}f}", f"{better} of {len(gaps)}"]
            lines.append("| " + " | ".join([f"{size}", f"`{one}` − `{two}`", *cells]) + " |")
    return "\n".join(lines)


def choose(out: Path) -> None:
    """Loss of each arm at several rates and lengths: 1,600 of seed 0's training snippets to tune, 400 to
    choose by. No test snippet is looked at."""
    study = Ablation(out / "choose", 0, replace(Setting(), train=1600, test=400))
    study.out.mkdir(parents=True, exist_ok=True)
    for rate in (1e-3, 3e-4):
        study.run_arms(("frozen", "stf", "svd"), SIZES[0], Tuning(rate, 2))
    for row in rows_of(study.out):
        print(
            f"{row['rate']:g} {row['epochs']} {row['arm']:8} loss {row['loss_tuned']:.3f} "
            f"accuracy {row['accuracy_tuned']:.3f} training {row['train_loss']:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="DSFormer's ablation; see the top of this file")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", default=list(CLAIM))
    parser.add_argument("--table", action="store_true", help="print the tables of what is done, and stop")
    parser.add_argument("--choose", action="store_true", help="try rates on seed 0's training snippets")
    options = parser.parse_args()
    if not options.table:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        torch.set_num_threads(1)
        options.out.mkdir(parents=True, exist_ok=True)
    if options.choose:
        return choose(options.out)
    if not options.table:
        for size in SIZES:  # the smaller size first, on all seeds
            for seed in options.seeds:
                Ablation(options.out, seed, Setting()).run_arms(options.arms, size, Tuning())
    print(table(rows_of(options.out)))


if __name__ == "__main__":
    main()
