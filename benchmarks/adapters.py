"""Adapters compared at matched parameters: LoRA, PiSSA, WaRA's variants, WaveFT, full fine-tuning, a probe.

    python benchmarks/adapters.py --keep runs             # trains what is not there yet, then the table
    python benchmarks/adapters.py --keep runs --table     # trains nothing

Tasks: see adapters_tasks.py (from scratch) and adapters_pretrained.py. For each seed one split, one order of
batches and one fresh head, the same for every method. In each method the head trains too; its parameters are
counted apart. Every adapter gets r (out + in) numbers in a layer: LoRA and PiSSA of rank r, WaRA of rank r/2
in four bands (or as its energy says), its feature reading of rank 2r, WaveFT that many coefficients.

On the seeds that a task names as `tuned` each method gets its learning rate, by the mean score on the
validation part: of three that are a factor of about 3 apart, and while the best is at an end of another one,
up to five. The probe comes first: its rate is the head's in every other method, unless a task says another.
The last state is judged once on the test part. AdamW without weight decay, a tenth of the steps to warm up,
then linearly to 0, gradients clipped to norm 1.
"""

from __future__ import annotations

import fnmatch
import json
import math
import random
import statistics
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import setting
import torch
from adapters_pretrained import Genre, Movie, Textile
from adapters_tasks import Digits, Fashion, Task, batches
from poolers import difference, spread
from torch import nn

from rankfold import recipes
from rankfold.adapters import freeze_
from rankfold.factorize import factorize_
from rankfold.layers import select

DIGITS = {"train": 200, "valid": 200, "test": 597, "epochs": 20, "batch": 20, "rank": 4}
FASHION = {"train": 500, "valid": 500, "test": 2000, "epochs": 3, "batch": 25, "rank": 4}
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(Digits(f"digits_{kind}", **DIGITS) for kind in ("shifted", "rotated", "blurred")),
        *(Fashion(f"fashion_{kind}", **FASHION) for kind in ("rotated", "blurred")),
        Movie("movie", train=320, valid=320, test=640, epochs=1, batch=16, rank=8),
        Textile("textile", train=180, valid=150, test=300, epochs=2, batch=15, rank=4),
        Genre("genre", train=8, valid=6, test=10, epochs=1, batch=1, rank=8),
    )
}
NONE, PROBE, FULL, WAVEFT = "none", "probe", "full", "waveft"
RECIPES = {  # {method: (recipe, its rank over LoRA's)}
    "lora": (recipes.lora, 1.0),
    "pissa": (recipes.pissa, 1.0),
    "wara": (recipes.wara, 0.5),
    "wara_adaptive": (recipes.wara_adaptive, 0.5),
    "wara_feature": (recipes.wara_feature, 2.0),
}
METHODS = (NONE, PROBE, *RECIPES, WAVEFT, FULL)
# The middle of the three learning rates that a method begins with: for models from scratch, and for
# pretrained ones.
MIDDLE: dict[str, tuple[float, float]] = {
    NONE: (0.0, 0.0),
    PROBE: (1e-2, 1e-2),
    "lora": (1e-2, 3e-3),
    "pissa": (3e-3, 3e-4),
    "wara": (1e-2, 3e-3),
    "wara_adaptive": (1e-2, 3e-3),
    "wara_feature": (1e-2, 3e-3),
    WAVEFT: (3e-4, 1e-4),
    FULL: (1e-3, 1e-4),
}
LADDER = [float(f"{digit}e{power}") for power in range(-7, 1) for digit in (1, 3)]
MOST = 5  # rates a method and task
Found = dict[str, list[dict[str, Any]]]  # {method: its rows}


def put_(model: nn.Module, method: str, task: Task, seed: int) -> int:
    """Make `model` what `method` trains; the count of its parameters without the head."""
    if method == FULL:
        model.requires_grad_(True)
    elif method in (NONE, PROBE):
        model.requires_grad_(False)
    elif method == WAVEFT:
        waveft_(model, task, seed)
    else:
        recipe, share = RECIPES[method]
        factorize_(model, recipe(rank=int(share * task.rank)), targets=list(task.targets), seed=seed)
        freeze_(model)
    for name, parameter in model.named_parameters():
        if is_head(name, task):
            parameter.requires_grad_(method != NONE)
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if p.requires_grad and not is_head(name, task))


