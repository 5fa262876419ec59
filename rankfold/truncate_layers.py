"""Trained rank pruning, layer by layer: the leading singular terms, the cost at a rank, the two factors.

spatial  r·C·kh·H'·W + r·N·kw·H'·W'        kh x 1 filters with the vertical stride, then 1 x kw filters
channel  r·(C·kh·kw + N)·H'·W'             kh x kw filters with both strides, then 1 x 1 filters
dense    N·C·kh·kw·H'·W'                   multiply-adds of one image, of kernel (N, C, kh, kw)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankfold.batches import Batch, call
from rankfold.layers import Layer
from rankfold.structures import LowRank


class Terms(NamedTuple):
    """The leading terms of an SVD: left (out, k), sigma (k,) descending, right (k, in)."""

    left: Tensor
    sigma: Tensor
    right: Tensor


def kept(sigma: Tensor, e: float) -> int:
    """The least number of the leading `sigma` (n,), descending, that keep 1 - e of Σ σ²; at least 1. One
    synchronisation with the device. 0 where the sum is not finite."""
    energy = sigma.double().square().cumsum(0) if sigma.device.type == "cpu" else sigma.square().cumsum(0)
    count = (energy < (1 - e) * energy[-1]).sum() + 1
    return int(torch.where(energy[-1].isfinite(), count.clamp_max(len(sigma)), 0))


def truncated(matrix: Tensor, e: float, least: float | None = None) -> Terms:
    """The leading terms of a matrix (out, in): those that keep 1 - e of its energy, or with `least` those
    whose σ is at least that, and one at any rate. In float64 on the CPU, float32 elsewhere.

    Raises torch.linalg.LinAlgError where the SVD fails, or the matrix is not finite."""
    matrix = matrix.double() if matrix.device.type == "cpu" else matrix.float()
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = kept(sigma, e)
    if rank == 0:
        raise torch.linalg.LinAlgError("its entries or their squares are not finite")
    if least is not None:
        rank = max(1, int((sigma >= least).sum()))
    return Terms(u[:, :rank], sigma[:rank], vh[:rank])


def macs(layer: Layer, rank: int | None, at: tuple[int, int] | None = None) -> int:
    """Multiply-adds of a layer, dense (rank None) or at a rank, for one image or row; bias not counted.

    at  (H'·W', H'·W): output positions, and output lines times columns of the *input*, along which the
        kh x 1 filters of the spatial scheme run. None: one output position, of an input of stride columns
    """
    out, inner = layer.shape
    module = layer.module
    after, before = at or (1, module.stride[1] if isinstance(module, nn.Conv2d) else 1)
    if rank is None:
        return layer.tensor.numel() * after
    return rank * (inner * (before if layer.spatial else after) + out * after)


def traced(model: nn.Module, layers: Mapping[str, Layer], example: Batch) -> dict[str, tuple[int, int]]:
    """{layer: (H'·W', H'·W)} summed over its calls, of the layers that run on an example; in eval mode."""
    seen: dict[str, tuple[int, int]] = {}

    def note(name: str, inputs: tuple[Any, ...], options: dict[str, Any], y: Tensor) -> None:
        x = inputs[0] if inputs else next(iter(options.values()))
        conv = isinstance(layers[name].module, nn.Conv2d)
        after = y.shape[-2] * y.shape[-1] if conv else y.numel() // y.shape[-1]
        before = y.shape[-2] * x.shape[-1] if conv else after
        had = seen.get(name, (0, 0))
        seen[name] = (had[0] + after, had[1] + before)

    handles = [
        layer.module.register_forward_hook(lambda _, *facts, name=name: note(name, *facts), with_kwargs=True)
        for name, layer in layers.items()
    ]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        call(model, example)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return seen


def large(layer: Layer) -> bool:
    return isinstance(layer.module, nn.Conv2d) and math.prod(layer.module.kernel_size) > 1


def wide(layer: Layer) -> bool:
    """Whether the spatial reading is another one than the channel reading."""
    return isinstance(layer.module, nn.Conv2d) and layer.module.kernel_size[1] > 1


def product(terms: Terms) -> Tensor:
    with torch.autocast(terms.left.device.type, enabled=False):
        return (terms.left * terms.sigma) @ terms.right


def factors(layer: Layer, terms: Terms) -> LowRank:
    """σ goes into the second of the two spatial filters, else by its root to each side, as in the authors'
    code; in the weight's dtype."""
    left, sigma, right = terms
    ahead = torch.ones_like(sigma) if layer.spatial else sigma.sqrt()
    behind = sigma if layer.spatial else ahead
    dtype = layer.tensor.dtype
    return LowRank.of((left * behind).to(dtype), (right * ahead[:, None]).to(dtype))


def sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, whose module is slow to import


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if sharded(tensor) else tensor


def stored(layer: Layer, matrix: Tensor) -> Tensor:
    """A matrix (out, in) as the layer's weight is stored: its layout, dtype, and shards."""
    weight: Any = layer.tensor
    tensor = layer.laid(matrix).to(weight.dtype)
    if not sharded(weight):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.contiguous(), weight.device_mesh, weight.placements)


def write_(layer: Layer, matrix: Tensor) -> None:
    layer.tensor.copy_(stored(layer, matrix))
