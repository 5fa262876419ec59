"""A recipe: a method, a metric and an allocator, with a paper's name on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from rankfold import allocate
from rankfold.groups import Groups
from rankfold.method import Curve, Method, from_json
from rankfold.metrics import KFAC, Calibration

Allocator = Callable[[Mapping[str, Curve], int], allocate.Allocation]


@dataclass(frozen=True)
class Recipe:
    """What `factorize_` applies. A Python expression; its JSON is what we write, and what repeats a run.

    `groups` says which layers are fitted together and share a factor (`rankfold.groups`); None: none. Raises
    ValueError for groups with a metric whose left sides are matrices: layers have no outputs in common.
    """

    name: str
    method: Method
    metric: Calibration
    allocate: Allocator
    paper: str = ""
    summary: str = ""
    groups: Groups | None = None

    def __post_init__(self) -> None:
        if self.groups is not None and isinstance(self.metric, KFAC):
            raise ValueError(
                f"recipe {self.name!r}: metric 'kfac' has a matrix for each layer's own outputs, and layers "
                "of a group are fitted in one metric; use Activation(output='scalar'), or no groups"
            )

    def __call__(self, **options: Any) -> Recipe:
        """The recipe with other options of its method: `recipes.sltrain(rank=128, sparsity=0.03)`. Raises
        ValueError for an option that the method does not have, or a value that it refuses."""
        known = [f.name for f in fields(self.method)]  # type: ignore[arg-type]
        for option in options:
            if option not in known:
                raise ValueError(
                    f"recipe {self.name!r} has no option {option!r}; its method has {', '.join(known)}"
                )
        return replace(self, method=replace(self.method, **options))  # type: ignore[type-var]

    @property
    def reads_errors(self) -> bool:
        """Whether the allocator looks at what a size loses: costly methods are asked for it only then."""
        return self.allocate not in (allocate.uniform, allocate.fixed)

    def to_json(self) -> dict[str, Any]:
        body = {
            "name": self.name,
            "method": self.method.to_json(),
            "metric": {"kind": self.metric.kind, **vars(self.metric)},
            "allocate": getattr(self.allocate, "__name__", str(self.allocate)),
            "paper": self.paper,
        }
        return body if self.groups is None else body | {"groups": self.groups.to_json()}

    @classmethod
    def from_json(cls, data: Any) -> Recipe:
        """The recipe that `to_json` wrote. Raises ValueError for unknown kinds, options or allocators."""
        if not isinstance(data, Mapping) or not {"name", "method", "metric", "allocate"} <= set(data):
            raise ValueError(f"a recipe in JSON has 'name', 'method', 'metric' and 'allocate'; got {data!r}")
        rules = (allocate.uniform, allocate.fixed, allocate.energy, allocate.lagrangian, allocate.knapsack)
        allocators = {rule.__name__: rule for rule in rules}
        if not isinstance(data["allocate"], str) or data["allocate"] not in allocators:
            raise ValueError(f"Unknown allocator {data['allocate']!r}; known: {sorted(allocators)}")
        method = from_json(Method.kinds, "method", data["method"])
        metric = from_json(Calibration.kinds, "metric", data["metric"])
        return cls(
            str(data["name"]),
            method,
            metric,
            allocators[data["allocate"]],
            str(data.get("paper", "")),
            groups=Groups.from_json(data["groups"]) if "groups" in data else None,
        )
