"""Perplexity of every shipped recipe on one model, at the same bytes, from one calibration text.

All recipes get the same calibration windows and the same bytes, indices and masks included. Statistics that
recipes share are collected once: one pass for the activation and K-FAC metrics (inputs, and gradients of
sampled labels), one for fwsvd (true labels, per example), one for asvd. `--metrics` keeps those of the
activation metrics. What a recipe makes of them is applied by `factorize_`.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import setting
from torch import Tensor

from rankfold import factorize_, recipes
from rankfold.calibration_file import load_metrics, save_metrics
from rankfold.factorize import calibrate
from rankfold.layers import select
from rankfold.loading import Opened
from rankfold.metric import Metric, shrunk
from rankfold.metrics import KFAC
from rankfold.provenance import weights_hash
from rankfold.storage import store_values_

Metrics = dict[str, Metric]
ORDER = ("svd", "fwsvd", "svd_llm", "weighted", "kfac", "asvd")
SPARSE = ("svd_llm", "basis_sharing", "rocket", "compot", "cospadi", "cospadi_grouped", "codes", "kfac")


def collected(
    opened: Opened, ids: Tensor, cache: Path | None, data_hash: str
) -> Callable[[str], Metrics | None]:
    """name of a recipe -> its metrics, calibrating at most once per pass."""
    model, layers = opened.model, select(opened.model)
    key = {
        "weights": weights_hash(model),
        "data": data_hash,
        "metric": recipes.weighted.to_json()["metric"],
        "seed": 0,
        "layers": list(layers),
    }
    held: dict[str, Metrics] = {}  # "moments": E[g gᵀ], E[x xᵀ]; "weighted": E‖g‖² / out, E[x xᵀ]

    def weighted() -> Metrics:
        if "weighted" not in held and cache is not None and cache.exists():
            held["weighted"] = load_metrics(cache, key)
        if "weighted" not in held:
            held["weighted"] = {n: Metric(_scalar(m), m.right) for n, m in moments().items()}
            if cache is not None:
                save_metrics(held["weighted"], cache, key)
        return held["weighted"]

    def moments() -> Metrics:
        if "moments" not in held:
            plain = KFAC(shrink_in=0.0, shrink_out=0.0)
            held["moments"] = plain(model, layers, ids, progress=setting.said)
        return held["moments"]

    def metrics_of(name: str) -> Metrics | None:
        metric = recipes.get(name).metric
        if not metric.needs_data:
            return None
        if metric == recipes.svd_llm.metric:
            return {n: Metric(None, m.right) for n, m in weighted().items()}
        if metric == recipes.weighted.metric:
            return weighted()
        if isinstance(metric, KFAC):  # as its own calibration makes it
            return {n: _shrunk(m, metric) for n, m in moments().items()}
        return calibrate(model, recipes.get(name), layers, ids, progress=setting.said)

    return metrics_of


def _scalar(moment: Metric) -> Tensor:
    assert moment.left is not None
    return moment.left.trace() / len(moment.left)


def _shrunk(moment: Metric, metric: KFAC) -> Metric:
    assert moment.left is not None and moment.right is not None
    return Metric(shrunk(moment.left, metric.shrink_out), shrunk(moment.right, metric.shrink_in))


def main() -> None:
    chosen = setting.arguments(
        __doc__,
        budgets={"type": float, "nargs": "+", "default": [0.8], "help": "bytes kept (default 0.8)"},
        recipes={
            "nargs": "+",
            "default": list(ORDER),
            "help": f"which recipes; 'sparse' for {', '.join(SPARSE)} (default: {', '.join(ORDER)})",
        },
        metrics={
            "type": Path,
            "help": "keep the metric of `weighted` in this file, for allocate.py and decompose.py",
        },
        storage={
            "nargs": "+",
            "default": ["float"],
            "help": "pack the values of sparse codes afterwards: float, bf14, int8 (default: float)",
        },
        keep={"type": Path, "help": "keep fits in this folder: a run that was stopped goes on"},
    )
    names = [n for name in chosen.recipes for n in (SPARSE if name == "sparse" else (name,))]
    opened = setting.open_smollm2()
    windows, held_out = setting.calibration(opened, chosen.sequences), setting.held_out(opened)
    metrics_of = collected(opened, windows.input_ids, chosen.metrics, windows.hash)
    results = [{"recipe": "dense", "kept": 1.0, "perplexity": setting.perplexities(opened.model, held_out)}]
    rows = [["dense", 1.0, *results[0]["perplexity"].values(), "-", "-", "-"]]
    print(rows[-1], flush=True)
    for name in names:
        metrics = metrics_of(name)
        for budget, storage in itertools.product(chosen.budgets, chosen.storage):
            model = copy.deepcopy(opened.model)
            start = time.process_time()
            report = factorize_(model, recipes.get(name), budget=budget, metrics=metrics, keep=chosen.keep)
            seconds = time.process_time() - start
            lost = sum(layer.relative_error for layer in report.layers) / len(report.layers)
            label, kept = name, report.reached
            if storage != "float":
                was, now = store_values_(model, storage)
                label, kept = f"{name} + {storage}", kept - (was - now) / report.totals["selected_before"]
            result = setting.perplexities(model, held_out)
            gap = report.allocation["gap"]
            facts = {"recipe": label, "budget": budget, "kept": kept, "perplexity": result}
            results.append({**facts, "relative_error": lost, "gap": gap, "cpu_seconds": seconds})
            each = seconds / len(report.layers)
            shown = "-" if gap is None else f"{gap:.2%}"
            rows.append([label, round(kept, 4), *result.values(), lost, each, shown])
            print(rows[-1], flush=True)
            del model
        del metrics
    headings = ["recipe", "bytes kept", *held_out, "mean relative error", "CPU s a matrix", "allocation gap"]
    text = setting.table(headings, rows)
    facts = {
        "budgets": chosen.budgets,
        "calibration": windows.facts(),
        "held_out": setting.HELD_OUT,
        "results": results,
    }
    setting.finish(f"Perplexity at equal bytes, {windows.spec}", facts, text, chosen)
    found = {r["recipe"]: r["perplexity"]["in domain"] for r in results if r["kept"] < 1}
    if {"svd", "fwsvd", "svd_llm"} <= found.keys():
        print(f"svd_llm < fwsvd < svd: {found['svd_llm'] < found['fwsvd'] < found['svd']}")


if __name__ == "__main__":
    main()
