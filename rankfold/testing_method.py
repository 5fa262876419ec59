"""The laws of methods. Public through `rankfold.testing`."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rankfold.method import Method, from_json
from rankfold.metric import Metric
from rankfold.structure import Structure
from rankfold.testing_structure import TOLERANCE, dense64, require


def sample_metrics(shape: tuple[int, int], seed: int = 0) -> dict[str, Metric]:
    """One metric (float64) of each form for weights of `shape`; "singular" has moments of low rank "
    "on the input side."""
    random = torch.Generator().manual_seed(seed)

    def moment(n: int, rank: int) -> Tensor:
        rows = torch.randn(rank, n, generator=random, dtype=torch.float64) * torch.logspace(
            0, -1, n, dtype=torch.float64
        )
        return rows.mT @ rows / rank

    (out, inner), scalar = shape, torch.tensor(0.37, dtype=torch.float64)
    diagonal = torch.rand(inner, generator=random, dtype=torch.float64) + 0.1
    return {
        "plain": Metric(),
        "diagonal": Metric(None, diagonal),
        "input": Metric(None, moment(inner, 2 * inner)),
        "scaled": Metric(scalar, moment(inner, 2 * inner)),
        "output": Metric(moment(out, 2 * out), None),
        "both": Metric(moment(out, 2 * out), moment(inner, 2 * inner)),
        "mixed": Metric(
            torch.rand(out, generator=random, dtype=torch.float64) + 0.1, moment(inner, 2 * inner)
        ),
        "singular": Metric(None, moment(inner, max(1, inner // 3))),
    }


def check_method(
    method: Method,
    shape: tuple[int, int],
    *,
    metrics: Mapping[str, Metric] | None = None,
    sizes: Sequence[Any] | None = None,
    best: bool = False,
    exact: bool = True,
    bound: bool = False,
    seed: int = 0,
) -> None:
    """A curve tells the truth: costs before fitting, errors of what `fit` returns, never worse for more.

    metrics  the metrics it serves, by name; `sample_metrics(shape)` when None. A method for the plain norm
             gives {"": Metric()}
    sizes    sizes by rising cost; up to four of its menu when None
    best     no random structure of the same spec, and no small change of the fitted one, is nearer to the
             weight
    exact    the error is zero on a matrix that a structure of that size represents
    bound    `errors` gives upper bounds: a fit may have less than it says, never more
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        require(
            method == from_json(Method.kinds, "method", json.loads(json.dumps(method.to_json()))),
            f"{method} is not its JSON",
        )
        menu = method.menu(shape)
        costs = [method.empty(shape, size).params for size in menu]
        require(None not in menu, f"{method}: its menu {menu} holds None; dense is added by `curve`")
        require(json.loads(json.dumps(menu)) == menu, f"{method}: its menu {menu} is not JSON")
        require(costs == sorted(set(costs)), f"{method}: the costs of its menu do not rise: {costs}")
        dense = shape[0] * shape[1]
        require(
            method.adds or not costs or costs[-1] < dense,
            f"{method}: size {menu[-1:]} costs {costs[-1:]}, dense {dense}",
        )
        if sizes is None:
            sizes = (
                [menu[i] for i in sorted({0, len(menu) // 3, 2 * len(menu) // 3, len(menu) - 1})]
                if menu
                else []
            )
        for label, metric in (sample_metrics(shape, seed) if metrics is None else metrics).items():
            where = f"{method} on {shape}, metric {label!r}"
            weight = torch.randn(shape, dtype=torch.float64)
            _check_curve(method, weight, metric, sizes, where)
            for size in sizes:
                _check_fit(method, weight, metric, size, f"{where}, size {size}", best, exact, bound)


def _check_curve(method: Method, weight: Tensor, metric: Metric, sizes: Sequence[Any], where: str) -> None:
    curve, energy = method.curve(weight, metric), metric.error(weight)
    require(
        curve.sizes[-1] is None and curve.errors[-1] == 0,
        f"{where}: the curve does not end with dense, error 0",
    )
    require(
        curve.costs[-1] == weight.nbytes,
        f"{where}: dense costs {curve.costs[-1]}, but it has {weight.nbytes} bytes",
    )
    require(
        abs(curve.energy - energy) <= TOLERANCE * energy,
        f"{where}: energy {curve.energy}, but ‖W‖² is {energy}",
    )
    errors = method.errors(weight, metric, sizes)
    for before, after in itertools.pairwise(errors):
        require(
            after <= before + TOLERANCE * energy,
            f"{where}: the errors rise with size: {errors} at {list(sizes)}",
        )
    require(
        all(0 <= error < float("inf") for error in errors),
        f"{where}: errors {errors} are not all finite and >= 0",
    )


def _check_fit(
    method: Method,
    weight: Tensor,
    metric: Metric,
    size: Any,
    where: str,
    best: bool,
    exact: bool,
    bound: bool,
) -> None:
    energy, shape = metric.error(weight), (weight.shape[0], weight.shape[1])
    original = weight.clone()
    fitted = method.fit(weight, metric, size)
    require(torch.equal(weight, original), f"{where}: fit changed the weight it was given")
    torch.manual_seed(1)  # a method may draw, but not from the global generator
    again = method.fit(weight, metric, size)
    for key, tensor in fitted.state_dict().items():
        require(torch.equal(tensor, again.state_dict()[key]), f"{where}: two fits differ in {key!r}")
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        structure = fitted if dtype == torch.float64 else method.fit(weight.to(dtype), metric, size)
        empty = method.empty(shape, size, dtype)
        require(structure.dtype == dtype, f"{where}: a fit of {dtype} is stored in {structure.dtype}")
        require(
            structure.spec() == empty.spec(), f"{where}: fit gives {structure.spec()}, empty {empty.spec()}"
        )
        require(
            structure.nbytes == empty.nbytes,
            f"{where}: fit has {structure.nbytes} bytes, empty {empty.nbytes}",
        )
    error, told = _error(metric, weight, fitted), method.errors(weight, metric, [size])[0]
    require(
        error <= told + 1e-6 * energy if bound else abs(error - told) <= 1e-8 * energy,
        f"{where}: errors() says {told:.9g}, the fit has {error:.9g}, ‖W‖² {energy:.4g}",
    )
    if best:
        for attempt in range(20):
            rival = copy.deepcopy(fitted)
            with torch.no_grad():
                for p in rival.parameters():
                    noise = torch.randn_like(p) * p.abs().mean()
                    p.copy_(noise if attempt < 5 else p + noise * 10.0 ** -(attempt % 5))
            found = _error(metric, weight, rival)
            require(
                found >= error - 1e-9 * energy,
                f"{where}: error {error:.9g}, but another of its kind has {found:.9g}",
            )
    if exact:
        with torch.no_grad():
            for p in again.parameters():
                p.copy_(torch.randn_like(p))
            target = again.to_dense()
        left = _error(metric, target, method.fit(target, metric, size)) / max(metric.error(target), 1e-300)
        require(left <= 1e-8, f"{where}: a matrix of exactly this form is missed by {left:.3g} of its energy")
    weight[0, 0] = float("nan")
    try:
        method.fit(weight, metric, size)
        raise AssertionError(f"{where}: a weight with NaN was fitted; raise ValueError")
    except ValueError:
        weight.copy_(original)


def _error(metric: Metric, weight: Tensor, structure: Structure) -> float:
    return metric.error(weight.double() - dense64(structure))
