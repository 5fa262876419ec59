"""What training holds in memory, tensor by tensor, and what the dense model would hold beside it.

    weights + gradients + optimizer state + indices          in bytes; activations are not in it

Counted from the tensors themselves, those inside of 8-bit states too. The largest resident size of the
process is measured and stands beside: it holds activations, libraries and everything else.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def accounting(model: nn.Module, optimizer: Optimizer, per_layer: bool) -> dict[str, int]:
    """Bytes of what a step holds beside activations: after the first step, when the state is there.

    gradients  all at once; with `per_layer` those of the largest parameter alone
    indices    integer buffers: places of sparse entries
    """
    weights = {id(p): _bytes(p) for p in model.parameters()}
    trained = [_bytes(p) for p in model.parameters() if p.requires_grad]
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    state = [t for values in inner.state.values() for t in _tensors(list(values.values()))]
    buffers = {id(b): b for b in model.buffers()}.values()
    found = {
        "weights": sum(weights.values()),
        "gradients": max(trained, default=0) if per_layer else sum(trained),
        "optimizer": sum(_bytes(t) for t in state),
        "indices": sum(_bytes(b) for b in buffers if not b.is_floating_point() and b.dim()),
    }
    return found | {"total": sum(found.values())}


def dense_accounting(sizes: Sequence[int], optimizer: str, per_layer: bool) -> dict[str, int]:
    """The same, worked out for a dense float32 model with parameters of these numbers of entries.

    Two float32 moments an entry. In 8 bits each moment takes a byte an entry, a float32 for every block of
    256, and a table of 1024 bytes, where torchao stores it so: at least 4096 entries, in whole blocks.
    """
    small = optimizer == "adamw_8bit"
    state = sum(2 * (n + n // 64 + 1024) if small and n >= 4096 and n % 256 == 0 else 8 * n for n in sizes)
    found = {
        "weights": 4 * sum(sizes),
        "gradients": 4 * (max(sizes) if per_layer else sum(sizes)),
        "optimizer": state,
        "indices": 0,
    }
    return found | {"total": sum(found.values())}


def peak() -> dict[str, int]:
    """Bytes: the largest resident size of this process so far, and of an accelerator's memory if there is
    one."""
    found: dict[str, int] = {}
    try:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        found["resident"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    except ImportError:  # not on Windows
        pass
    if torch.cuda.is_available():
        found["device"] = torch.cuda.max_memory_allocated()
    return found


def _tensors(items: list[Any]) -> Iterator[Tensor]:
    for item in items:
        inner = getattr(item, "__tensor_flatten__", None)
        if inner is not None and isinstance(item, Tensor):  # 8-bit states are codes and scales
            yield from _tensors([getattr(item, name) for name in inner()[0]])
        elif isinstance(item, Tensor) and item.dim():
            yield item


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
