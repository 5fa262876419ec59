"""What a method is: (weight, metric, size) -> structure, and the curve of what each size costs and loses.

A method offers a menu of sizes for a shape, dense always last: *leave it dense* is the allocator's choice,
not an exception. Concrete methods are frozen dataclasses: printable, comparable, JSON.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankfold.metric import DecompositionError as DecompositionError
from rankfold.metric import Metric
from rankfold.structure import Structure, import_extensions

Size = Any  # what a method's menu holds, a JSON value; None means dense
UNITS = ("nbytes", "params", "macs")


@dataclass(frozen=True)
class Curve:
    """One layer's menu: what each size would cost and lose. The last entry is dense: size None, error 0."""

    sizes: tuple[Size, ...]
    costs: tuple[int, ...]  # in the budget's unit
    errors: tuple[float, ...]  # squared error in the metric, before the cast to the storage dtype
    energy: float = 0.0  # squared norm of the weight in the metric: the error of keeping nothing
    spectrum: tuple[
        float, ...
    ] = ()  # squared singular values in the metric, descending, where the method has them


class Method(ABC):
    """Turns (weight, metric, size) into a structure. Subclass as `class SVD(Method, kind="svd")`, a frozen
    dataclass."""

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Method]]] = {}
    costly: ClassVar[bool] = False  # do errors take long? then they are not asked for where nobody reads them
    fresh: ClassVar[bool] = False  # does `fit` ignore the weight's values, and start anew at random?
    adds: ClassVar[bool] = False  # does it leave the weight, frozen, and put something that trains beside it?
    takes: ClassVar[bool] = False  # one that adds: is its start taken out of the weight, which then changes?

    def __init_subclass__(cls, kind: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind is not None:
            cls.kind = kind
            Method.kinds[kind] = cls

    @abstractmethod
    def menu(self, shape: tuple[int, int]) -> list[Size]:
        """The sizes worth considering for a weight of this shape, from the smallest; every one smaller than
        dense."""

    @abstractmethod
    def empty(
        self, shape: tuple[int, int], size: Size, dtype: torch.dtype | None = None, device: Any = "meta"
    ) -> Structure:
        """An unfilled structure of this size: on meta, the cost before the work."""

    @abstractmethod
    def fit(self, weight: Tensor, metric: Metric, size: Size) -> Structure:
        """The structure of this size nearest to `weight` (out, in) in the metric, in the weight's dtype and
        device.

        Raises ValueError for a size outside (0, min(out, in)] and for weights that are not finite,
        DecompositionError where every solver failed.
        """

    def at(self, name: str, seed: int) -> Method:
        """The method for one layer: a random one draws by the layer's name, so that equal layers differ, and
        every process of a run draws the same."""
        return self

    @abstractmethod
    def errors(self, weight: Tensor, metric: Metric, sizes: Sequence[Size]) -> list[float]:
        """The squared error at each size, in float64."""

    def measure(
        self, weight: Tensor, metric: Metric, sizes: Sequence[Size]
    ) -> tuple[list[float], tuple[float, ...]]:
        """The errors, and the squared singular values in the metric (descending) where the method knows
        them."""
        return self.errors(weight, metric, sizes), ()

    def curve(self, weight: Tensor, metric: Metric, unit: str = "nbytes", *, errors: bool = True) -> Curve:
        """What each size of the menu costs and loses, dense last. Costs are known without fitting.

        errors  False for an allocator that ignores them: those of a costly method are then all zero
        """
        shape = (weight.shape[0], weight.shape[1])
        sizes = self.menu(shape)
        costs = tuple(cost_of(self.empty(shape, size, weight.dtype), unit) for size in sizes)
        skipped = self.costly and not errors
        lost, spectrum = ([0.0] * len(sizes), ()) if skipped else self.measure(weight, metric, sizes)
        dense = weight.numel() * (weight.element_size() if unit == "nbytes" else 1)
        assert all(cost < dense for cost in costs), "a menu offers only sizes that save something"
        energy = math.fsum(spectrum) if spectrum else metric.error(weight)
        return Curve((*sizes, None), (*costs, dense), (*lost, 0.0), energy, spectrum)

    def to_json(self) -> dict[str, Any]:
        return to_json(self)


def cost_of(structure: Structure, unit: str) -> int:
    """A structure's cost in a unit of UNITS: stored bytes, stored parameters, or multiply-adds a row."""
    if unit not in UNITS:
        raise ValueError(f"unit={unit!r} is not a unit of cost; choose one of {UNITS}")
    return int(getattr(structure, unit))


def to_json(item: Any) -> dict[str, Any]:
    """{"kind", **fields} of a frozen dataclass that registered itself under a kind."""
    assert dataclasses.is_dataclass(item)
    fields = {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
    return {"kind": item.kind, **fields}  # type: ignore[attr-defined]


def from_json(kinds: Mapping[str, type], what: str, data: Any) -> Any:
    """The inverse of `to_json` over a registry. Raises ValueError for an unknown kind or unknown fields."""
    if not isinstance(data, Mapping) or not isinstance(data.get("kind"), str):
        raise ValueError(f"a {what} in JSON is an object with 'kind'; got {data!r}")
    if data["kind"] not in kinds:
        import_extensions()
    if data["kind"] not in kinds:
        raise ValueError(f"Unknown {what} {data['kind']!r}; known: {sorted(kinds)}")
    cls = kinds[data["kind"]]
    fields = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items() if key != "kind"}
    unknown = set(fields) - {f.name for f in dataclasses.fields(cls)}
    if unknown:
        raise ValueError(f"{what} {data['kind']!r} has no options {sorted(unknown)}")
    return cls(**fields)
