"""Boxes: overlaps by hand, resizing, and NMS against the plain loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankfold.hoi.boxes import area, clip, iou, nms, pair_iou, scale, union, valid


def boxes(*rows: tuple[float, float, float, float]) -> Tensor:
    return torch.tensor(rows).reshape(-1, 4)


def random_boxes(n: int, seed: int) -> Tensor:
    corner, side = torch.rand(2, n, 2, generator=torch.Generator().manual_seed(seed))
    return torch.cat([corner, corner + 0.02 + side], 1) * 100


def test_iou_by_hand() -> None:
    one = boxes((0, 0, 2, 2))
    others = boxes((0, 0, 2, 2), (1, 1, 3, 3), (2, 0, 4, 2), (0, 0, 2, 4), (5, 5, 6, 6))
    assert iou(one, others).tolist() == [[1, pytest.approx(1 / 7), 0, 0.5, 0]]
    assert iou(others[:0], others).shape == (0, 5)


def test_iou_of_empty_boxes_is_zero_and_a_number() -> None:
    point, back = boxes((1, 1, 1, 1)), boxes((3, 3, 1, 1))
    assert area(back) == 0
    assert iou(point, point) == 0 and iou(back, back) == 0 and iou(back, boxes((0, 0, 4, 4))) == 0


def test_half_is_half_exactly() -> None:
    """What training calls a match and the evaluation a miss (trap 25) must not hang on rounding."""
    for side in (1.0, 3.0, 7.0, 99.0, 333.0):
        assert iou(boxes((0, 0, 2 * side, side)), boxes((0, 0, side, side))) == 0.5


def test_iou_is_symmetric_batched_and_differentiable() -> None:
    a, b = random_boxes(5, 0), random_boxes(7, 1)
    assert torch.equal(iou(a, b), iou(b, a).mT)
    both = iou(torch.stack([a, a + 1]), torch.stack([b, b]))
    assert torch.equal(both[0], iou(a, b)) and torch.equal(both[1], iou(a + 1, b))
    apart = torch.tensor([[0.0, 0, 1, 1]], requires_grad=True)
    iou(apart, boxes((5, 5, 5, 5))).sum().backward()
    assert apart.grad is not None and apart.grad.isfinite().all()


def test_pairs_overlap_by_the_smaller_of_both() -> None:
    h, o = boxes((0, 0, 2, 2)), boxes((10, 0, 12, 2))
    assert pair_iou(h, o, h, boxes((10, 0, 12, 4))) == 0.5
    assert pair_iou(h, o, boxes((0, 0, 2, 4)), o) == 0.5
    assert pair_iou(h, o, o, h) == 0


@pytest.mark.parametrize("after", [(224, 224), (336, 100), (1333, 41)])
def test_resizing_changes_no_iou(after: tuple[int, int]) -> None:
    """Trap 23: the encoder sees a distorted image, and boxes may be compared there."""
    a, b = random_boxes(40, 2), random_boxes(40, 3)
    resized = iou(scale(a, (640, 480), after), scale(b, (640, 480), after))
    assert (resized - iou(a, b)).abs().max() <= 1e-6


def test_scaling_by_hand() -> None:
    assert scale(boxes((10.0, 20, 30, 40)), (100, 50), (200, 25)).tolist() == [[20, 10, 60, 20]]


def test_clip_valid_union() -> None:
    assert clip(boxes((-3, 2, 200, 90)), (100, 50)).tolist() == [[0, 2, 100, 50]]
    odd = boxes((0, 0, 1, 1), (0, 0, 0, 1), (2, 0, 1, 1), (0, 0, float("nan"), 1), (0, 0, float("inf"), 1))
    assert valid(odd).tolist() == [True, False, False, False, False]
    assert union(boxes((0, 5, 2, 7)), boxes((1, 0, 9, 6))).tolist() == [[0, 0, 9, 7]]


def slow_nms(kept: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> list[int]:
    """The definition, one box at a time."""
    result: list[int] = []
    for i in sorted(range(len(kept)), key=lambda i: (-float(scores[i]), i)):
        rivals = (j for j in result if labels[j] == labels[i])
        if all(float(iou(kept[i : i + 1], kept[j : j + 1])) <= threshold for j in rivals):
            result.append(i)
    return result


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("threshold", [0.1, 0.5])
def test_nms_equals_the_loop(seed: int, threshold: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    made = random_boxes(40, seed)
    scores = torch.rand(40, generator=draw).mul(10).round() / 10  # with ties
    labels = torch.randint(3, (40,), generator=draw)
    found = nms(made, scores, labels, threshold).tolist()
    assert found == slow_nms(made, scores, labels, threshold)
    assert threshold == 0.5 or len(found) < 40


def test_what_fell_suppresses_nothing() -> None:
    row = boxes((0, 0, 10, 1), (3, 0, 13, 1), (6, 0, 16, 1))  # neighbours overlap by 7/13, the ends by 4/16
    assert nms(row, torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3), 0.5).tolist() == [0, 2]


def test_nms_keeps_other_labels_and_an_overlap_at_the_threshold() -> None:
    same = boxes((0, 0, 2, 2), (0, 0, 2, 2))
    assert nms(same, torch.tensor([0.1, 0.2]), torch.tensor([0, 1]), 0.5).tolist() == [1, 0]
    half = boxes((0, 0, 2, 2), (0, 0, 2, 4))
    assert nms(half, torch.tensor([0.9, 0.8]), torch.zeros(2), 0.5).tolist() == [0, 1]
    assert nms(half[:0], torch.zeros(0), torch.zeros(0), 0.5).tolist() == []
