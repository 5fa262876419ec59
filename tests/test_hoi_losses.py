"""The task loss: by hand, against the unstable form, at its edges; which pairs are examples of which verb."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rankfold.hoi.losses import bound_logit, focal, interaction_loss, match


def naive(z: Tensor, prior: Tensor) -> Tensor:
    p = prior * z.sigmoid()
    return (p / (1 - p)).log()


def test_bound_logit_is_the_logit_of_the_product() -> None:
    z = torch.linspace(-6, 6, 25, dtype=torch.float64)
    for prior in (1.0, 0.9, 0.3, 1e-3):
        at = torch.full_like(z, prior)
        torch.testing.assert_close(bound_logit(z, at), naive(z, at), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prior", [1.0, 1 - 1e-7, 0.5, 1e-6])
def test_bound_logit_is_finite_where_the_naive_form_is_not(prior: float) -> None:
    z = torch.tensor([-500.0, -100.0, 0.0, 100.0, 500.0], requires_grad=True)
    found = bound_logit(z, torch.full((5,), prior))
    found.sum().backward()
    assert z.grad is not None and found.isfinite().all() and z.grad.isfinite().all()
    assert not naive(z.detach(), torch.ones(5)).isfinite().all()
    assert (found.diff() >= 0).all()  # monotone in z


def test_focal_by_hand() -> None:
    x, targets = torch.tensor([0.3, -1.2], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
    s = [1 / (1 + math.exp(-v)) for v in x.tolist()]
    hand = [
        0.5 * (1 - s[0]) ** 0.2 * -math.log(s[0]),
        0.5 * s[1] ** 0.2 * -math.log(1 - s[1]),
    ]
    torch.testing.assert_close(focal(x, targets), torch.tensor(hand, dtype=torch.float64))
    weighed = focal(x, targets, alpha=0.25, gamma=2.0)
    assert math.isclose(float(weighed[0]), 0.75 * (1 - s[0]) ** 2 * -math.log(s[0]), rel_tol=1e-12)
    assert math.isclose(float(weighed[1]), 0.25 * s[1] ** 2 * -math.log(1 - s[1]), rel_tol=1e-12)


def test_focal_has_a_finite_gradient_where_its_power_has_none() -> None:
    """d t^0.2 / dt is infinite at 0, which σ(-200) is in float32."""
    x = torch.tensor([200.0, -200.0, 200.0, -200.0], requires_grad=True)
    focal(x, torch.tensor([1.0, 1.0, 0.0, 0.0])).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    near = torch.tensor([1.5, -0.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda v: focal(v, torch.tensor([1.0, 0.0], dtype=torch.float64)), (near,)
    )


def example() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, generator=draw, dtype=torch.float64)
    prior = torch.rand(2, 3, 4, generator=draw, dtype=torch.float64)
    prior[:, :, 1] = 0  # a verb that is hidden
    prior[1, 2] = 0  # a pad
    targets = torch.zeros(2, 3, 4, dtype=torch.float64)
    targets[0, 0, 0] = targets[0, 1, 3] = targets[1, 0, 1] = 1  # the last of a hidden verb: no positive
    return logits, prior, targets


def test_interaction_loss_is_the_sum_over_the_number_of_positives() -> None:
    logits, prior, targets = example()
    hand = 0.0
    for z, p, y in torch.stack([logits, prior, targets], -1).reshape(-1, 3).tolist():
        if p == 0:
            continue
        q = p / (1 + math.exp(-z))
        hand += 0.5 * ((1 - q) ** 0.2 * -math.log(q) if y else q**0.2 * -math.log(1 - q))
    assert math.isclose(float(interaction_loss(logits, prior, targets)), hand / 2, rel_tol=1e-9)
    assert math.isclose(
        float(interaction_loss(logits, prior, targets, clamped=False)), hand / 2, rel_tol=1e-9
    )


def test_what_has_no_prior_takes_no_part() -> None:
    logits, prior, targets = example()
    other, more = logits.clone(), targets.clone()
    other[:, :, 1], other[1, 2], more[1, 2] = 1e9, -1e9, 1.0
    assert float(interaction_loss(other, prior, more)) == float(interaction_loss(logits, prior, targets))


@pytest.mark.parametrize("clamped", [True, False])
def test_no_positive_gives_a_finite_loss(clamped: bool) -> None:
    """Trap 12: the negatives teach by default; with the public code's normaliser they do not."""
    logits, prior, targets = example()
    logits.requires_grad_()
    loss = interaction_loss(logits, prior, torch.zeros_like(targets), clamped=clamped)
    loss.backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert (float(loss.detach()) > 0) == clamped and (float(logits.grad.abs().sum()) > 0) == clamped


