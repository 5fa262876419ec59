"""Perplexity of every shipped recipe on one model, at one budget, from one calibration text.

All recipes get the same calibration windows and the same bytes. Statistics that recipes share are collected
once: one pass for svd_llm, weighted and kfac (inputs, and gradients of sampled labels), one for fwsvd (true
labels, per example), one for asvd. What a recipe makes of them is applied by `factorize_`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path

import setting
from torch import Tensor

from rankfold import factorize_, recipes
from rankfold.calibration_file import save_metrics
from rankfold.factorize import calibrate
from rankfold.layers import select
from rankfold.loading import Opened
from rankfold.metric import Metric, shrunk
from rankfold.metrics import KFAC
from rankfold.provenance import weights_hash

Metrics = dict[str, Metric]
ORDER = ("svd", "fwsvd", "svd_llm", "weighted", "kfac", "asvd")


def from_moments(moments: Metrics) -> dict[str, Callable[[], Metrics]]:
    """The metrics of svd_llm, weighted and kfac from E[g gᵀ] and E[x xᵀ]: as their own calibrations make."""
    shrink = recipes.kfac.metric
    assert isinstance(shrink, KFAC)

    def kfac(m: Metric) -> Metric:
        assert m.left is not None and m.right is not None
        return Metric(shrunk(m.left, shrink.shrink_out), shrunk(m.right, shrink.shrink_in))

    def weighted(m: Metric) -> Metric:
        assert m.left is not None
        return Metric(m.left.trace() / len(m.left), m.right)

    return {
        "svd_llm": lambda: {name: Metric(None, m.right) for name, m in moments.items()},
        "weighted": lambda: {name: weighted(m) for name, m in moments.items()},
        "kfac": lambda: {name: kfac(m) for name, m in moments.items()},
    }


def collected(
    opened: Opened, ids: Tensor, cache: Path | None, data_hash: str
) -> Callable[[str], Metrics | None]:
    """name of a recipe -> its metrics, calibrating at most once per pass."""
    model, layers = opened.model, select(opened.model)
    derived: dict[str, Callable[[], Metrics]] = {}

    def metrics_of(name: str) -> Metrics | None:
        recipe = recipes.get(name)
        if not recipe.metric.needs_data:
            return None
        if name not in ("svd_llm", "weighted", "kfac"):
            return calibrate(model, recipe, layers, ids, progress=setting.said)
        if not derived:
            plain = KFAC(shrink_in=0.0, shrink_out=0.0)(model, layers, ids, progress=setting.said)
            derived.update(from_moments(plain))
            if cache is not None:
                metric = recipes.weighted.to_json()["metric"]
                key = {"weights": weights_hash(model), "data": data_hash, "metric": metric, "seed": 0}
                save_metrics(derived["weighted"](), cache, {**key, "layers": list(layers)})
        return derived[name]()

    return metrics_of


def main() -> None:
    chosen = setting.arguments(
        __doc__,
        budget={"type": float, "default": 0.8, "help": "bytes kept of the selected layers (default 0.8)"},
        recipes={"nargs": "+", "default": list(ORDER), "help": "which recipes (default: all)"},
        metrics={
            "type": Path,
            "help": "keep the metric of `weighted` in this file, for allocate.py and decompose.py",
        },
    )
    opened = setting.open_smollm2()
    windows, held_out = setting.calibration(opened, chosen.sequences), setting.held_out(opened)
    metrics_of = collected(opened, windows.input_ids, chosen.metrics, windows.hash)
    results = {"dense": setting.perplexities(opened.model, held_out)}
    rows = [["dense", *results["dense"].values(), 1.0, "-"]]
    print(rows[-1], flush=True)
    for name in chosen.recipes:
        start = time.perf_counter()
        metrics = metrics_of(name)
        model = copy.deepcopy(opened.model)
        report = factorize_(model, recipes.get(name), budget=chosen.budget, metrics=metrics)
        result = setting.perplexities(model, held_out)
        gap = report.allocation["gap"]
        results[name] = {**result, "kept": report.reached, "gap": gap}
        rows.append([name, *result.values(), report.reached, "-" if gap is None else f"{gap:.2%}"])
        print(rows[-1], f"{time.perf_counter() - start:.0f} s", flush=True)
        del model, metrics
    text = setting.table(["recipe", *held_out, "bytes kept", "allocation gap"], rows)
    facts = {
        "budget": chosen.budget,
        "calibration": windows.facts(),
        "held_out": setting.HELD_OUT,
        "perplexity": results,
    }
    title = f"Perplexity at {chosen.budget} of the bytes, {windows.spec}"
    setting.finish(title, facts, text, chosen)
    if {"svd", "fwsvd", "svd_llm"} <= results.keys():
        llm, fisher, plain = (results[name]["in domain"] for name in ("svd_llm", "fwsvd", "svd"))
        print(f"svd_llm < fwsvd < svd: {llm < fisher < plain}")


if __name__ == "__main__":
    main()
