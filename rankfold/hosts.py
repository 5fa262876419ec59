"""Hosts: the three modules in which a structured matrix does a layer's work.

A structure is only a matrix. `Linear`, `Conv2d` and `Embedding` own what a matrix has not: bias, unfolding,
gathering. The structure sits where the weight sat, so the keys of a checkpoint are `<layer>.weight.<...>` and
`<layer>.bias`. Code that only asks a layer for `weight.dtype`, `.device` or `.shape` is answered by the
structure.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.sparse import plain
from rankfold.structure import Structure
from rankfold.structures import Dense, Sum


class Linear(nn.Module):
    """y = x Wᵀ + b with W a structure (out, in). Stands in for `nn.Linear` and, with `transposed`, for the
    `Conv1D` of transformers, whose dense weight is stored (in, out)."""

    bias: nn.Parameter | None

    def __init__(
        self,
        weight: Structure,
        bias: nn.Parameter | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.out_features, self.in_features = weight.shape
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if (base := _adapted_dense(weight)) is not None:
            return weight.beside(x, self._as_before(x, base))  # type: ignore[operator]
        y = weight(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _as_before(self, x: Tensor, base: Tensor) -> Tensor:
        """What the dense layer computed, bit for bit: a bias that is added afterwards rounds otherwise. (Of a
        single row Conv1D's other layout is multiplied in another order, and may differ by rounding.)"""
        if not self.transposed:
            return F.linear(x, base, self.bias)
        y = x.reshape(-1, self.in_features)
        y = y @ base.mT if self.bias is None else torch.addmm(self.bias, y, base.mT)
        return y.view(*x.shape[:-1], self.out_features)

    def to_dense(self) -> nn.Module:
        """The ordinary layer with the same function: `nn.Linear`, or transformers' `Conv1D`."""
        full = self.weight.to_dense()
        if self.transposed:
            conv1d = _conv1d()
            assert conv1d is not None
            dense, full = (
                conv1d(self.out_features, self.in_features),
                full.mT.contiguous(),
            )
        else:
            dense = nn.Linear(
                self.in_features,
                self.out_features,
                bias=self.bias is not None,
                device="meta",
            )
        return _refill(dense, full, self.bias, self.training)


class Conv2d(nn.Module):
    """A convolution whose kernel (out, in, kh, kw) is a structured matrix, in one of two readings that its
    shape tells apart.

    channel  W (out, in·kh·kw): patches are rows; of rank r it is r filters of kh x kw, then a 1 x 1
             convolution
    spatial  W (out·kw, in·kh): vertical patches are rows, then kw shifts are added; of rank r it is r filters
             of kh x 1, then out filters of 1 x kw [Jaderberg et al. 2014; TRP]

    One group only. Input (N, in, H, W), output (N, out, H', W').
    """

    bias: nn.Parameter | None

    def __init__(self, weight: Structure, bias: nn.Parameter | None, like: Mapping[str, Any]) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.geometry = {key: like[key] for key in GEOMETRY}
        self.in_channels, self.out_channels = (
            int(like["in_channels"]),
            int(like["out_channels"]),
        )
        for key, value in self.geometry.items():
            setattr(self, key, value)
        kh, kw = self.geometry["kernel_size"]
        channel = (self.out_channels, self.in_channels * kh * kw)
        spatial = (self.out_channels * kw, self.in_channels * kh)
        if weight.shape not in (channel, spatial):
            raise ValueError(
                f"a structure of shape {weight.shape} fits a convolution as {channel} or {spatial}"
            )
        self.spatial = weight.shape != channel

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if not (isinstance(weight, Sum) and weight.frozen):
            y = self._convolve(weight, x)
            return y if self.bias is None else y + self.bias.view(-1, 1, 1).to(y.dtype)
        base = _adapted_dense(weight)
        if base is not None:  # as nn.Conv2d does it, bit for bit
            zeros = self.geometry["padding_mode"] == "zeros"
            options = {key: self.geometry[key] for key in ("stride", "dilation")}
            options["padding"] = self.geometry["padding"] if zeros else 0
            y = F.conv2d(x if zeros else pad(x, self.geometry), self._kernel(base), self.bias, **options)
        else:
            y = self._convolve(weight.base, x)
            y = y if self.bias is None else y + self.bias.view(-1, 1, 1).to(y.dtype)
        for term in weight.added:
            y = y + self._convolve(term, x.to(term.dtype)).to(y.dtype)
        return y

    def _kernel(self, matrix: Tensor) -> Tensor:
        """A matrix of the reading as a kernel (out, in, kh, kw)."""
        kh, kw = self.geometry["kernel_size"]
        if self.spatial:
            matrix = matrix.view(self.out_channels, kw, self.in_channels, kh).permute(0, 2, 3, 1).contiguous()
        return matrix.view(self.out_channels, self.in_channels, kh, kw)

    def _convolve(self, matrix: Structure, x: Tensor) -> Tensor:
        """The convolution with a structured kernel, without the bias."""
        factors = matrix.factors()
        if self.spatial and factors and len(factors) > 1:
            return self._separable(x, factors)
        x = pad(x, self.geometry)
        kh, kw = self.geometry["kernel_size"]
        (sh, sw), (dh, dw) = self.geometry["stride"], self.geometry["dilation"]
        if factors and not self.spatial:  # convolve with the first factor; the others mix channels
            first = factors[-1].view(-1, self.in_channels, kh, kw)
            y = F.conv2d(x, first, stride=(sh, sw), dilation=(dh, dw))
            for factor in factors[-2::-1]:
                y = F.conv2d(y, factor[:, :, None, None])
        elif self.spatial:
            y = _matrix_over(matrix, x, (kh, 1), (sh, 1), (dh, 1))
            # y is z (N, out·kw, H', padded W); output[o, h, w] = Σⱼ z[(o, j), h, w·stride + j·dilation]
            z = y.unflatten(1, (self.out_channels, kw))
            width = (z.shape[-1] - dw * (kw - 1) - 1) // sw + 1
            y = sum(z[:, :, j, :, j * dw : j * dw + (width - 1) * sw + 1 : sw] for j in range(kw))
            assert isinstance(y, Tensor)
        else:
            y = _matrix_over(matrix, x, (kh, kw), (sh, sw), (dh, dw))
        return y

    def _separable(self, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        """kh x 1 filters, 1 x 1 ones, then 1 x kw filters. Columns are padded in between: padding them
        commutes with vertical filters, which then never run over the padding."""
        kh, kw = self.geometry["kernel_size"]
        (sh, sw), (dh, dw) = self.geometry["stride"], self.geometry["dilation"]
        first = factors[-1].view(-1, self.in_channels, kh, 1)
        y = F.conv2d(pad(x, self.geometry, "rows"), first, stride=(sh, 1), dilation=(dh, 1))
        for factor in factors[-2:0:-1]:
            y = F.conv2d(y, factor[:, :, None, None])
        last = factors[0].view(self.out_channels, kw, -1).permute(0, 2, 1)[:, :, None]  # (out, rank, 1, kw)
        return F.conv2d(pad(y, self.geometry, "columns"), last, stride=(1, sw), dilation=(1, dw))

    def to_dense(self) -> nn.Conv2d:
        """The ordinary `nn.Conv2d` with the same function."""
        full = self._kernel(self.weight.to_dense())
        dense = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            bias=self.bias is not None,
            device="meta",
            **self.geometry,
        )
        return _refill(dense, full, self.bias, self.training)


class Embedding(nn.Module):
    """y = W[index], with W a structure (vocabulary, dim) read row by row."""

    def __init__(self, weight: Structure, padding_idx: int | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx

    def forward(self, index: Tensor) -> Tensor:
        return self.weight.rows(index)

    def to_dense(self) -> nn.Embedding:
        """The ordinary `nn.Embedding` with the same table."""
        dense = nn.Embedding(*self.weight.shape, padding_idx=self.padding_idx, device="meta")
        return _refill(dense, self.weight.to_dense(), None, self.training)


Host = Linear | Conv2d | Embedding
GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "padding_mode")


def hosts(model: nn.Module) -> dict[str, Host]:
    """{name: host} of every factorized layer of a model."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Linear | Conv2d | Embedding)}


def _adapted_dense(weight: Structure) -> Tensor | None:
    """The frozen dense weight that an adapter stands beside, where it may be used without calling it."""
    if isinstance(weight, Sum) and weight.frozen and isinstance(weight.base, Dense):
        return weight.base.full.weight if plain(weight.base.full, nn.Linear) else None
    return None


def _matrix_over(matrix: Structure, x: Tensor, kernel: Any, stride: Any, dilation: Any) -> Tensor:
    patches = F.unfold(x, kernel, dilation=dilation, stride=stride).mT  # (N, positions, in)
    height = (x.shape[-2] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    return matrix(patches).mT.unflatten(-1, (height, -1))  # (N, out, H', W')


def pad(x: Tensor, geometry: Mapping[str, Any], sides: str = "both") -> Tensor:
    """Images (N, ·, H, W) padded as a convolution of this geometry pads them: "rows", "columns" or "both"."""
    padding, (kh, kw), (dh, dw) = (
        geometry["padding"],
        geometry["kernel_size"],
        geometry["dilation"],
    )
    if padding == "valid":
        return x
    if padding == "same":  # torch puts the odd pixel at the end
        h, w = dh * (kh - 1), dw * (kw - 1)
        columns, rows = (w // 2, w - w // 2), (h // 2, h - h // 2)
    else:
        columns, rows = (padding[1], padding[1]), (padding[0], padding[0])
    amounts = (*(columns if sides != "rows" else (0, 0)), *(rows if sides != "columns" else (0, 0)))
    mode = geometry["padding_mode"]
    return F.pad(x, amounts, mode="constant" if mode == "zeros" else mode) if any(amounts) else x


def _refill(dense: Any, full: Tensor, bias: Any, training: bool) -> Any:
    dense.weight = nn.Parameter(full)
    if bias is not None:
        dense.bias = bias
    elif isinstance(getattr(dense, "bias", None), nn.Parameter):  # Conv1D always has a bias
        dense.bias = nn.Parameter(torch.zeros_like(dense.bias, dtype=full.dtype, device=full.device))
    return dense.train(training)


def _conv1d() -> Any:
    module = sys.modules.get("transformers.pytorch_utils")
    return None if module is None else module.Conv1D


def is_conv1d(module: nn.Module) -> bool:
    conv1d = _conv1d()
    return conv1d is not None and type(module) is conv1d
