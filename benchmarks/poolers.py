"""Poolers compared: one bidirectional GRU and one classifier, five ways to make a vector of a text's states.

Sets: `movie` (snippets of film reviews), `spam` (SpamAssassin's mails) and `brown` (15 genres of the Brown
corpus, chunks of six sentences split by document). For each seed one split, one vocabulary, one set of
initial weights of the GRU and one order of batches, the same for every pooler:

    mean, additive, self_attentive (Lin 2017), multihead (attention, then the mean), lama, and
    lama_tuned, which is lama at another temperature

On seed 0 alone each pooler gets its learning rate, and lama_tuned its temperature, by the best accuracy on
the validation part; the other seeds use them. In every run the best epoch on validation is judged once on the
test part. `--keep FILE` goes on from the rows there, `--table` prints them and trains nothing.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any, cast

import setting
import torch
from poolers_data import SETS, Example, Split, bag_of_words, batches, split
from torch.utils.flop_counter import FlopCounterMode

from rankfold.models import ClassifierConfig, PooledForSequenceClassification, RecurrentConfig
from rankfold.pooling import Pooling

POOLERS: dict[str, dict[str, Any]] = {
    "mean": {},
    "additive": {},
    "self_attentive": {"heads": 8, "hidden": 350},
    "multihead": {"heads": 8},
    "lama": {"heads": 8},
}
TUNED = "lama_tuned"


def accuracy(model: PooledForSequenceClassification, examples: list[Example]) -> float:
    """In percent."""
    right = 0
    model.eval()
    with torch.no_grad():
        for batch in batches(examples, 256, None):
            right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    model.train()
    return 100 * right / len(examples)


def fresh(data: Split, seed: int, pooler: str, options: dict[str, Any], chosen: Any) -> Any:
    words = {"vocab_size": data.vocabulary, "embedding_size": chosen.embedding}
    config = cast(Any, ClassifierConfig)(
        encoder=cast(Any, RecurrentConfig)(**words, hidden_size=chosen.hidden, dropout=chosen.dropout),
        pooler=pooler,
        pooler_options=options,
        dropout=chosen.dropout,
        num_labels=data.classes,
    )
    torch.manual_seed(seed)
    model = PooledForSequenceClassification(config)
    encoder = cast(Any, model.encoder)
    encoder._packed = encoder._gathered  # the same states without packing: half the time on a CPU
    return model


def run(name: str, seed: int, row: str, rate: float, temperature: float, chosen: Any) -> dict[str, Any]:
    """Train once; {"valid", "test", "epoch", sizes}."""
    data = split(name, seed, of(name, chosen.train))
    pooler = "lama" if row == TUNED else row
    options = POOLERS[pooler] | ({"temperature": temperature} if row == TUNED else {})
    model = fresh(data, seed, pooler, options, chosen)
    epochs = of(name, chosen.epochs)
    steps = epochs * math.ceil(len(data.train) / chosen.batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1 - step / steps, 0))
    draw = random.Random(seed)
    torch.manual_seed(seed)  # what dropout draws
    best, epoch, test, start = -1.0, 0, 0.0, time.process_time()
    curve = []
    for number in range(1, epochs + 1):
        for batch in batches(data.train, chosen.batch, draw):
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        curve.append(accuracy(model, data.valid))
        if curve[-1] > best:
            best, epoch, test = curve[-1], number, accuracy(model, data.test)
    lengths = [len(example.ids) for example in data.test]
    return {
        "set": name,
        "pooler": row,
        "seed": seed,
        "rate": rate,
        "temperature": temperature,
        "valid": best,
        "test": test,
        "epoch": epoch,
        "curve": curve,
        "sizes": [len(data.train), len(data.valid), len(data.test)],
        "length": round(statistics.mean(lengths)),
        "classes": data.classes,
        "seconds": round(time.process_time() - start, 1),
        **costs(model, round(statistics.mean(lengths))),
    }


def costs(model: PooledForSequenceClassification, length: int) -> dict[str, int]:
    """Parameters, and multiply-adds of pooling one sequence, checked against what the products really are."""
    pooler: Pooling = model.pooler
    states = torch.zeros(1, length, pooler.width)
    with FlopCounterMode(display=False) as counter:
        pooler.eval()(states, torch.ones(1, length, dtype=torch.bool))
    # A mean is a sum, which the counter leaves out.
    means = length * pooler.width if pooler.heads * pooler.width != pooler.out_features else 0
    if type(pooler).__name__ == "MeanPooling":
        means = length * pooler.width
    if counter.get_total_flops() != 2 * (pooler.macs(length) - means):
        raise RuntimeError(f"{pooler}: counted {counter.get_total_flops()} FLOPs, {pooler.macs(length)} MACs")
    word = getattr(pooler, "word_mlp", None)
    return {
        "attention": pooler.attention_params(),
        "word": pooler.word_mlp_params(),
        "total": sum(p.numel() for p in model.parameters()),
        "macs": pooler.macs(length),
        "macs_word": 0 if word is None else length * pooler.width**2,
    }


def of(name: str, each: list[int]) -> int:
    """What an option with one number for each set says for this one."""
    return each[list(SETS).index(name)]


Key = tuple[str, str, int, float, float]


class Rows:
    """What was run, by set, pooler, seed, rate and temperature; kept in a file of JSON lines."""

    def __init__(self, path: Path | None, options: dict[str, Any], table: bool) -> None:
        self.path, self.options, self.table = path, options, table
        lines = path.read_text().splitlines() if path and path.exists() else []
        had = [row for row in map(json.loads, lines) if row["options"] == options]
        self.found = {self.key(row): row for row in had}

    @staticmethod
    def key(row: dict[str, Any]) -> Key:
        return row["set"], row["pooler"], row["seed"], row["rate"], row["temperature"]

    def get(self, *key: Any, chosen: Any) -> dict[str, Any] | None:
        """The row of (set, pooler, seed, rate, temperature), run now unless it is there or not to be."""
        name, pooler, seed, rate, temperature = key
        if key not in self.found and not self.table:
            row = {"options": self.options, **run(name, seed, pooler, rate, temperature, chosen)}
            self.found[key] = row
            said = f"{name} {pooler} seed {seed} rate {rate} τ {temperature}: valid {row['valid']:.2f} test"
            print(f"{said} {row['test']:.2f}, {row['seconds']} s", file=sys.stderr, flush=True)
            if self.path:
                with self.path.open("a") as file:
                    print(json.dumps(row), file=file)
        return self.found.get(key)


def tuned(rows: Rows, name: str, chosen: Any) -> dict[str, tuple[float, float]]:
    """{pooler: (rate, temperature)} by validation on seed 0; of equals the first of the grid."""
    best: dict[str, tuple[float, float]] = {}
    for pooler in [*POOLERS, TUNED]:
        if pooler == TUNED:
            grid = [(best["lama"][0], t) for t in chosen.temperatures] if "lama" in best else []
        else:
            grid = [(rate, 1.0) for rate in chosen.rates]
        found = [(rows.get(name, pooler, 0, *options, chosen=chosen), options) for options in grid]
        done = [(row["valid"], options) for row, options in found if row]
        if done:
            best[pooler] = max(done, key=lambda item: item[0])[1]
    return best


def spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def difference(ours: dict[int, float], theirs: dict[int, float]) -> str:
    """Mean ± standard error of the paired difference, over the seeds that both have."""
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if len(pairs) < 2:
        return "–"
    return f"{statistics.mean(pairs):+.2f} ± {statistics.stdev(pairs) / math.sqrt(len(pairs)):.2f}"


def table(name: str, found: dict[str, list[dict[str, Any]]]) -> str:
    """One line for each pooler of a set."""
    tests = {pooler: {row["seed"]: row["test"] for row in rows} for pooler, rows in found.items()}
    base = tests.get("multihead", {})
    lines = []
    for pooler, rows in found.items():
        row = rows[0]
        share = row["attention"] / found["multihead"][0]["attention"] if base else math.nan
        label = f"{pooler}, τ = {row['temperature']:g}" if pooler == TUNED else pooler
        lines.append(
            [
                label,
                f"{row['rate']:g}",
                len(rows),
                spread(list(tests[pooler].values())),
                "" if pooler == "multihead" else difference(tests[pooler], base),
                f"{row['attention']:,}",
                f"{100 * share:.1f} %",
                f"{row['word']:,}",
                f"{row['total']:,}",
                f"{row['macs'] - row['macs_word']:,}",
                f"{row['macs']:,}",
            ]
        )
    first = next(iter(found.values()))[0]
    sizes = " / ".join(f"{size:,}" for size in first["sizes"])
    title = f"`{name}`: {sizes} texts to train, choose and test (seed {first['seed']}), "
    title += f"{first['classes']} classes, multiply-adds at the mean length of {first['length']} tokens"
    heads = ["pooler", "rate", "seeds", "test accuracy, %", "minus multihead", "attention parameters"]
    heads += ["of multihead's", "word MLP", "parameters in all", "MACs", "MACs with word MLP"]
    return f"{title}\n\n{setting.table(heads, lines)}"


def main() -> None:
    chosen = setting.arguments(
        __doc__,
        sets={"nargs": "+", "choices": list(SETS), "default": list(SETS)},
        seeds={"type": int, "nargs": "+", "default": [0, 1, 2, 3, 4]},
        rates={"type": float, "nargs": "+", "default": [1e-3, 3e-3]},
        temperatures={"type": float, "nargs": "+", "default": [0.3, 0.1]},
        epochs={"type": int, "nargs": len(SETS), "default": [4, 4, 6], "help": "for movie, spam and brown"},
        train={"type": int, "nargs": len(SETS), "default": [0, 2500, 4000], "help": "most texts (0: all)"},
        batch={"type": int, "default": 64},
        embedding={"type": int, "default": 100},
        hidden={"type": int, "default": 64, "help": "of the GRU, a direction"},
        dropout={"type": float, "default": 0.3},
        keep={"type": Path, "help": "a file of JSON lines: rows done are read from it, new ones added"},
        bag={"action": "store_true", "help": "only TF-IDF and logistic regression, on seed 0's split"},
        table={"action": "store_true", "help": "train nothing: print what --keep has"},
    )
    if chosen.bag:
        for name, limit in zip(SETS, chosen.train, strict=True):
            if name in chosen.sets:
                print(f"{name}: {bag_of_words(split(name, 0, limit)):.1f} %")
        return
    names = ("epochs", "train", "batch", "embedding", "hidden", "dropout")
    rows = Rows(chosen.keep, {name: getattr(chosen, name) for name in names}, chosen.table)
    text = []
    for name in chosen.sets:
        best = tuned(rows, name, chosen)
        found: dict[str, list[dict[str, Any]]] = {}
        for seed in chosen.seeds:
            for pooler, options in best.items():
                row = rows.get(name, pooler, seed, *options, chosen=chosen)
                if row:
                    found.setdefault(pooler, []).append(row)
        if found:
            text.append(table(name, found))
    every = list(rows.found.values())
    setting.finish("Poolers", {"options": rows.options, "rows": every}, "\n\n".join(text), chosen)


if __name__ == "__main__":
    main()