def waveft_(model: nn.Module, task: Task, seed: int) -> None:
    """WaveFT with as many coefficients in a layer as LoRA has numbers there: PEFT's, or, where a layer is a
    convolution, which PEFT's does not take, ours."""
    layers = select(model, list(task.targets))
    counts = {name: task.rank * sum(layer.shape) for name, layer in layers.items()}
    if all(isinstance(model.get_submodule(name), nn.Linear) for name in layers):
        from peft import WaveFTConfig, inject_adapter_in_model

        pattern = {name.replace(".", r"\."): count for name, count in counts.items()}
        config = WaveFTConfig(target_modules=list(layers), n_frequency_pattern=pattern, random_loc_seed=seed)
        inject_adapter_in_model(config, model)
        return
    for count in sorted(set(counts.values())):
        names = [name for name in layers if counts[name] == count]
        factorize_(model, recipes.waveft(coefficients=count), targets=names, seed=seed)
    freeze_(model)


def is_head(name: str, task: Task) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in task.head)


def run(task: Task, method: str, seed: int, rate: float, head_rate: float) -> dict[str, Any]:
    """Train once: what a row of the file says, without its options."""
    model = task.model(seed)
    train, valid, test = task.parts(seed)
    trained = put_(model, method, task, seed)
    head = [p for name, p in model.named_parameters() if is_head(name, task)]
    rest = [p for name, p in model.named_parameters() if p.requires_grad and not is_head(name, task)]
    torch.manual_seed(seed)
    start, losses = time.process_time(), []
    if method != NONE:
        groups = [{"params": head, "lr": rate if method == PROBE else head_rate}]
        groups += [{"params": rest, "lr": rate}] if rest else []
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        steps = task.epochs * math.ceil(len(train["x"]) / task.batch)
        warm = max(steps // 10, 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(steps - warm, 1))
        )
        draw = random.Random(seed)
        for _ in range(task.epochs):
            for batch in batches(train, task.batch, draw):
                loss = task.loss(model, batch)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(head + rest, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(float(loss.detach()))
    seconds = time.process_time() - start
    tenth = max(len(losses) // 10, 1)
    return {
        "task": task.name,
        "method": method,
        "seed": seed,
        "rate": rate,
        "head_rate": head_rate,
        "trained": trained,
        "head": 0 if method == NONE else sum(p.numel() for p in head),
        "losses": [round(statistics.mean(part), 4) for part in (losses[:tenth], losses[-tenth:]) if part],
        "seconds": round(seconds, 2),
        "valid": task.score(model, valid) if seed in task.tuned else None,
        "test": task.score(model, test),
    }


class Rows:
    """What was run, by task, method, seed and rates; kept in a file of JSON lines."""

    def __init__(self, path: Path | None, tasks: dict[str, Task], table: bool) -> None:
        self.path, self.tasks, self.table = path, tasks, table
        lines = path.read_text().splitlines() if path and path.exists() else []
        had = [row for row in map(json.loads, lines) if row["options"] == self.options(row["task"])]
        untuned = [row for row in had if row["valid"] is None and row["seed"] in tasks[row["task"]].tuned]
        self.found = {self.key(row): row for row in had if row not in untuned}

    def options(self, name: str) -> dict[str, Any]:
        return asdict(self.tasks[name]) if name in self.tasks else {}

    @staticmethod
    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["task"], row["method"], row["seed"], row["rate"], row["head_rate"]

    def get(self, *key: Any) -> dict[str, Any] | None:
        """The row of (task, method, seed, rate, head's rate), run now unless it is there or not to be."""
        if key not in self.found and not self.table:
            row = run(self.tasks[key[0]], *key[1:]) | {"options": self.options(key[0])}
            self.found[key] = row
            names = ("rate", "trained", "losses", "valid", "test", "seconds")
            shown = ", ".join(f"{name} {row[name]}" for name in names)
            print(f"{key[0]} {key[1]} seed {key[2]}: {shown}", file=sys.stderr, flush=True)
            if self.path:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as file:
                    print(json.dumps(row), file=file)
        return self.found.get(key)


def chosen_rate(rows: Rows, task: Task, method: str, head_rate: float) -> float | None:
    """The rate with the best validation score, the mean over the seeds that tune; of equals the lowest. None
    where rows are missing."""
    middle = MIDDLE[method][task.pretrained]
    place = LADDER.index(middle) if middle else 0
    tried = [0.0] if not middle else LADDER[place - 1 : place + 2]
    best = None
    while tried:
        done = []
        for rate in tried:
            got = [rows.get(task.name, method, seed, rate, head_rate) for seed in task.tuned]
            valid = [row["valid"] for row in got if row]
            if len(valid) == len(task.tuned):
                done.append((task.sign * statistics.mean(valid), -rate))
        best = -max(done)[1] if done else None
        if not best or len(tried) == MOST or best not in (tried[0], tried[-1]):
            break
        step = 1 if best == tried[-1] else -1
        end = LADDER.index(best) + step
        if not 0 <= end < len(LADDER):
            break
        tried = sorted([*tried, LADDER[end]])
    return best


def collected(rows: Rows, task: Task, methods: list[str], seeds: list[int]) -> Found:
    """Every method tuned, and run on every seed."""
    found: Found = {}
    head_rate = task.head_rate or chosen_rate(rows, task, PROBE, 0.0)
    if head_rate is None:
        return found
    for method in methods:
        if method in task.without:
            continue
        mine = 0.0 if method in (NONE, PROBE) else head_rate
        rate = chosen_rate(rows, task, method, mine)
        got = [rows.get(task.name, method, seed, rate, mine) for seed in seeds] if rate is not None else []
        if done := [row for row in got if row]:
            found[method] = done
    return found


def table(task: Task, found: Found) -> str:
    tests = {method: {row["seed"]: row["test"] for row in rows} for method, rows in found.items()}
    lines = [
        [
            method,
            "–" if method == NONE else f"{rows[0]['rate']:g}",
            len(rows),
            f"{rows[0]['trained']:,}",
            spread(list(tests[method].values())),
            "" if method == "lora" else difference(tests[method], tests.get("lora", {})),
            f"{statistics.median(row['seconds'] for row in rows):.1f}",
        ]
        for method, rows in found.items()
    ]
    facts = ", ".join(f"{name} {value}" for name, value in asdict(task).items() if name != "name")
    head = next((row["head"] for rows in found.values() for row in rows if row["head"]), 0)
    heads = ["method", "rate", "seeds", "parameters trained", task.metric, "minus lora", "CPU s"]
    return f"`{task.name}`: {facts}; head {head:,} parameters\n\n{setting.table(heads, lines)}"


def changed(tasks: dict[str, Task], changes: list[str]) -> dict[str, Task]:
    """Tasks with other options: "movie.train=2000", or "digits*.epochs=5"."""
    tasks = dict(tasks)
    for change in changes:
        pattern, _, value = change.partition("=")
        pattern, _, option = pattern.rpartition(".")
        names = fnmatch.filter(tasks, pattern)
        known = sorted({f.name for name in names for f in fields(tasks[name])[1:]})
        if option not in known:
            raise SystemExit(f"--set {change}: TASK.OPTION=VALUE, of {', '.join(tasks)}; options {known}")
        for name in names:
            kind = type(getattr(tasks[name], option))
            tasks[name] = replace(tasks[name], **{option: kind(value)})
    return tasks


def main() -> None:
    chosen = setting.arguments(
        __doc__,
        tasks={"nargs": "+", "choices": list(TASKS), "default": list(TASKS)},
        methods={"nargs": "+", "choices": METHODS, "default": list(METHODS)},
        seeds={"type": int, "nargs": "+", "default": [0, 1, 2, 3, 4]},
        set={"nargs": "+", "default": [], "metavar": "TASK.OPTION=VALUE", "help": "e.g. movie.train=2000"},
        keep={"type": Path, "help": "a folder: runs done are read from its adapters.jsonl, new ones added"},
        table={"action": "store_true", "help": "train nothing: print what --keep has"},
    )
    tasks = changed(TASKS, chosen.set)
    rows = Rows(chosen.keep and chosen.keep / "adapters.jsonl", tasks, chosen.table)
    text = []
    for name in chosen.tasks:
        if found := collected(rows, tasks[name], chosen.methods, chosen.seeds):
            text.append(table(tasks[name], found))
    every = list(rows.found.values())
    setting.finish("Adapters", {"rows": every}, "\n\n".join(text), chosen)


if __name__ == "__main__":
    main()
