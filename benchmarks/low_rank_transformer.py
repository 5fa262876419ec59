"""Dense, low-rank and Linformer encoders trained from scratch, with their parameters, FLOPs and accuracies.

    python benchmarks/low_rank_transformer.py digits --out runs/lrt      # scikit-learn's digits, 64 tokens
    python benchmarks/low_rank_transformer.py retrieval --out runs/lrt   # a synthetic task of 1024 tokens
    python benchmarks/low_rank_transformer.py table --out runs/lrt       # Markdown tables of what is done

digits     an image is 64 tokens, its pixels; the sum of the outputs says which digit it is
retrieval  1024 tokens: a question "which value has key q?", blanks, and at random places four pairs (key,
           value), each as a token at four places; the output at the question names the value, one of 4.
           Every batch is new

All arms have the same data, order, steps and schedule. FLOPs are measured by torch's counter, which sees
every product where attention runs on torch's plain ("math") kernel. A line of results.jsonl is one (task,
arm, seed); what is there is skipped. `--seeds 100 --rate 1e-2 --init torch` is how rate and init were chosen.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from setting import table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from rankfold.automatic import auto_
from rankfold.linformer import LinformerAttention, crossover_length, layer_flops

HEADS, KEYS, VALUES, COPIES = 4, 4, 4, 4
ARMS = ("dense", "low rank", "linformer")


@dataclass(frozen=True)
class Task:
    """Sizes of the task and of the encoder, and the training that all arms share."""

    vocabulary: int  # of the tokens; 0 where a token is a number
    classes: int
    length: int  # n
    width: int  # d
    ffn: int  # f
    layers: int
    rank: int  # r, of the low-rank arm
    k: int  # of the Linformer arm
    batch: int
    steps: int
    rate: float
    places: float  # standard deviation of the position embeddings at the start; that of tokens is 1
    pooled: bool  # the head reads the sum of all outputs, or the first one


TASKS = {
    "digits": Task(0, 10, 64, 32, 128, 2, 9, 16, 16, 1200, 5e-3, 0.5, True),
    "retrieval": Task(1 + KEYS * (1 + VALUES), VALUES, 1024, 64, 128, 1, 16, 64, 8, 300, 5e-3, 0.1, False),
}


class Classifier(nn.Module):
    """Embeddings of tokens, and of positions as rows and columns of a square; an encoder of torch; a linear
    head."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        many = task.vocabulary
        self.tokens = nn.Embedding(many, task.width) if many else nn.Linear(1, task.width)
        side = math.isqrt(task.length)
        self.rows = nn.Parameter(task.places * torch.randn(side, 1, task.width))
        self.columns = nn.Parameter(task.places * torch.randn(side, task.width))
        options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(task.width, HEADS, task.ffn, **options)
        norm = nn.LayerNorm(task.width)
        self.encoder = nn.TransformerEncoder(layer, task.layers, norm, enable_nested_tensor=False)
        self.head = nn.Linear(task.width, task.classes)
        self.pooled = task.pooled

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder(self.tokens(x) + (self.rows + self.columns).flatten(0, 1))
        # The sum over √n, not over n: the outputs differ little at the start, and their mean hardly at all.
        return self.head(y.sum(1) / y.shape[1] ** 0.5 if self.pooled else y[:, 0])


def model_of(arm: str, task: Task, seed: int, init: str = "torch") -> Classifier:
    """The arm's model before training. What the arms have in common starts from the same numbers."""
    torch.manual_seed(seed)
    model = Classifier(task)
    for layer in model.encoder.layers:  # torch makes copies of one layer; each starts from its own numbers
        for parameter in layer.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
    if arm == "low rank":
        auto_(model, task.rank, solver="random", init=init, targets=["encoder.*"], seed=seed)
    if arm == "linformer":
        for layer in model.encoder.layers:
            attention = LinformerAttention(task.width, HEADS, task.length, task.k, batch_first=True)
            layer.self_attn = attention
    return model


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scaled grey levels (image, 64, 1) and classes: 1297 to train on and 500 to test, split by the seed."""
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    x, y = (
        torch.tensor(pixels, dtype=torch.float32).div(16).unsqueeze(-1)[order],
        torch.tensor(classes).long()[order],
    )
    return x[500:], y[500:], x[:500], y[:500]


def retrieval(count: int, length: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Token ids (count, length) and the value asked for (count,)."""
    x = torch.zeros(count, length, dtype=torch.long)
    places = 1 + torch.rand(count, length - 1, generator=random).topk(KEYS * COPIES).indices
    values = torch.randint(VALUES, (count, KEYS), generator=random)
    pairs = 1 + KEYS + torch.arange(KEYS) * VALUES + values
    x.scatter_(1, places, pairs.repeat(1, COPIES))
    asked = torch.randint(KEYS, (count, 1), generator=random)
    x[:, :1] = 1 + asked
    return x, values.gather(1, asked).squeeze(1)


