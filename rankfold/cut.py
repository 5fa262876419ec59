"""Train once, deploy at any rank: cut the products of a trained model to a budget, without training again.

    left (out, r) right (r, in)  ->  left[:, :b] right[:b],      b per layer, chosen for the whole model

What a prefix loses is the metric's norm of the tail it drops. With A = leftᵀ G left and B = right C rightᵀ,

    error(b) = Σ_{k,l >= b} A_kl B_kl,          G = E[g gᵀ], C = E[x xᵀ], so that it is in nats per token

for all b from one (r, r) matrix. In the unit of the loss errors add up over layers; the allocator needs that.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold import allocate
from rankfold.batch_norm import recalibrate_
from rankfold.batches import Batch
from rankfold.cut_greedy import greedy
from rankfold.cut_items import Item, cost, items_of, put_
from rankfold.cut_measure import measured
from rankfold.hosts import hosts
from rankfold.layers import Layer, replace_
from rankfold.manifest import recipe_of, stamp_, unstamp_
from rankfold.method import Curve
from rankfold.methods.svd import SVD
from rankfold.metric import Metric, times
from rankfold.metrics import KFAC, Progress
from rankfold.structures import LowRank

ORDERS, METHODS = ("prefix", "svd"), ("curves", "greedy")


@dataclass(frozen=True)
class Cut:
    """What `cut_` did. Costs are in `unit`, those of the low-rank layers alone.

    ranks    {layer: rank}; None where the layer became an ordinary one, which is smaller than its product
    dense, before, after  the cost of the layers as ordinary ones, as they came, and now
    error    what the curves say was lost: with batches nats per token, about twice the KL to the model as it
             came; without, squared weights; None of "greedy"
    loss     of "greedy": the loss on its mini-batch (before, after), batch norms as they were
    norms    batch norms whose statistics were collected anew
    """

    ranks: dict[str, int | None]
    unit: str
    dense: int
    before: int
    after: int
    error: float | None = None
    loss: tuple[float, float] | None = None
    norms: int = 0

    @property
    def kept(self) -> float:
        """The share of the dense cost that is left."""
        return self.after / self.dense

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"kept": self.kept}


def cut_(
    model: nn.Module,
    *,
    budget: float,
    batches: Iterable[Batch] | Tensor | None = None,
    unit: str = "nbytes",
    order: str = "prefix",
    method: str = "curves",
    seed: int = 0,
    progress: Progress | None = None,
) -> Cut:
    """Cut every low-rank layer of `model`, in place, to a rank such that together they cost at most `budget`.

    budget   the fraction that is KEPT of what these layers would cost as ordinary dense ones, in (0, 1]
    batches  some training data, see `observe`: the curves are then in the unit of the loss, their scale
             measured by one forward pass a layer on the first batch, each layer gets the rank that serves
             the loss best, and batch norms are recalibrated. Without, every layer loses the same share of
             its squared norm (`allocate.energy`), and batch norms are left as they are
    unit     "nbytes", "params" or "macs", which are multiply-adds per row of a layer's input
    order    "prefix": the components as trained, for a model that `OrderedDropout` sorted; "svd": sorted
             first, by an SVD of each product in its metric, for any other
    method   "curves", or "greedy" [our reading of Maestro]: lower the layer that costs the least loss a unit
             saved, on the first of `batches` (with labels), one size after another. One forward pass a layer
             and cut: for small models

    Layers of other kinds, and those that are ordinary, stay. Calibration holds a dense copy of the model.
    Raises ValueError for bad arguments, a budget below the smallest possible or above what the model has, and
    layers that share a factor; the model is then unchanged.
    """
    held = batches if batches is None or isinstance(batches, Tensor) else list(batches)
    items = items_of(model, unit)
    limit = _check(items, budget, unit, order, method, held)
    metrics: dict[str, Metric] = {}
    if held is not None and (method == "curves" or order == "svd"):
        metrics = KFAC()(*_dense_twin(model, items), held, seed=seed, progress=progress)
    if order == "svd":
        items = [_sorted(item, metrics.get(item.names[-1], Metric())) for item in items]
    error, loss = None, None
    if method == "greedy":
        assert held is not None
        picks, loss = greedy(model, items, limit, held, progress)
    else:
        curves = {item.names[-1]: _curve(item, metrics, held is not None) for item in items}
        if held is None:
            chosen = allocate.energy(curves, limit)
        else:
            share = limit / sum(item.dense for item in items)
            curves = measured(model, items, curves, share, held, progress)
            chosen = allocate.lagrangian(curves, limit)
        picks, error = [chosen.index[item.names[-1]] for item in items], chosen.error
    for item, pick in zip(items, picks, strict=True):
        put_(model, item, item.sizes[pick])
    recipe = recipe_of(model)
    unstamp_(model)
    if hosts(model):
        stamp_(model, recipe)
    return Cut(
        ranks={
            name: item.sizes[pick] for item, pick in zip(items, picks, strict=True) for name in item.names
        },
        unit=unit,
        dense=sum(item.dense for item in items),
        before=sum(cost(item.structure, item.structure.rank, unit) for item in items),
        after=sum(item.costs[pick] for item, pick in zip(items, picks, strict=True)),
        error=error,
        loss=loss,
        norms=recalibrate_(model, held) if held is not None else 0,
    )


def tail_errors(structure: LowRank, metric: Metric) -> Tensor:
    """‖W - W_b‖² in the metric for the prefixes b = 0, 1, …, rank: (rank + 1,), float64."""
    left, right = (factor.detach().double() for factor in structure.factors())
    outer = left.mT @ times(metric.left, left)  # (rank, rank)
    inner = right @ times(metric.right, right.mT)
    square = (outer * inner).flip(0, 1)
    return F.pad(square.cumsum(0).cumsum(1).diagonal().flip(0), (0, 1)).clamp_min(0)


def _curve(item: Item, metrics: Mapping[str, Metric], calibrated: bool) -> Curve:
    metric = metrics.get(item.names[-1])
    if calibrated and metric is None:  # it never ran on the data: nothing is known of it
        return Curve(item.sizes[-1:], item.costs[-1:], (0.0,))
    errors = tail_errors(item.structure, metric or Metric()).tolist()
    lost = [errors[size] for size in item.sizes[:-1] if size is not None]
    return Curve(item.sizes, item.costs, (*lost, 0.0), energy=errors[0])


def _check(items: list[Item], budget: float, unit: str, order: str, method: str, batches: Any) -> int:
    """The budget as an amount in `unit`."""
    for option, value, known in (("order", order, ORDERS), ("method", method, METHODS)):
        if value not in known:
            raise ValueError(f"cut_({option}={value!r}): choose one of {known}")
    if not isinstance(budget, int | float) or isinstance(budget, bool) or not 0 < budget <= 1:
        raise ValueError(f"budget={budget!r} is the fraction of the dense {unit} kept, above 0 and at most 1")
    dense, most = sum(item.dense for item in items), sum(item.costs[-1] for item in items)
    least = sum(item.costs[0] for item in items)
    limit = math.floor(budget * dense + 1e-9)
    if limit < least:
        raise ValueError(
            f"budget={budget} is below the smallest possible {math.ceil(least / dense * 1e4) / 1e4} of the "
            f"dense {unit} of the {len(items)} low-rank layers; raise it"
        )
    if limit > most:
        raise ValueError(
            f"budget={budget} is above what the model has, {math.floor(most / dense * 1e4) / 1e4} of the "
            f"dense {unit} of its {len(items)} low-rank layers: there is nothing to cut. A budget is a share "
            "of the dense size; lower it"
        )
    if method == "greedy" and (batches is None or not len(batches)):
        raise ValueError("cut_(method='greedy') scores on data but batches is None or empty; pass batches")
    return limit


def _dense_twin(model: nn.Module, items: list[Item]) -> tuple[nn.Module, dict[str, Layer]]:
    twin, layers = copy.deepcopy(model), {}
    for name, host in hosts(twin).items():
        if isinstance(host.weight, LowRank):
            replace_(twin, name, host.to_dense())
    for item in items:
        module = twin.get_submodule(item.names[-1])
        channel = Layer(module)
        layers[item.names[-1]] = (
            channel if channel.shape == item.structure.shape else Layer(module, spatial=True)
        )
    return twin, layers


def _sorted(item: Item, metric: Metric) -> Item:
    """The item with its components sorted by what they are worth in the metric, largest first."""
    with torch.no_grad():
        product = item.structure.to_dense()
    made = SVD().fit(product, metric, min(item.structure.rank, *item.structure.shape))
    return Item(item.names, made, item.sizes, item.costs, item.dense)
