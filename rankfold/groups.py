"""Groups: layers fitted as one matrix, which then hold one factor in common.

    [W₁; …; W_m] (Σ out, in) ≈ one structure, split by rows into m that share what does not depend on the row

What the layers lose is Σ gᵢ tr(Eᵢ Cᵢ Eᵢᵀ). A stack E has one right side only, so Cᵢ becomes C̄ = mean Cᵢ, and
every row keeps its own gᵢ: ‖E‖² = s Σ gᵢ tr(Eᵢ C̄ Eᵢᵀ), with s such that the weights have the energy that they
have layer by layer. It is exact where the Cᵢ are equal, as for layers that read the same input. [Basis
Sharing: arXiv 2410.03765]
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from rankfold.layers import Layer
from rankfold.method import Curve, Method, cost_of
from rankfold.metric import Metric
from rankfold.structure import Structure, build, is_size


@dataclass(frozen=True)
class Groups:
    """Which layers are fitted together.

    size     layers in a group: linear layers of one shape at neighbouring depths, whose names differ in the
             number of their block alone, in runs of `size`; the last run of a kind may be shorter
    private  globs of layers that are left to themselves
    members  the groups themselves, as tuples of layer names, instead of both; every other layer is private
    """

    size: int = 2
    private: tuple[str, ...] = ()
    members: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        if not is_size(self.size):
            raise ValueError(f"Groups(size={self.size!r}): the layers of a group, a positive integer")
        if isinstance(self.private, str) or not all(isinstance(glob, str) for glob in self.private):
            raise ValueError(f"Groups(private={self.private!r}): a tuple of globs, e.g. ('*.down_proj',)")
        if not all(
            isinstance(group, tuple | list) and all(isinstance(name, str) for name in group)
            for group in self.members
        ):
            raise ValueError(f"Groups(members={self.members!r}): tuples of layer names, one a group")
        if self.members and self.private:
            raise ValueError("Groups: with explicit members every other layer is private; leave private out")
        for group in self.members:
            if len(group) < 2:
                raise ValueError(f"Groups: a group has at least two layers; got {group}")
        names = [name for group in self.members for name in group]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"Groups: layer {twice[0]!r} is named twice; a layer belongs to one group")
        object.__setattr__(self, "private", tuple(self.private))
        object.__setattr__(self, "members", tuple(tuple(group) for group in self.members))

    def to_json(self) -> dict[str, Any]:
        members = [list(group) for group in self.members]
        return {"size": self.size, "private": list(self.private), "members": members}

    @classmethod
    def from_json(cls, data: Any) -> Groups:
        """The inverse of `to_json`. Raises ValueError for unknown or malformed fields."""
        known = {"size": int, "private": list, "members": list}
        if not isinstance(data, Mapping) or not set(data) <= set(known):
            raise ValueError(f"groups in JSON have {sorted(known)}; got {data!r}")
        for key, kind in known.items():
            if key in data and not isinstance(data[key], kind):
                raise ValueError(f"groups in JSON: {key!r} must be a {kind.__name__}; got {data[key]!r}")
        return cls(data.get("size", 2), tuple(data.get("private", ())), tuple(data.get("members", ())))

    def of(self, layers: Mapping[str, Layer]) -> list[list[str]]:
        """The groups of two or more among `layers`, in their order.

        Raises ValueError for explicit members that are unknown, look up rows, or do not fit each other.
        """
        if self.members:
            return [_checked(group, layers) for group in self.members]
        runs: dict[str, list[list[str]]] = {}
        like: dict[str, tuple[Any, ...]] = {}
        for name, layer in layers.items():
            if layer.host != "Linear" or any(fnmatchcase(name, glob) for glob in self.private):
                continue
            kind, looks = _kind(name), (layer.shape, layer.tensor.dtype, layer.tensor.device)
            kept = runs.setdefault(kind, [[]])
            if like.setdefault(kind, looks) != looks or len(kept[-1]) == self.size:
                kept.append([])
                like[kind] = looks
            kept[-1].append(name)
        return [run for kept in runs.values() for run in kept if len(run) > 1]


@dataclass(frozen=True, eq=False)
class Stack:
    """Layers seen as one matrix (Σ out, in), which is one item of the allocator. Most have a single layer."""

    layers: dict[str, Layer]

    def __str__(self) -> str:
        names = ", ".join(map(repr, self.layers))
        return f"layers {names}" if len(self.layers) > 1 else f"layer {names}"

    @property
    def rows(self) -> list[int]:
        return [layer.shape[0] for layer in self.layers.values()]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(self.rows), next(iter(self.layers.values())).shape[1]

    @property
    def device(self) -> torch.device:
        return next(iter(self.layers.values())).tensor.device

    def matrix(self) -> Tensor:
        """The weights below one another, detached; a single layer's own, uncopied."""
        parts = [layer.matrix() for layer in self.layers.values()]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def metric(self, metrics: Mapping[str, Metric]) -> Metric | None:
        """The stack's metric on the device of its weights; None where one of the layers has none.

        Raises ValueError where the layers' metrics have left matrices, or sides of different forms.
        """
        held = [metrics[name].to(self.device) for name in self.layers if name in metrics]
        if len(held) < len(self.layers):
            return None
        if len(held) == 1:
            return held[0]
        left, right = self._left([one.left for one in held]), self._right([one.right for one in held])
        whole = Metric(left, right)
        if all(one.right is held[0].right for one in held):
            return whole
        apart = math.fsum(
            one.error(layer.matrix()) for one, layer in zip(held, self.layers.values(), strict=True)
        )
        together = whole.error(self.matrix())
        if not (apart > 0 and together > 0):
            return whole
        scale = torch.tensor(apart / together, dtype=torch.float64, device=self.device)
        return Metric(scale if left is None else left * scale, right)

    def _left(self, sides: list[Tensor | None]) -> Tensor | None:
        given = [side for side in sides if side is not None]
        if not given:
            return None
        if any(side.dim() == 2 for side in given):
            raise ValueError(
                f"{self} form a group, but their metrics have matrices on the left, one for each layer's own "
                "outputs; fit them apart, or use a metric with one number a layer (activation with "
                "output='scalar')"
            )
        like = given[0]
        pairs = zip(sides, self.rows, strict=True)
        return torch.cat([like.new_ones(n) if side is None else side.expand(n) for side, n in pairs])

    def _right(self, sides: list[Tensor | None]) -> Tensor | None:
        first, *rest = sides
        if all(side is first for side in rest):
            return first
        forms = {None if side is None else tuple(side.shape) for side in sides}
        if first is None or len(forms) > 1:
            raise ValueError(f"{self} form a group, but their metrics' right sides have the forms {forms}")
        mean = first.clone()
        for side in rest:
            assert side is not None
            mean += side
        return mean.div_(len(sides))

    def dense(self, unit: str) -> int:
        """What the layers cost as they are."""
        tensors = [layer.tensor for layer in self.layers.values()]
        return sum(tensor.numel() * (tensor.element_size() if unit == "nbytes" else 1) for tensor in tensors)

    def cost(self, structure: Structure, unit: str) -> int:
        """What a structure of the stack costs once it is split: what the parts share is stored once, and
        multiplied by each. Raises ValueError for a structure that does not split."""
        if len(self.layers) == 1:
            return cost_of(structure, unit)
        if type(structure).split is Structure.split:
            try:
                structure.split(self.rows)
            except ValueError as error:
                raise ValueError(f"{self} form a group, but {error}") from None
        # The parts have the spec of the whole, but for the shape; what has the same size in both is shared.
        dtype, columns = structure.dtype, structure.shape[1]
        sizes = {rows: {**structure.spec(), "shape": [rows, columns]} for rows in self.rows}
        parts = {rows: build(spec, dtype=dtype, device="meta") for rows, spec in sizes.items()}
        total = sum(cost_of(parts[rows], unit) for rows in self.rows)
        if unit == "macs":
            return total
        whole = {key: parameter.shape for key, parameter in structure.named_parameters()}
        once = sum(
            parameter.numel() * (parameter.element_size() if unit == "nbytes" else 1)
            for key, parameter in parts[self.rows[0]].named_parameters()
            if parameter.shape == whole[key]
        )
        return total - (len(self.layers) - 1) * once

    def costs(self, method: Method, unit: str) -> list[int]:
        """What each size of the menu costs, dense last: known before any data is seen. Raises ValueError
        naming the layers where the method cannot take their shape."""
        dtype = next(iter(self.layers.values())).tensor.dtype
        try:
            menu = method.menu(self.shape)
        except ValueError as error:
            raise ValueError(f"{self}: {error}") from error
        sizes = [self.cost(method.empty(self.shape, size, dtype), unit) for size in menu]
        return [*sizes, self.dense(unit)]

    def priced(self, curve: Curve, method: Method, unit: str) -> Curve:
        """A curve of the stacked matrix with what its sizes really cost, and only those that save
        something."""
        if len(self.layers) == 1:
            return curve
        costs = self.costs(method, unit)
        kept = [i for i, cost in enumerate(costs) if cost < costs[-1]] + [len(costs) - 1]
        return replace(
            curve,
            sizes=tuple(curve.sizes[i] for i in kept),
            costs=tuple(costs[i] for i in kept),
            errors=tuple(curve.errors[i] for i in kept),
        )

    def split(self, structure: Structure) -> dict[str, Structure]:
        """The structure of each layer: parts of one fitted to the stack, which hold its shared parameters as
        the same objects."""
        parts = structure.split(self.rows) if len(self.layers) > 1 else [structure]
        assert [part.shape for part in parts] == [layer.shape for layer in self.layers.values()]
        pairs = zip(self.layers.items(), parts, strict=True)
        return {name: layer.join(part) for (name, layer), part in pairs}