def test_no_pair_at_all_gives_zero() -> None:
    logits = torch.zeros(2, 0, 4, requires_grad=True)
    loss = interaction_loss(logits, torch.zeros(2, 0, 4), torch.zeros(2, 0, 4))
    loss.backward()
    assert float(loss.detach()) == 0


def test_half_precision_is_computed_in_float32() -> None:
    logits, prior, targets = (item.to(torch.bfloat16) for item in example())
    loss = interaction_loss(logits, prior, targets)
    assert loss.dtype == torch.float32
    assert float(loss) == float(interaction_loss(logits.float(), prior.float(), targets.float()))


BOX = torch.tensor([0.0, 0.0, 10.0, 10.0])
HALF = torch.tensor([0.0, 0.0, 10.0, 5.0])  # IoU with BOX: exactly 0.5
LESS = torch.tensor([0.0, 0.0, 10.0, 4.9])
FAR = torch.tensor([50.0, 50.0, 60.0, 60.0])


def test_match_takes_an_overlap_of_exactly_one_half() -> None:
    """Trap 25: at least 0.5 is an example. The smaller of the two overlaps decides."""
    boxes = torch.stack([BOX, HALF, LESS, FAR])[None]
    pairs = torch.tensor([[[0, 1], [1, 0], [0, 2], [2, 0], [0, 3], [3, 0], [-1, -1]]])
    found = match(
        pairs,
        boxes,
        BOX[None, None],
        BOX[None, None],
        torch.tensor([[2]]),
        verb_of=torch.tensor([0, 0, 1]),
        verbs=2,
    )
    assert found[0, :, 1].tolist() == [1, 1, 0, 0, 0, 0, 0] and not found[..., 0].any()


def test_match_reads_interactions_and_writes_verbs() -> None:
    """Trap 10: the two id spaces differ. A pair may be an example of several verbs; pads are none."""
    boxes = torch.stack([BOX, FAR])[None].repeat(3, 1, 1)
    pairs = torch.tensor([[[0, 1], [1, 0]], [[0, 1], [-1, -1]], [[-1, -1], [-1, -1]]])
    gt_h = BOX.expand(3, 3, 4).clone()
    gt_o = FAR.expand(3, 3, 4).clone()
    verb_of = torch.tensor([3, 0, 2, 1])
    truth = torch.tensor([[0, 2, -1], [3, -1, -1], [0, 1, 2]])
    found = match(pairs, boxes, gt_h, gt_o, truth, verb_of, 4)
    assert found[0, 0].tolist() == [0, 0, 1, 1]  # interactions 0 and 2: verbs 3 and 2
    assert not found[0, 1].any()  # the other way round
    assert found[1, 0].tolist() == [0, 1, 0, 0]
    assert not found[1, 1].any() and not found[2].any()


def test_match_without_ground_truth_or_pairs() -> None:
    boxes = torch.stack([BOX, FAR])[None]
    none = torch.zeros(1, 0, 4)
    verb_of = torch.tensor([0])
    pairs = torch.tensor([[[0, 1]]])
    empty = torch.zeros(1, 0, dtype=torch.long)
    assert not match(pairs, boxes, none, none, empty, verb_of, 1).any()
    nothing = torch.zeros(1, 0, 2, dtype=torch.long)
    assert match(nothing, boxes, none, none, empty, verb_of, 1).shape == (1, 0, 1)