def data_of(name: str, task: Task, seed: int) -> tuple[Callable[[], Iterator[Any]], Tensor, Tensor]:
    """A stream of training batches, and the test set."""
    random = torch.Generator().manual_seed(1000 + seed)
    if name == "retrieval":
        test = retrieval(512, task.length, torch.Generator().manual_seed(10_000 + seed))

        def batches() -> Iterator[Any]:
            while True:
                yield retrieval(task.batch, task.length, random)

        return batches, *test
    x, y, *held_out = digits(seed)

    def epochs() -> Iterator[Any]:
        while True:
            order = torch.randperm(len(x), generator=random)
            for rows in order.split(task.batch):
                if len(rows) == task.batch:
                    yield x[rows], y[rows]

    return epochs, held_out[0], held_out[1]


def train(model: nn.Module, task: Task, batches: Iterator[Any]) -> float:
    """AdamW, a tenth of the steps to warm up, then a cosine to zero. Returns the mean loss of the last 50."""
    optimizer = torch.optim.AdamW(model.parameters(), task.rate, weight_decay=0.01, fused=True)

    def share(step: int) -> float:
        warm = task.steps / 10
        return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / task.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    model.train()
    losses = []
    for _ in range(task.steps):
        x, y = next(batches)
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return statistics.mean(losses[-50:])


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    guesses = torch.cat([model(rows).argmax(-1) for rows in x.split(64)])
    return 100 * float((guesses == y).float().mean())


def measured_flops(model: nn.Module, task: Task) -> int:
    """FLOPs of one sequence through the encoder, a multiply-add counted as 2."""
    x = torch.randn(1, task.length, task.width)
    model.train()  # the fused path of eval is one operator to the counter
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.encoder(x)  # type: ignore[operator]
    return counter.get_total_flops()


def run(name: str, arm: str, seed: int, task: Task, init: str) -> dict[str, Any]:
    """Build, count, train and test one model."""
    model = model_of(arm, task, seed, init)
    sizes = {"low rank": {"rank": task.rank}, "linformer": {"k": task.k}}.get(arm, {})
    formula = task.layers * layer_flops(task.length, task.width, task.ffn, **sizes)
    flops = measured_flops(model, task)
    assert flops == formula, (flops, formula)
    batches, x, y = data_of(name, task, seed)
    started = time.perf_counter()
    loss = train(model, task, batches())
    seconds = time.perf_counter() - started
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "flops": flops,
        "loss": round(loss, 4),
        "accuracy": round(accuracy(model, x, y), 2),
        "seconds": round(seconds, 1),
    }


def rows_of(out: Path) -> list[dict[str, Any]]:
    path = out / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def spread(values: list[float], sign: str = "") -> str:
    """Mean ± standard deviation over the seeds."""
    apart = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1f}{apart}"


def tables(rows: list[dict[str, Any]]) -> str:
    """One table a task: what each arm costs, its accuracy, and the paired difference from dense."""
    parts = []
    for name in TASKS:
        mine = [row for row in rows if row["task"] == name]
        groups = [[row for row in mine if row["arm"] == arm] for arm in ARMS]
        if not all(groups):
            continue
        dense = {row["seed"]: row for row in groups[0]}
        lines = []
        for arm, group in zip(ARMS, groups, strict=True):
            first, base = group[0], groups[0][0]
            pairs = [
                row["accuracy"] - dense[row["seed"]]["accuracy"] for row in group if row["seed"] in dense
            ]
            counts = [f"{first[key]:,} ({first[key] / base[key]:.1%})" for key in ("params", "flops")]
            gap = "–" if arm == "dense" else spread(pairs, "+")
            accuracies = spread([row["accuracy"] for row in group])
            lines.append([arm, len(group), *counts, accuracies, gap])
        heads = ["arm", "seeds", "parameters", "FLOPs of the encoder, a sequence", "accuracy %"]
        task = TASKS[name]
        star = crossover_length(task.width, task.ffn, task.rank, task.k)
        about = f"{name}: n = {task.length}, d = {task.width}, f = {task.ffn}, layers: {task.layers}, r = "
        about += f"{task.rank}, k = {task.k}; low rank and Linformer cost the same at n* = {star:g}"
        parts.append(f"{about}\n\n{table([*heads, 'points from dense'], lines)}")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="See the top of this file")
    parser.add_argument("task", choices=[*TASKS, "table"])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rate", type=float, help="another learning rate than the task's")
    parser.add_argument("--steps", type=int, help="another number of steps than the task's")
    parser.add_argument("--init", default="variance_preserving", help="of the low-rank factors")
    options = parser.parse_args()
    if options.task != "table":
        torch.set_num_threads(1)
        options.out.mkdir(parents=True, exist_ok=True)
        task = TASKS[options.task]
        task = replace(task, rate=options.rate or task.rate, steps=options.steps or task.steps)
        for seed in options.seeds:
            for arm in options.arms:
                label = {"task": options.task, "arm": arm, "seed": seed, "rate": task.rate}
                label |= {"steps": task.steps} | ({"init": options.init} if arm == "low rank" else {})
                if any(label.items() <= row.items() for row in rows_of(options.out)):
                    continue
                row = label | run(options.task, arm, seed, task, options.init)
                with (options.out / "results.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    print(tables(rows_of(options.out)))


if __name__ == "__main__":
    main()
