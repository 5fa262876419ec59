"""The peak of live tensor bytes, counted exactly: storages that operators allocate, until they are freed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorBytes(TorchDispatchMode):
    """Bytes of the storages made inside the block and still alive (`live`), and the most there were (`peak`).

    `base` counts what was alive before. Python sees a storage when an operator returns it: scratch space
    inside one operator is not counted.
    """

    def __init__(self, base: int = 0) -> None:
        super().__init__()
        self.live = self.peak = base
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.follow(tensor.untyped_storage(), old)
        return result

    def follow(self, storage: Any, old: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in old:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.freed, key, size)

    def freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def peak_bytes(act: Callable[[], Any]) -> int:
    """The most bytes of tensors that `act` had alive at a time, beyond those that existed before."""
    with TensorBytes() as counted:
        act()
    return counted.peak
