"""Store the values of sparse codes in fewer bits, after a model has been factorized (and tuned).

A value is one number out of a few hundred in its row, and tolerates 14 or 8 bits far better than a weight
does. The dictionary, which every row shares, stays as it is. `Dictionary(storage=…)` counts the same form in
its budget from the start; this is for models that exist already.
"""

from __future__ import annotations

from torch import nn

from rankfold.hosts import hosts
from rankfold.manifest import recipe_of, stamp_
from rankfold.sparse_code import STORAGES, SparseCode


def store_values_(model: nn.Module, storage: str) -> tuple[int, int]:
    """Store the values of every `SparseCode` of `model` as "float", "bf14" or "int8", in place.

    Returns the stored bytes of these structures before and after; a dictionary that several share counts
    once. Values no longer train in a packed form; back in "float" they do, as rounded. Raises ValueError for
    an unknown form and for a model without sparse codes; the model is then unchanged.
    """
    if storage not in STORAGES:
        raise ValueError(f"storage={storage!r} must be one of {STORAGES}")
    held = {name: host for name, host in hosts(model).items() if isinstance(host.weight, SparseCode)}
    if not held:
        raise ValueError(f"{type(model).__name__} has no sparse codes: factorize it first, e.g. by `cospadi`")
    old = {id(host.weight): host.weight for host in held.values()}
    new = {key: weight.with_storage(storage) for key, weight in old.items() if isinstance(weight, SparseCode)}
    for host in held.values():
        host.weight = new[id(host.weight)]
    stamp_(model, recipe_of(model))
    return _bytes(list(old.values())), _bytes(list(new.values()))


def _bytes(structures: list[nn.Module] | list[SparseCode]) -> int:
    tensors = {id(t): t for s in structures for t in (*s.parameters(), *s.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
