"""The numbers and sentences that every rendering of a report shares: text, page and model card say the same.

Here are the rows of the before/after table, the plain sentence on speed, the labels under which layers are
grouped, and what differs between two reports. Any fact may be missing or not finite.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rankfold.report import LayerRow, Report, encode
from rankfold.report_format import DASH, clean, count, known, milliseconds, number, percent, size

UNITS = {"nbytes": "bytes", "bytes": "bytes", "params": "parameters", "macs": "multiply-adds"}
# Less than this between two timings is not a difference that one run can claim.
SPEED_MARGIN = 0.05


# The run


def recipe_name(report: Report) -> str:
    """The recipe's name, or the kind of its method."""
    method = report.recipe.get("method")
    kind = method.get("kind") or method.get("name") if isinstance(method, dict) else method
    return clean(report.recipe.get("name") or kind or "unnamed recipe")


def model_name(report: Report) -> str:
    return clean(report.model or "model")


def unit(report: Report) -> str:
    return UNITS.get(report.unit, clean(report.unit))


def kind(report: Report) -> str:
    """What was made, in a word: "compressed", "pretrained", "adapter" (beside weights that stay), or "dense"
    (what had been structured, as an ordinary model)."""
    if report.training:
        return "pretrained"
    if "params_trained" in report.totals:
        return "adapter"
    return "dense" if report.recipe.get("to") == "dense" else "compressed"


def sides(report: Report) -> tuple[str, str]:
    """What the model before and the model after are called over two columns."""
    after = {"pretrained": "as trained", "adapter": "with adapters", "dense": "dense"}
    what = kind(report)
    return "as it was" if what == "dense" else "dense", after.get(what, what)


def kept(report: Report) -> str:
    """What the bytes after, over those before, are called."""
    return "kept" if kind(report) in ("compressed", "pretrained") else "of before"


def left(report: Report) -> str:
    """The title over what is as it was."""
    titles = {"adapter": "What has no adapter, and why", "dense": "What was dense already"}
    return titles.get(kind(report), "What stayed dense, and why")


def fraction(after: Any, before: Any) -> float | None:
    return after / before if known(after) and known(before) and before else None


def total(report: Report, key: str, side: str) -> Any:
    """One of the totals; those of the selected layers are summed from the rows when they are not written."""
    value = report.totals.get(f"{key}_{side}")
    if value is None and key == "selected":
        value = sum(getattr(row, f"bytes_{side}") for row in report.layers)
    return value


def measured(report: Report, side: str) -> dict[str, Any]:
    """The metrics of "dense" or "compressed"; empty when there was no evaluation."""
    found = (report.evaluation or {}).get(side)
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Line:
    """A row of the before/after table. `better` is -1 (lower), +1 (higher) or 0 (neither)."""

    key: str
    label: str
    before: str
    after: str
    change: str
    verdict: str  # "better" | "worse" | ""


# key: label, format, which way is better
METRICS: dict[str, tuple[str, Any, int]] = {
    "perplexity": ("Perplexity", number, -1),
    "kl": ("KL, nats/token", number, -1),
    "accuracy": ("Accuracy", percent, 1),
    "bytes_on_disk": ("Bytes on disk", size, -1),
    "params": ("Parameters", count, -1),
    "macs_per_token": ("Multiply-adds/token", count, -1),
    "prefill_ms": ("Prefill", milliseconds, -1),
    "decode_ms_per_token": ("Decode, per token", milliseconds, -1),
    "decode_tokens_per_s": ("Decode, tokens/s", number, 1),
    "peak_memory_bytes": ("Peak memory", size, -1),
}


def _line(key: str, label: str, show: Any, better: int, before: Any, after: Any) -> Line:
    change, verdict = DASH, ""
    numbers = known(before) and known(after)
    if numbers and math.isfinite(before) and not math.isfinite(after):
        change, verdict = "broken", "worse"
    elif numbers and math.isfinite(before):
        step = after - before
        if key == "accuracy":
            change = f"{100 * step:+.1f} points"
        elif before:
            change = percent(step / abs(before), sign=True)
        if step and better:
            verdict = "better" if step * better > 0 else "worse"
    return Line(key, label, show(before), show(after), change, verdict)


