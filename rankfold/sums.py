"""Float64 sums under construction: second moments, gradient moments, per-example squared gradients.

Products are formed in float32 blocks and added in float64. Nothing else is kept of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rankfold.layers import Layer

BLOCK = 4096  # rows in one float32 product


@dataclass
class Observation:
    """The sums of one pass, normalised; see the module. `calls` counts how often each layer ran."""

    second: dict[str, Tensor] = field(default_factory=dict)
    absolute: dict[str, Tensor] = field(default_factory=dict)
    gradient: dict[str, Tensor] = field(default_factory=dict)
    energy: dict[str, Tensor] = field(default_factory=dict)
    fisher: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    tokens: int = 0


class Sums:
    """Float64 sums under construction."""

    def __init__(
        self, layers: Mapping[str, Layer], input: str | None, gradient: str | None, fisher: bool
    ) -> None:
        self.layers, self.input, self.gradient, self.fisher = layers, input, gradient, fisher
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.rows: dict[tuple[str, str], int] = {}
        self.examples = 0

    def add(self, what: str, name: str, value: Tensor, rows: int) -> None:
        key = (what, name)
        value = value.double()
        if key in self.sums:
            self.sums[key] += value
        else:
            self.sums[key] = value
        self.rows[key] = self.rows.get(key, 0) + rows

    def on_input(self, name: str, x: Tensor, mask: Tensor | None) -> None:
        layer = self.layers[name]
        if layer.lookup:
            index = x if mask is None else x[mask]
            self.add("input", name, torch.bincount(index.flatten(), minlength=layer.shape[0]), index.numel())
            return
        rows = keep(layer.inputs(x), mask)
        if self.input == "absolute":
            self.add("input", name, rows.float().abs().sum(0), len(rows))
        else:
            self.add("input", name, second_moment(rows), len(rows))

    def on_gradient(self, name: str, x: Tensor, g: Tensor, mask: Tensor | None) -> None:
        rows = keep(self.layers[name].outputs(g, x), mask)
        value = (
            second_moment(rows) if self.gradient == "matrix" else rows.float().square().sum() / rows.shape[-1]
        )
        self.add("gradient", name, value, len(rows))

    def on_example(self, name: str, calls: list[tuple[Tensor, Tensor]], examples: int) -> None:
        """Add per-example squared gradients, summed over either side. A layer that ran several times has one
        gradient."""
        layer = self.layers[name]
        xs = [
            per_example(x if layer.lookup else layer.inputs(x), examples, name, layer.lookup)
            for x, _ in calls
        ]
        gs = [per_example(layer.outputs(g, x), examples, name) for x, g in calls]
        x, g = torch.cat(xs, 1), torch.cat(gs, 1).float()  # (examples, rows, in), (examples, rows, out)
        if layer.lookup:
            by_out, by_in = torch.zeros(layer.shape[0]), torch.zeros(layer.shape[1])
            for index, slope in zip(x, g, strict=True):
                unique, place = index.unique(return_inverse=True)
                total = slope.new_zeros(len(unique), slope.shape[-1]).index_add_(0, place, slope).square_()
                by_out = by_out.to(total.device).index_add_(0, unique, total.sum(1))
                by_in = by_in.to(total.device) + total.sum(0)
        else:
            x = x.float()
            rows, (out, inner) = x.shape[1], layer.shape
            if rows * (out + inner) < out * inner:  # Σ_out (Gᵀ X)² = Σ_t ((G Gᵀ X) ∘ X)
                by_in = ((g @ g.mT @ x) * x).sum((0, 1))
                by_out = ((x @ x.mT @ g) * g).sum((0, 1))
            else:
                by_in, by_out = x.new_zeros(inner), x.new_zeros(out)
                for each_g, each_x in zip(g, x, strict=True):
                    square = (each_g.mT @ each_x).square_()  # (out, in)
                    by_in, by_out = by_in + square.sum(0), by_out + square.sum(1)
        self.add("fisher_in", name, by_in, examples)
        self.add("fisher_out", name, by_out, examples)

    def check(self) -> None:
        for (what, name), value in self.sums.items():
            if not torch.isfinite(value).all():
                kind = "activations" if what == "input" else "gradients"
                raise ValueError(
                    f"layer {name!r}: the {kind} hold NaN or infinity on the calibration data. Calibrate in "
                    f"float32 or "
                    "bfloat16, and check the model's weights and the data"
                )

    def normalise(self, seen: Observation, leaders: Mapping[str, str]) -> None:
        for (what, name), value in self.sums.items():
            if what == "input":
                target = seen.absolute if self.input == "absolute" else seen.second
                target[name] = value / (
                    max(self.rows[what, name], 1) if self.input == "absolute" else seen.tokens
                )
            elif what == "gradient":
                target = seen.gradient if self.gradient == "matrix" else seen.energy
                target[name] = value / max(self.rows[what, name], 1)
            elif what == "fisher_in":
                rows = self.rows[what, name]
                seen.fisher[name] = (self.sums["fisher_out", name] / rows, value / rows)
        for follower, leader in leaders.items():
            if leader in seen.second and seen.calls[follower]:
                seen.second[follower] = seen.second[leader]


def second_moment(rows: Tensor) -> Tensor:
    """Σ rowᵀ row in float64, from float32 products of at most BLOCK rows."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    for part in rows.split(BLOCK):
        part = part.float()
        total += (part.mT @ part).double()
    return total


def keep(rows: Tensor, mask: Tensor | None) -> Tensor:
    """(…, features) flattened to (rows, features), without the rows that are padding."""
    if mask is not None and mask.numel() == rows.shape[:-1].numel():
        return rows.flatten(0, -2)[mask.flatten()]
    return rows.flatten(0, -2)


def per_example(rows: Tensor, examples: int, name: str, lookup: bool = False) -> Tensor:
    """Rows as (examples, rows, features). Raises ValueError where the layer has mixed the examples of a
    batch."""
    features = () if lookup else rows.shape[-1:]
    if rows.shape[0] == examples:
        return rows.reshape(examples, -1, *features)
    if examples == 1:
        return rows.reshape(1, -1, *features)
    raise ValueError(
        f"layer {name!r} sees {rows.shape[0]} rows for a batch of {examples} examples, so its gradients per "
        f"example cannot be "
        "told apart; give batches of one example"
    )
