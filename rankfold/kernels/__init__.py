"""Fast products with sparse codes, each tested against its naive twin in `rankfold.kernels.reference`.

A kernel that cannot be had (no compiler, no GPU, another dtype) is no error: `takes` says so, `why_not` says
why, and the caller goes the naive way. The environment variable RANKFOLD_KERNELS=0 switches all of them off.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from rankfold.kernels import cpu, reference

# Tokens up to which a kernel is faster than codes rebuilt for a dense product: measured on a CPU with AVX-512
# (benchmarks/codes.py), a guess on a GPU.
MOST_TOKENS = {("cpu", torch.float32): 32, ("cpu", torch.bfloat16): 16}
MOST_ON_GPU = 16
FUSED_TOKENS = 8  # up to here the CPU kernel also multiplies with the dictionary faster than torch does
HALVES = (torch.float32, torch.bfloat16, torch.float16)

_gpu_failure: str | None = None  # why the GPU kernel is not used any more


def takes(tokens: int, dtype: torch.dtype, stored: torch.dtype, device: torch.device) -> bool:
    """Whether a kernel multiplies `tokens` inputs of `dtype` with values of dtype `stored` on `device`."""
    if device.type == "cpu":
        fits = stored in cpu.TYPES and 0 < tokens <= MOST_TOKENS.get(("cpu", dtype), 0)
    else:
        fits = dtype in HALVES and stored in HALVES and 0 < tokens <= MOST_ON_GPU
    return fits and why_not(device) is None


def why_not(device: torch.device) -> str | None:
    """Why there is no kernel on `device`, in words; None where there is one. May compile the CPU kernels."""
    if os.environ.get("RANKFOLD_KERNELS", "1") == "0":
        return "RANKFOLD_KERNELS=0"
    if device.type == "cpu":
        return cpu.why_not()
    if device.type != "cuda":
        return f"there is none for devices of type {device.type!r}"
    if _gpu_failure is None and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.are_deterministic_algorithms_enabled():
        return "its sums are not deterministic, and torch is asked to be"
    return _gpu_failure


def product(
    x: Tensor,
    values: Tensor,
    support: Tensor,
    packing: str,
    layout: Sequence[int],
    transposed: bool,
    dictionary: Tensor | None = None,
) -> Tensor | None:
    """C x or Cᵀ x for x (tokens, ·); on a CPU, with a dictionary, C D x or Dᵀ Cᵀ x (see `cpu.product`).

    None where a GPU kernel fails: it is then not tried again, and `why_not` tells.
    """
    global _gpu_failure
    if x.device.type == "cpu":
        return cpu.product(x, values, support, packing, layout, transposed, dictionary)
    try:
        from rankfold.kernels import triton_codes

        return triton_codes.product(x, values, support, packing, layout, transposed)
    except Exception as error:  # a compiler's, a driver's: a forward must not fail for want of a kernel
        _gpu_failure = f"{type(error).__name__}: {error}"
        return None


def dense_rows(values: Tensor, support: Tensor, packing: str, layout: Sequence[int], piece: slice) -> Tensor:
    """Some rows of C as `reference.dense_rows` gives them."""
    if values.device.type != "cpu" or why_not(values.device) is not None:
        return reference.dense_rows(values, support, packing, layout, piece)
    dense = values.new_empty(piece.stop - piece.start, layout[1] * layout[2])
    cpu.convert(values.contiguous(), dense, support, packing, layout, piece)
    return dense


def entries_of(
    values: Tensor, dense: Tensor, support: Tensor, packing: str, layout: Sequence[int], piece: slice
) -> None:
    """The entries of dense rows, as `reference.entries_of` takes them."""
    if values.device.type != "cpu" or why_not(values.device) is not None:
        reference.entries_of(values, dense, support, packing, layout, piece)
    else:
        cpu.convert(values, dense.contiguous(), support, packing, layout, piece, back=True)
