"""How large a model is: bytes in its files, numbers it trains, multiply-adds it needs.

Bytes are read from what was written, never inferred from shapes: indices, scales and biases count, a tensor
that two layers share counts once. Multiply-adds are those of weight matrices; a lookup in an embedding costs
none, one in a factored embedding costs its product.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rankfold.generate import accepts, device_of, evaluating
from rankfold.hosts import Conv2d, Embedding, Linear, is_conv1d, pad
from rankfold.structure import Structure

MAX_HEADER = 100 * 2**20  # bytes: the safetensors format's own limit


def bytes_on_disk(folder: str | Path) -> dict[str, Any]:
    """What a checkpoint folder stores, read from the safetensors headers (no tensor is loaded).

    {"payload": bytes of tensors, "tensors": {name: bytes}, "files": {name: bytes}} over `model.safetensors`,
    or the shards its index names, or every safetensors file. ValueError for none, a missing shard, or a
    damaged header.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        paths = [folder / "model.safetensors"]
    elif index.exists():
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        paths = [folder / name for name in sorted(set(shards))]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"{folder} holds no safetensors file")
    tensors: dict[str, int] = {}
    for path in paths:
        if not path.exists():
            raise ValueError(f"{index.name} names {path.name}, which is missing from {folder}")
        tensors |= _header(path)
    return {
        "payload": sum(tensors.values()),
        "tensors": tensors,
        "files": {p.name: p.stat().st_size for p in paths},
    }


def _header(path: Path) -> dict[str, int]:
    """{tensor: bytes}: eight bytes of little-endian length, then JSON with the byte range of every tensor."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise ValueError(f"{path.name} is damaged: a header of {length} bytes in a file of {size}")
        try:
            header = json.loads(file.read(length))
            ranges = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
            stored = {name: int(end) - int(begin) for name, (begin, end) in ranges.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path.name} is damaged: its header is not that of safetensors ({error})"
            ) from None
    if sum(stored.values()) != size - 8 - length or any(value < 0 for value in stored.values()):
        raise ValueError(
            f"{path.name} is damaged: {sum(stored.values())} bytes named, {size - 8 - length} stored"
        )
    return stored


def params(model: nn.Module) -> int:
    """Parameters (numbers), each once however many modules hold it, also where two parameters view one
    storage."""
    seen = {}
    for tensor in model.parameters():
        real = tensor.device.type != "meta" and tensor.numel() > 0
        where = (
            (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if real else id(tensor)
        )
        seen[where] = tensor.numel()
    return sum(seen.values())


def macs_per_token(model: nn.Module, example: Tensor | Mapping[str, Any] | None = None) -> int:
    """Multiply-adds of the weight matrices: structures, `nn.Linear`, `Conv1D`, convolutions.

    Without an example: for one token through every matrix once. With one (ids (B, T) or the model's inputs by
    name): counted at the calls that the example makes, so that convolutions (whose cost needs the image) and
    routed experts are right; divided by the tokens of an integer example, by the batch of any other.
    Attention scores, norms, recurrent cells and bare stacks of experts are not counted. ValueError for a
    convolution without an example.
    """
    if example is None:
        costs = [_row_macs(module) for module in _counted(model) if not _is_conv(module)]
        if any(_is_conv(module) for module in _counted(model)):
            raise ValueError("a convolution's multiply-adds depend on its input: pass example=")
        return sum(costs)
    total = 0

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        nonlocal total
        x = args[0] if args else next(iter(kwargs.values()))
        total += _call_macs(module, x, output)

    handles = [module.register_forward_hook(count, with_kwargs=True) for module in _counted(model)]
    given = dict(example) if isinstance(example, Mapping) else {"": example}
    given = {k: v.to(device_of(model)) if isinstance(v, Tensor) else v for k, v in given.items()}
    first = given.get("input_ids", next(iter(given.values())))
    options: dict[str, Any] = {"use_cache": False} if accepts(model, "use_cache") else {}
    try:
        with evaluating(model):
            model(*given.values(), **options) if "" in given else model(**given, **options)
    finally:
        for handle in handles:
            handle.remove()
    return round(total / (len(first) if first.is_floating_point() else first.numel()))


def _counted(model: nn.Module) -> list[nn.Module]:
    """The modules that own a matrix; the factors inside a structure belong to its host."""
    inside = {id(m) for s in model.modules() if isinstance(s, Structure) for m in s.modules()}
    kinds = (Linear, Conv2d, Embedding, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [m for m in model.modules() if id(m) not in inside and (isinstance(m, kinds) or is_conv1d(m))]


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, Conv2d | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _row_macs(module: Any) -> int:
    """Multiply-adds for one input row, one output position or one looked-up row."""
    if isinstance(module, Embedding):
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            module.weight.rows(torch.zeros(1, dtype=torch.long, device=module.weight.device))
        return flops.get_total_flops() // 2
    return module.weight.macs if isinstance(module.weight, Structure) else module.weight.numel()


def _call_macs(module: Any, x: Tensor, output: Tensor) -> int:
    """Multiply-adds of one call, on input x."""
    if isinstance(module, Embedding):
        return _row_macs(module) * x.numel()
    if isinstance(module, Conv2d) and module.spatial:
        lines, factors = len(x) * output.shape[-2], module.weight.factors()
        if factors is not None and len(factors) > 1:  # the last filters run at the output's width
            last, *rest = (factor.numel() for factor in factors)
            return lines * (sum(rest) * x.shape[-1] + last * output.shape[-1])
        # Any other matrix meets every padded column of every output line.
        return _row_macs(module) * lines * pad(x[:1, :1], module.geometry).shape[-1]
    positions = module.out_channels if _is_conv(module) else output.shape[-1]
    return _row_macs(module) * (output.numel() // positions)
