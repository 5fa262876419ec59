"""RoIAlign in plain torch: a fixed number of samples of a feature grid inside each box.

    out[p, q] = mean of the bilinear interpolation at points spread over cell (p, q) of the box
              = Σ_hw  rows[p, h] grid[h, w] columns[q, w]

Bilinear interpolation, the mean over a grid of points and the rule at the border are all products of one
factor for each axis, so a box is two small matrices. Feature (h, w) stands at the middle of its cell: half a
cell is subtracted from corners. [Mask R-CNN, arXiv 1703.06870]
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def axis_weights(start: Tensor, length: Tensor, cells: int, output: int, sampling: int = 0) -> Tensor:
    """(…, output, cells): what each cell of an axis adds to each of `output` samples of the intervals that
    begin at `start` (…,) and are `length` (…,) long, in cells. `sampling` points are averaged in a sample; 0:
    as many as it has cells, at least one. A point more than a cell outside adds nothing, others outside count
    as on the border."""
    length = length.clamp(min=0)
    points = (length / output).ceil().clamp(min=1) if sampling == 0 else torch.full_like(length, sampling)
    most = int(points.max()) if points.numel() else 1
    k = torch.arange(most, device=start.device, dtype=start.dtype)
    p = torch.arange(output, device=start.device, dtype=start.dtype)
    inside = (k + 0.5) / points.unsqueeze(-1)  # (…, most), in samples
    step = (length / output)[..., None, None]
    at = start[..., None, None] - 0.5 + (p.unsqueeze(-1) + inside.unsqueeze(-2)) * step
    counted = (k < points.unsqueeze(-1)).unsqueeze(-2) & (at >= -1) & (at <= cells)
    cell = torch.arange(cells, device=start.device, dtype=start.dtype)
    near = (1 - (at.clamp(0, cells - 1).unsqueeze(-1) - cell).abs()).clamp(min=0)
    return (near * counted.unsqueeze(-1)).sum(-2) / points[..., None, None]


def _axes(boxes: Tensor, height: int, width: int, output: int, sampling: int) -> tuple[Tensor, Tensor]:
    x1, y1, x2, y2 = boxes.unbind(-1)
    return (
        axis_weights(y1, y2 - y1, height, output, sampling),
        axis_weights(x1, x2 - x1, width, output, sampling),
    )


def roi_align(grid: Tensor, boxes: Tensor, output: int = 7, sampling: int = 0) -> Tensor:
    """(B, R, C, output, output) samples of `grid` (B, C, H, W) in `boxes` (B, R, 4), in cells of the grid:
    (0, 0, W, H) is all of it."""
    batch, channels, height, width = grid.shape
    rows, columns = _axes(boxes.to(grid.dtype), height, width, output, sampling)
    last = grid.permute(0, 2, 3, 1).reshape(batch, height, width * channels)
    down = (rows.flatten(1, 2) @ last).view(batch, boxes.shape[1], output, width, channels)
    return (columns.unsqueeze(2) @ down).permute(0, 1, 4, 2, 3)


def roi_mean(
    grid: Tensor,
    boxes: Tensor,
    output: int = 7,
    sampling: int = 0,
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """(B, R, C): the mean of `roi_align`, after `dropout` of its samples where `training`. Without dropout no
    sample is made: the mean is a product too."""
    if training and dropout > 0:
        return F.dropout(roi_align(grid, boxes, output, sampling), dropout).mean((-2, -1))
    height, width = grid.shape[-2:]
    rows, columns = _axes(boxes.to(grid.dtype), height, width, output, sampling)
    whole = rows.mean(-2).unsqueeze(-1) * columns.mean(-2).unsqueeze(-2)
    return whole.flatten(2) @ grid.flatten(2).mT


__all__ = ["axis_weights", "roi_align", "roi_mean"]