def stacks(
    groups: Groups | None, layers: Mapping[str, Layer], ties: Mapping[int, list[str]]
) -> dict[str, Stack]:
    """The items that `factorize_` fits one by one, by name, in the order of their first layers.

    `ties` are the layers that share a parameter (`rankfold.factorize.tied`): the last of each stands for all,
    and a layer that is tied to others joins no group. Raises ValueError for explicit members that do not fit.
    """
    heads = {names[-1]: layers[names[-1]] for names in ties.values()}
    free = {names[-1]: heads[names[-1]] for names in ties.values() if len(names) == 1}
    if groups is not None:
        for name in (name for group in groups.members for name in group):
            if name in layers and name not in free:
                others = next(names for names in ties.values() if name in names)
                raise ValueError(
                    f"Groups: {name!r} shares its whole weight with "
                    f"{[other for other in others if other != name]}, so it belongs to no group"
                )
    found = {group[0]: group for group in (groups.of(free) if groups is not None else [])}
    inside = {name for group in found.values() for name in group[1:]}
    items: dict[str, Stack] = {}
    for name in heads:
        if name not in inside:
            names = found.get(name, [name])
            items[" + ".join(names)] = Stack({member: heads[member] for member in names})
    return items


def _kind(name: str) -> str:
    """A layer's name without its first number: what layers of one kind in different blocks have in common."""
    parts = name.split(".")
    block = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return name if block is None else ".".join([*parts[:block], "*", *parts[block + 1 :]])


def _checked(group: tuple[str, ...], layers: Mapping[str, Layer]) -> list[str]:
    for name in group:
        if name not in layers:
            close = difflib.get_close_matches(name, layers, n=2)
            hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise ValueError(f"Groups: {name!r} is not one of the selected layers.{hint}")
        if layers[name].lookup:
            raise ValueError(f"Groups: {name!r} is an embedding, whose rows are looked up; it joins no group")
    first, *rest = group
    for name in rest:
        one, two = layers[first], layers[name]
        if one.shape[1] != two.shape[1]:
            raise ValueError(
                f"Groups: {first!r} has shape {one.shape} and {name!r} {two.shape}; layers of one group have "
                "the same number of inputs"
            )
        looks = [(str(layer.tensor.dtype), str(layer.tensor.device)) for layer in (one, two)]
        if looks[0] != looks[1]:
            raise ValueError(
                f"Groups: {first!r} is {looks[0]} and {name!r} {looks[1]}; layers of one group hold one "
                "tensor"
            )
    # In the order of the model, so that the first layer of a group is the one that a checkpoint names.
    return [name for name in layers if name in group]
