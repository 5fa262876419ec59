"""RoIAlign against a loop over samples and points, and its mean against the mean of its samples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rankfold.hoi.roi_align import axis_weights, roi_align, roi_mean


def naive(grid: Tensor, box: list[float], output: int, sampling: int) -> Tensor:
    """(C, output, output) of grid (C, H, W): one point at a time."""
    _, height, width = grid.shape

    def at(y: float, x: float) -> Tensor:
        if not (-1 <= y <= height and -1 <= x <= width):
            return torch.zeros_like(grid[:, 0, 0])
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        top, left = int(y), int(x)
        down, right = min(top + 1, height - 1), min(left + 1, width - 1)
        a, b = y - top, x - left
        return (
            (1 - a) * ((1 - b) * grid[:, top, left] + b * grid[:, top, right])
            + a * ((1 - b) * grid[:, down, left] + b * grid[:, down, right])
        )  # fmt: skip

    x1, y1, x2, y2 = box
    bins = (max(y2 - y1, 0) / output, max(x2 - x1, 0) / output)
    points = [sampling or max(math.ceil(size), 1) for size in bins]
    out = torch.zeros(grid.shape[0], output, output, dtype=grid.dtype)
    for p in range(output):
        for q in range(output):
            found = [
                at(
                    y1 - 0.5 + (p + (i + 0.5) / points[0]) * bins[0],
                    x1 - 0.5 + (q + (j + 0.5) / points[1]) * bins[1],
                )
                for i in range(points[0])
                for j in range(points[1])
            ]
            out[:, p, q] = torch.stack(found).mean(0)
    return out


def some(rows: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Boxes (rows, 4) in a grid, some of which hang over its border or are larger than it."""
    draw = torch.Generator().manual_seed(seed)
    size = torch.tensor([width, height], dtype=torch.float64)
    corner = torch.rand(rows, 2, generator=draw, dtype=torch.float64) * size * 1.2 - 0.2 * size
    sides = torch.rand(rows, 2, generator=draw, dtype=torch.float64) * size * 1.5
    return torch.cat([corner, corner + sides], 1)


@pytest.mark.parametrize("sampling", [0, 1, 2])
@pytest.mark.parametrize("output", [1, 3, 7])
def test_equals_the_loop(output: int, sampling: int) -> None:
    grid = torch.randn(2, 3, 9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    boxes = some(12, 9, 6).view(2, 6, 4)
    got = roi_align(grid, boxes, output, sampling)
    assert got.shape == (2, 6, 3, output, output)
    for b in range(2):
        for r in range(6):
            expected = naive(grid[b], boxes[b, r].tolist(), output, sampling)
            torch.testing.assert_close(got[b, r], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("sampling", [0, 2])
def test_the_mean_needs_no_samples(sampling: int) -> None:
    grid = torch.randn(2, 4, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    boxes = some(10, 5, 8, seed=3).view(2, 5, 4)
    expected = roi_align(grid, boxes, 7, sampling).mean((-2, -1))
    torch.testing.assert_close(roi_mean(grid, boxes, 7, sampling), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(roi_mean(grid, boxes, 7, sampling, 0.5, training=False), expected)


def test_dropout_drops_samples_and_keeps_the_mean() -> None:
    grid, boxes = torch.ones(1, 500, 4, 4), torch.tensor([[[0.0, 0, 4, 4]]])
    torch.manual_seed(0)
    got = roi_mean(grid, boxes, dropout=0.2, training=True)
    kept = got * 0.8 * 49  # how many of 49 samples each feature kept
    torch.testing.assert_close(kept, kept.round(), atol=1e-3, rtol=0)
    assert kept.unique().numel() > 5
    assert float(got.mean()) == pytest.approx(1, abs=0.02)


def test_a_linear_grid_gives_the_middle_of_a_box() -> None:
    """Bilinear interpolation is exact on it: feature (h, w) stands at (w + 1/2, h + 1/2)."""
    y, x = torch.meshgrid(torch.arange(10.0), torch.arange(12.0), indexing="ij")
    grid = torch.stack([x + 0.5, y + 0.5]).unsqueeze(0)
    boxes = torch.tensor([[[2.0, 1.0, 9.0, 6.0], [4.2, 4.4, 4.6, 4.5]]])
    middle = (boxes[..., :2] + boxes[..., 2:]) / 2
    torch.testing.assert_close(roi_mean(grid, boxes), middle)


def test_empty_boxes_and_no_boxes() -> None:
    grid = torch.randn(1, 3, 4, 4)
    point = roi_align(grid, torch.tensor([[[1.5, 2.5, 1.5, 2.5]]]))
    torch.testing.assert_close(point, grid[:, :, 2, 1].view(1, 1, 3, 1, 1).expand(1, 1, 3, 7, 7))
    assert roi_align(grid, torch.zeros(1, 0, 4)).shape == (1, 0, 3, 7, 7)
    assert roi_mean(grid, torch.zeros(1, 0, 4), dropout=0.1, training=True).shape == (1, 0, 3)


def test_weights_of_an_axis_sum_to_one_inside() -> None:
    weights = axis_weights(torch.tensor([0.0, 2.5]), torch.tensor([8.0, 3.0]), 8, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 7))
    assert axis_weights(torch.tensor([20.0]), torch.tensor([3.0]), 8, 7).abs().max() == 0


def test_gradients_reach_the_grid() -> None:
    grid = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    boxes = some(3, 4, 4, seed=4).unsqueeze(0)
    assert torch.autograd.gradcheck(lambda g: roi_align(g, boxes, 2, 0), (grid,))