def before_after(report: Report) -> list[Line]:
    """Quality first, then size, then speed; a row is there when either side of it is known."""
    dense, small = measured(report, "dense"), measured(report, "compressed")
    keys = [*METRICS, *sorted((dense.keys() | small.keys()) - METRICS.keys())]
    lines: list[Line] = []
    for key in keys:
        label, show, better = METRICS.get(key, (clean(key).replace("_", " "), number, 0))
        before, after = dense.get(key), small.get(key)
        if key == "bytes_on_disk":
            for name, text in (("selected", "Selected layers"), ("model", "Whole model")):
                lines.append(
                    _line(name, text, size, -1, *(total(report, name, s) for s in ("before", "after")))
                )
        if key == "params" and before is None and after is None:
            before, after = total(report, "params", "before"), total(report, "params", "after")
        if key == "macs_per_token" and before is None and after is None:
            before, after = total(report, "macs", "before"), total(report, "macs", "after")
            label = "Multiply-adds, selected"  # of those layers only, per input row
        if known(before) or known(after):
            lines.append(_line(key, label, show, better, before, after))
    return [line for line in lines if (line.before, line.after) != (DASH, DASH)]


def speed(report: Report) -> tuple[str, str]:
    """The plain sentence on speed against dense, and "better", "worse" or "" for it."""
    dense, small = measured(report, "dense"), measured(report, "compressed")
    ratios: dict[str, float] = {}  # time after / time before
    for name, key in (("decoding", "decode_ms_per_token"), ("prefill", "prefill_ms")):
        ratio = fraction(small.get(key), dense.get(key))
        if ratio is None and name == "decoding":
            ratio = fraction(dense.get("decode_tokens_per_s"), small.get("decode_tokens_per_s"))
        if ratio is not None and math.isfinite(ratio) and ratio > 0:
            ratios[name] = ratio
    if not ratios:
        return "Speed was not measured.", ""
    parts, faster, slower = [], False, False
    for name, ratio in ratios.items():
        if ratio > 1 + SPEED_MARGIN:
            parts, slower = [*parts, f"{name} is slower, {percent(ratio - 1, 0)} more time"], True
        elif ratio < 1 - SPEED_MARGIN:
            parts, faster = [*parts, f"{name} is faster, {percent(1 - ratio, 0)} less time"], True
        else:
            parts.append(f"{name} is not faster (within {percent(SPEED_MARGIN, 0)})")
    text = "Against dense in the same dtype, " + "; ".join(parts) + "."
    if slower and not faster:
        text += " The model is smaller, not faster."
    return text, "worse" if slower else "better" if faster else ""


def gap(report: Report) -> str:
    """How far from optimal the allocation may be."""
    a = report.allocation
    name, error, bound = clean(a.get("allocator") or "the allocator"), a.get("error"), a.get("bound")
    if not known(bound):
        return f"{name} proves no bound, so how far this allocation is from the best is not known."
    found = a.get("gap")
    return (
        f"{name}: summed error {number(error)}, and no allocation within the budget can be below "
        f"{number(bound)}; this one is within {percent(found, 2)} of the best possible."
    )


def alarms(report: Report) -> list[str]:
    """The report's warnings, headed by what the numbers themselves give away."""
    found = []
    for key, word in (("perplexity", "perplexity"), ("kl", "KL to dense")):
        after = measured(report, "compressed").get(key)
        if known(after) and not math.isfinite(after):
            found.append(f"The compressed model's {word} is {number(after)}: the model is broken.")
    said = (report.evaluation or {}).get("warnings")
    found += [clean(text) for text in [*report.warnings, *(said if isinstance(said, list) else [])]]
    return list(dict.fromkeys(found))


