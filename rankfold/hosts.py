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

from rankfold.structure import Structure


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
        y = self.weight(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

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
        factors = self.weight.factors()
        if self.spatial and factors and len(factors) > 1:
            y = self._separable(x, factors)
            return y if self.bias is None else y + self.bias.view(-1, 1, 1).to(y.dtype)
        x = pad(x, self.geometry)
        kh, kw = self.geometry["kernel_size"]
        (sh, sw), (dh, dw) = self.geometry["stride"], self.geometry["dilation"]
        if factors and not self.spatial:  # convolve with the first factor; the others mix channels
            first = factors[-1].view(-1, self.in_channels, kh, kw)
            y = F.conv2d(x, first, stride=(sh, sw), dilation=(dh, dw))
            for factor in factors[-2::-1]:
                y = F.conv2d(y, factor[:, :, None, None])
        elif self.spatial:
            y = _matrix_over(self.weight, x, (kh, 1), (sh, 1), (dh, 1))
            # y is z (N, out·kw, H', padded W); output[o, h, w] = Σⱼ z[(o, j), h, w·stride + j·dilation]
            z = y.unflatten(1, (self.out_channels, kw))
            width = (z.shape[-1] - dw * (kw - 1) - 1) // sw + 1
            y = sum(z[:, :, j, :, j * dw : j * dw + (width - 1) * sw + 1 : sw] for j in range(kw))
            assert isinstance(y, Tensor)
        else:
            y = _matrix_over(self.weight, x, (kh, kw), (sh, sw), (dh, dw))
        return y if self.bias is None else y + self.bias.view(-1, 1, 1).to(y.dtype)

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
        kh, kw = self.geometry["kernel_size"]
        full = self.weight.to_dense()
        if self.spatial:
            full = full.view(self.out_channels, kw, self.in_channels, kh).permute(0, 2, 3, 1).contiguous()
        else:
            full = full.view(self.out_channels, self.in_channels, kh, kw)
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
