"""What a structured matrix is.

A structure is a matrix W (out, in) stored as something smaller, and applied without being rebuilt: y = x Wᵀ.

    The law: a structure is its spec (small JSON) plus its state dict, and nothing else.

`build(s.spec())` followed by `load_state_dict(s.state_dict())` is the identity. Saving, reloading on the meta
device, knowing the cost before fitting and diffs between models all follow from that one sentence.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

MAX_SIDE = 2**31 - 1  # indices are int32 in memory; a larger side is a damaged spec, not a matrix


class Structure(nn.Module, ABC):
    """A matrix W of shape (out, in) in factored form. Subclass it as `class LowRank(Structure,
    kind="low_rank")`.

    A concrete class is final. Its constructor takes `(shape, *, <sizes>, dtype=None, device=None)` where the
    sizes are JSON values, and it implements `forward`, `rows`, `macs` and `sizes`. Everything else is
    derived. Parameters and persistent buffers hold the whole state: no non-persistent buffers, since
    checkpoints are rebuilt on the meta device.
    """

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Structure]]] = {}

    def __init_subclass__(cls, kind: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind is not None:
            known = Structure.kinds.get(kind)
            if (
                known is not None
                and f"{known.__module__}.{known.__qualname__}" != f"{cls.__module__}.{cls.__qualname__}"
            ):
                raise ValueError(
                    f"structure kind {kind!r} is already taken by {known.__module__}.{known.__qualname__}"
                )
            cls.kind = kind
            Structure.kinds[kind] = cls

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape: tuple[int, int] = check_shape(shape)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ for x of shape (..., in); returns (..., out)."""

    @abstractmethod
    def rows(self, index: Tensor) -> Tensor:
        """W[index] for an integer tensor of any shape; returns (*index.shape, in). An embedding is this
        lookup."""

    @property
    @abstractmethod
    def macs(self) -> int:
        """Multiply-adds to apply W to one input row."""

    @abstractmethod
    def sizes(self) -> dict[str, Any]:
        """The JSON values that, with the shape, rebuild an empty copy."""

    def factors(self) -> tuple[Tensor, ...] | None:
        """The dense matrices whose product is W, the first-applied last, or None where W is not a plain
        product."""
        return None

    def split(self, rows: Sequence[int]) -> list[Structure]:
        """Structures of W's consecutive rows, `rows[i]` of them each, that share what does not depend on the
        row: layers fitted as one stack share a factor. Raises ValueError for a kind that does not split."""
        raise ValueError(f"a structure of kind {self.kind!r} does not split by rows")

    def validate(self) -> None:
        """Raise ValueError where what was loaded cannot be this structure, e.g. an index out of range."""

    def spec(self) -> dict[str, Any]:
        """Small JSON from which `build` makes an empty copy of the same kind, shape and sizes."""
        return {"kind": self.kind, "shape": list(self.shape), **self.sizes()}

    def to_dense(self) -> Tensor:
        """W as an ordinary tensor (out, in), in the structure's own dtype."""
        return self.rows(torch.arange(self.shape[0], device=self.device))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Some models read a layer's weight and never call the layer: torch then gets W rebuilt. Right, not
        fast."""

        def rebuilt(value: Any) -> Any:
            return value.to_dense() if isinstance(value, Structure) else value

        return func(*tree_map(rebuilt, tuple(args)), **tree_map(rebuilt, kwargs or {}))

    @property
    def params(self) -> int:
        """Stored numbers that training can change (indices are not parameters)."""
        return sum(p.numel() for p in self.parameters())

    @property
    def nbytes(self) -> int:
        """Stored bytes, indices included: what the safetensors payload of this structure measures."""
        return sum(t.numel() * t.element_size() for t in (*self.parameters(), *self.buffers()))

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def extra_repr(self) -> str:
        sizes = ", ".join(
            f"{key}={value}" for key, value in self.sizes().items() if not isinstance(value, list)
        )
        return f"shape={self.shape}" + (f", {sizes}" if sizes else "")


def check_shape(shape: Any) -> tuple[int, int]:
    """`shape` as two positive ints. Raises ValueError otherwise."""
    good = isinstance(shape, tuple | list) and len(shape) == 2 and all(is_size(side) for side in shape)
    if not good:
        raise ValueError(
            f"a structure's shape is (out, in), two integers between 1 and {MAX_SIDE}; got {shape!r}"
        )
    return int(shape[0]), int(shape[1])


def check_size(name: str, value: Any, largest: int) -> int:
    """`value` as an int with 1 <= value <= largest. Raises ValueError naming the size and both numbers
    otherwise."""
    if not is_size(value) or value > largest:
        raise ValueError(f"{name}={value!r} must be an integer between 1 and {largest}")
    return int(value)


def is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_SIDE


def build(
    spec: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Structure:
    """An unfilled structure from its spec; the inverse of `.spec()`. On device "meta" this costs nothing.

    Raises ValueError for an unknown kind, missing or unknown sizes, sizes that are negative or absurd, and
    specs nested beyond reason: a spec read from a file is untrusted, and nothing is allocated before it has
    been checked.
    """
    try:
        return _build(spec, dtype, device)
    except RecursionError:
        raise ValueError("a structure's spec is nested too deeply to be one") from None


def _build(
    spec: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device | str | None
) -> Structure:
    if not isinstance(spec, Mapping) or "kind" not in spec:
        raise ValueError(f"a structure's spec is an object with 'kind' and 'shape'; got {spec!r}")
    kind = spec["kind"]
    if isinstance(kind, str) and kind not in Structure.kinds:
        import_extensions()
    if not isinstance(kind, str) or kind not in Structure.kinds:
        raise ValueError(
            f"Unknown structure {kind!r}; known: {sorted(Structure.kinds)}. "
            "Import the package that defines it before loading, or install a newer rankfold."
        )
    cls = Structure.kinds[kind]
    arguments = {key: value for key, value in spec.items() if key != "kind"}
    try:
        inspect.signature(cls).bind(**arguments, dtype=dtype, device=device)
    except TypeError as error:
        raise ValueError(
            f"the spec of structure {kind!r} does not fit it: {error}; spec {dict(spec)!r}"
        ) from None
    construct: Any = cls
    return construct(**arguments, dtype=dtype, device=device)


def import_extensions() -> None:
    """Import every installed package that offers recipes, so that the structures and methods it defines are
    known."""
    from importlib.metadata import entry_points

    for entry in entry_points(group="rankfold.recipes"):
        entry.load()
