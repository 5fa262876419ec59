"""Pairs, their 36 numbers and their prior, against sets and loops written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from toy_hoi import PERSON, table

from rankfold.hoi.boxes import iou, scale
from rankfold.hoi.pairs import SPATIAL, build_pairs, of_pairs, pair_prior, spatial_encoding


def test_pairs_are_a_human_with_anyone_else_in_order() -> None:
    labels = torch.tensor([[1, 1, 0, 2], [1, 3, -1, -1], [0, 2, -1, -1], [1, -1, -1, -1], [-1] * 4])
    pairs, counts = build_pairs(labels, PERSON)
    assert counts.tolist() == [6, 1, 0, 0, 0]
    assert pairs[0].tolist() == [[0, 1], [0, 2], [0, 3], [1, 0], [1, 2], [1, 3]]
    assert pairs[1].tolist() == [[0, 1]] + [[-1, -1]] * 5
    assert (pairs[2:] == -1).all()


def test_humans_need_not_come_first() -> None:
    pairs, counts = build_pairs(torch.tensor([[2, 1, 0]]), PERSON)
    assert (pairs[0].tolist(), counts.tolist()) == ([[1, 0], [1, 2]], [2])


@pytest.mark.parametrize("labels", [torch.full((2, 0), -1), torch.tensor([[1], [0]]), torch.tensor([[0, 2]])])
def test_no_pairs_without_a_human_and_something_else(labels: torch.Tensor) -> None:
    pairs, counts = build_pairs(labels, PERSON)
    assert pairs.shape == (len(labels), 0, 2)
    assert counts.tolist() == [0] * len(labels)


def test_number_of_pairs_is_humans_times_others() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 4, (50, 9), generator=draw).sort(1, descending=True).values
    _, counts = build_pairs(labels, PERSON)
    humans, all_of_them = (labels == PERSON).sum(1), (labels >= 0).sum(1)
    assert torch.equal(counts, humans * (all_of_them - 1))


def test_ends_of_pairs_are_gathered() -> None:
    values = torch.arange(12.0).view(2, 3, 2)
    got = of_pairs(values, torch.tensor([[2, 0], [1, -1]]))
    assert got.tolist() == [[[4, 5], [0, 1]], [[8, 9], [6, 7]]]
    assert of_pairs(torch.zeros(2, 0, 5), torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 5)


def test_the_eighteen_numbers_by_hand() -> None:
    """Human of 20 x 40 at the left, object of 40 x 20 to the right and above, image 100 x 200."""
    human, other = torch.tensor([10.0, 100, 30, 140]), torch.tensor([20.0, 90, 60, 110])
    got = spatial_encoding(human, other, (100, 200), eps=0.0)
    assert got.shape == (SPATIAL,)
    shared = 10 * 10 / (800 + 800 - 100)
    expected = [0.2, 0.6, 0.4, 0.5]  # centres
    expected += [0.2, 0.2, 0.4, 0.1]  # sides
    expected += [0.04, 0.04, 1.0, 0.5, 2.0, shared]
    expected += [1.0, 0.0, 0.0, 0.5]  # right, below, left, above: in widths and heights of the human
    torch.testing.assert_close(got[:18], torch.tensor(expected))
    positive = torch.tensor(expected) > 0
    torch.testing.assert_close(got[18:][positive], torch.tensor(expected)[positive].log())


def test_the_encoding_ignores_the_size_of_the_image_but_for_its_proportions() -> None:
    draw = torch.Generator().manual_seed(1)
    corner = torch.rand(20, 2, generator=draw) * 50
    boxes = torch.cat([corner, corner + 1 + torch.rand(20, 2, generator=draw) * 40], 1)
    same = spatial_encoding(3 * boxes[:10], 3 * boxes[10:], (300, 300))
    torch.testing.assert_close(
        same, spatial_encoding(boxes[:10], boxes[10:], (100, 100)), atol=2e-3, rtol=1e-3
    )


@pytest.mark.parametrize("eps", [1e-4, 1e-10])
def test_disjoint_boxes_give_finite_encodings_and_gradients(eps: float) -> None:
    """Trap 24: the logarithm of an IoU of 0, for the default and for the public code's -23."""
    humans = torch.tensor([[0.0, 0, 10, 10], [5.0, 5, 5, 5]], requires_grad=True)  # the second one is empty
    others = torch.tensor([[50.0, 60, 80, 90], [5.0, 5, 5, 5]], requires_grad=True)
    got = spatial_encoding(humans, others, (100, 100), eps)
    assert got.isfinite().all()
    assert float(got.detach()[0, 18:].min()) == pytest.approx(math.log(eps), abs=1e-3)
    got.sum().backward()
    assert humans.grad is not None and humans.grad.isfinite().all()
    assert others.grad is not None and others.grad.isfinite().all()


def test_iou_survives_the_resize_to_a_square() -> None:
    """Trap 23: boxes live in the resized image, 640 x 427 made 224 x 224."""
    draw = torch.Generator().manual_seed(2)
    corner = torch.rand(200, 2, generator=draw, dtype=torch.float64) * 300
    boxes = torch.cat([corner, corner + 5 + torch.rand(200, 2, generator=draw, dtype=torch.float64) * 120], 1)
    before = iou(boxes[:100], boxes[100:])
    resized = scale(boxes, (640, 427), (224, 224))
    assert (before - iou(resized[:100], resized[100:])).abs().max() < 1e-6
    assert (before > 0.1).any()


@pytest.mark.parametrize("exponent", [1.0, 2.8])
def test_prior_is_the_product_of_scores_where_the_table_allows_it(exponent: float) -> None:
    classes = table()
    labels, scores = torch.tensor([[1, 1, 0, 3]]), torch.tensor([[0.9, 0.8, 0.7, 0.6]])
    pairs, _ = build_pairs(labels, classes.human)
    pairs = torch.cat([pairs, pairs.new_full((1, 1, 2), -1)], 1)
    prior = pair_prior(scores, labels, pairs, classes.valid, exponent)
    assert prior.shape == (1, 7, 6)
    for (x, y), row in zip(pairs[0].tolist(), prior[0].tolist(), strict=True):
        for verb, value in enumerate(row):
            known = x >= 0 and (verb, int(labels[0, y])) in classes.interactions
            both = float(scores[0, x] * scores[0, y]) if known else 0.0
            assert value == pytest.approx(both**exponent)