# Layers


def prefix(rows: Iterable[Any]) -> str:
    """The dotted beginning that all names share, dot included; it is said once instead of on every row."""
    names = [row.name.split(".")[:-1] for row in rows]
    shared: list[str] = []
    for parts in zip(*names, strict=False):
        if len(set(parts)) > 1 or len(names) < 2:
            break
        shared.append(parts[0])
    return "".join(f"{part}." for part in shared)


def labels(rows: Iterable[LayerRow]) -> dict[str, str]:
    """{layer name: group}. The group is the type (`q_proj`), or, where one block holds several layers of a
    type (`dense` in BERT, every expert of a mixture), the name without its integers."""
    rows = list(rows)
    crowded = {kind for (_, kind), n in Counter((row.block, row.type) for row in rows).items() if n > 1}
    groups: dict[str, str] = {}
    for kind in crowded:
        those = [row for row in rows if row.type == kind]
        start = prefix(those)
        for row in those:
            parts = [p for p in row.name.removeprefix(start).split(".") if not p.isdigit()]
            groups[row.name] = clean(".".join(parts) or kind)
    return {row.name: groups.get(row.name) or clean(row.type) for row in rows}


def by_type(report: Report) -> list[tuple[str, list[LayerRow]]]:
    """Groups of layers, the heaviest first."""
    label = labels(report.layers)
    groups: dict[str, list[LayerRow]] = {}
    for row in report.layers:
        groups.setdefault(label[row.name], []).append(row)
    return sorted(groups.items(), key=lambda group: -sum(row.bytes_before for row in group[1]))


def left_dense(report: Report) -> list[tuple[str, list[Any]]]:
    """What stayed dense, by why: selected layers the allocator left alone, then what was not selected."""
    groups: dict[str, list[Any]] = {}
    for row in report.layers:
        if row.dense and kind(report) != "dense":
            reason = row.note.removeprefix("stays dense:").strip() or "the allocator kept it dense"
            groups.setdefault(f"selected, but {clean(reason)}", []).append(row)
    for skipped in report.skipped:
        groups.setdefault(clean(skipped.reason or "not selected"), []).append(skipped)
    return list(groups.items())


def differences(a: Report, b: Report) -> dict[str, Any]:
    """What differs between two reports: settings, totals, metrics, and each layer whose structure, size or
    bytes changed, or that only one of them selected."""
    old, new = ({row.name: row for row in report.layers} for report in (a, b))
    facts = ("structure", "size", "bytes_after", "relative_error")

    def view(row: LayerRow | None) -> dict[str, Any] | None:
        return {key: getattr(row, key) for key in facts} if row else None

    changed = [
        {"name": name, "before": view(old.get(name)), "after": view(new.get(name))}
        for name in [*old, *(n for n in new if n not in old)]
        if (name not in old or name not in new)
        or any(getattr(old[name], key) != getattr(new[name], key) for key in facts[:3])
    ]
    x, y = a.to_json(), b.to_json()
    keys = (
        "model",
        "recipe",
        "unit",
        "budget",
        "reached",
        "dtype",
        "seed",
        "weights_hash",
        "data",
        "versions",
    )
    sides = [(measured(a, side), measured(b, side)) for side in ("dense", "compressed")]
    found = {
        "settings": {key: [x[key], y[key]] for key in keys if x[key] != y[key]},
        "totals": {
            key: [a.totals.get(key), b.totals.get(key)] for key in sorted(a.totals.keys() | b.totals.keys())
        },
        "metrics": {
            side: {key: [p.get(key), q.get(key)] for key in sorted(p.keys() | q.keys())}
            for side, (p, q) in zip(("dense", "compressed"), sides, strict=True)
        },
        "layers": changed,
        "layers_same": len(old.keys() | new.keys()) - len(changed),
    }
    return encode(found, "differences")
