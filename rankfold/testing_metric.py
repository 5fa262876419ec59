"""The laws of metrics and calibrations. Public through `rankfold.testing`."""

from __future__ import annotations

import copy
import json

import torch
from torch import Tensor, nn

from rankfold.layers import select
from rankfold.method import from_json
from rankfold.method import to_json as item_to_json
from rankfold.metrics import Activation, Calibration
from rankfold.testing_structure import close, require


class _Pair(nn.Module):
    """Two layers on one input, dropout that must be off, a head of four classes, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.drop, self.head = (
            nn.Linear(5, 6),
            nn.Linear(5, 6),
            nn.Dropout(0.9),
            nn.Linear(6, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.tanh(self.one(x)) * self.two(x)))


def check_metric(calibration: Calibration, *, exact: bool | None = None, seed: int = 0) -> None:
    """A calibration leaves the model as it was, gives the same moments twice, and its metrics are norms.

    exact  its error is the squared output error per token on the calibration data; by default, for a plain
             `Activation()`
    """
    if exact is None:
        exact = isinstance(calibration, Activation) and calibration.output is None and calibration.shrink == 0
    name = repr(calibration)
    kept = json.loads(json.dumps(item_to_json(calibration)))
    require(from_json(Calibration.kinds, "metric", kept) == calibration, f"{name} is not its JSON {kept}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, x = _Pair().train(), torch.randn(64, 5) @ torch.randn(5, 5)
        model.two.weight.requires_grad_(False)
        batches = [(part, torch.randint(4, (16,))) for part in x.split(16)]
        layers, before = select(model, ["one", "two", "head"]), copy.deepcopy(model)
        inputs = {"one": x, "two": x, "head": (torch.tanh(model.one(x)) * model.two(x)).detach()}
        runs = [calibration(model, layers, batches, seed=seed) for _ in range(2)]
        require(
            set(runs[0]) == set(layers), f"{name}: metrics for {sorted(runs[0])}, asked for {sorted(layers)}"
        )
        _check_untouched(model, before, name)
        if calibration.needs_data:
            for nothing in (None, []):
                try:
                    calibration(model, layers, nothing, seed=seed)
                    raise AssertionError(f"{name}: calibrated on {nothing!r} without a ValueError")
                except ValueError:
                    pass
        for layer, metric in runs[0].items():
            weight, where = layers[layer].matrix().double(), f"{name}, layer {layer!r}"
            metric.check(layer, layers[layer].shape)
            for side, again in ((metric.left, runs[1][layer].left), (metric.right, runs[1][layer].right)):
                if side is None or again is None:
                    require(side is again, f"{where}: one run gives a side that another does not")
                    continue
                require(
                    torch.equal(side, again), f"{where}: two runs with the same seed give different moments"
                )
                require(side.dtype in (torch.float32, torch.float64), f"{where}: a moment in {side.dtype}")
                values = torch.linalg.eigvalsh(side.double()) if side.dim() == 2 else side.double().flatten()
                require(
                    bool(values.min() >= -1e-6 * values.max()),
                    f"{where}: a moment has eigenvalue {values.min():.3g}",
                )
                if side.dim() == 2:
                    close(side.double(), side.double().mT, f"{where}: a moment is not symmetric", 1e-6)
            error, white = metric.error(weight), metric.whiten(weight)
            require(
                abs(float(white.square().sum()) - error) <= 1e-6 * error,
                f"{where}: ‖whiten(W)‖² is not error(W)",
            )
            back = metric.unwhiten_right(metric.unwhiten_left(white))
            left = metric.error(weight - back)
            require(
                left <= 1e-6 * error, f"{where}: unwhiten(whiten(W)) misses W by {left:.3g} of {error:.3g}"
            )
            if exact:
                change = torch.randn_like(weight)
                true = float((inputs[layer].double() @ change.mT).square().sum() / len(x))
                told = metric.error(change)
                require(
                    abs(told - true) <= 1e-5 * true,
                    f"{where}: error(E) is {told:.8g}, E changes the output by {true:.8g}",
                )
        one, two = runs[0]["one"].right, runs[0]["two"].right
        if one is not None and one.dim() == 2:
            require(one is two, f"{name}: two layers on one input do not share the tensor of its moment")


def _check_untouched(model: nn.Module, before: nn.Module, name: str) -> None:
    for (key, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        same = torch.equal(new, old) and new.requires_grad == old.requires_grad and new.grad is None
        require(same, f"{name}: calibrating changed parameter {key!r}, its requires_grad or its gradient")
    for (key, new), old in zip(model.named_modules(), before.modules(), strict=True):
        require(new.training == old.training, f"{name}: calibrating changed the mode of {key!r}")
        hooks = (*new._forward_hooks, *new._forward_pre_hooks, *new._backward_hooks)
        require(not hooks, f"{name}: calibrating left a hook on {key!r}")
