"""All terms of the loss together: who gets which gradient, what is hidden, and HOLa as a regime."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_hoi import batch, model, table

from rankfold.hoi.losses import output_terms, parameter_terms, total
from rankfold.hoi.regime import HolaRegime
from rankfold.hoi.settings import Losses, Training, losses

UNSEEN = (3, 5)  # both classes of the verb "hug": it has no example


def examples() -> dict[str, Tensor]:
    """The batch of the toy. In its first image each person has a bicycle, in the second one a cup."""
    found = batch()
    boxes = found["boxes"]
    return found | {
        "gt_boxes_h": torch.stack([boxes[0, [0, 1]], boxes[1, [0, 0]]]),
        "gt_boxes_o": torch.stack([boxes[0, [2, 2]], boxes[1, [1, 1]]]),
        "gt_interactions": torch.tensor([[0, 1], [7, -1]]),
    }


def gradients(net: Any, loss: Tensor) -> dict[str, Tensor]:
    held = dict(net.named_parameters())
    trained = {name: p for name, p in held.items() if p.requires_grad}
    found = torch.autograd.grad(
        loss, list(trained.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return dict(zip(trained, found, strict=True))


def reached(net: Any, loss: Tensor) -> set[str]:
    return {name for name, gradient in gradients(net, loss).items() if gradient.abs().sum() > 0}


W, B, WA = (
    "language.decomposition." + name
    for name in ("classes.left.weight", "classes.right.weight", "action_weights")
)


def test_the_gradient_of_each_term_reaches_what_the_page_says() -> None:
    """Trap 3: L_int trains all but B; B learns from recon, orth and act recon alone."""
    net, data = model(dropout=0.0).train(), examples()
    for (
        parameter
    ) in net.language.parameters():  # adapters that add nothing would stop gradients to what is below
        parameter.data.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    output = net(**{k: v for k, v in data.items() if not k.startswith("gt_")})
    parts = output_terms(net, output, data, Losses(), unseen=UNSEEN) | parameter_terms(net, Losses())
    where = {name: reached(net, term) for name, term in parts.items()}
    assert set(parts) == {
        *("interaction", "sem", "actreg", "recon", "sparse", "unique", "orth"),
        *("act_recon", "act_sparse", "act_orth"),
    }
    assert {name for name, names in where.items() if B in names} == {"recon", "orth", "act_recon"}
    assert where["recon"] == where["orth"] == where["act_recon"] == {B}
    assert where["sparse"] == where["unique"] == {W}
    assert where["act_sparse"] == where["act_orth"] == {WA}
    for name in ("interaction", "sem", "actreg"):
        assert {W, WA} <= where[name] and any("adapter" in other for other in where[name])
    assert all("scale" not in other for name in ("sem", "actreg") for other in where[name])


def test_after_one_backward_everything_that_trains_has_a_gradient() -> None:
    """Trap 5."""
    net = model().train()
    regime = HolaRegime(UNSEEN)
    regime.start_(net)
    regime.loss(net, examples())[0].backward()
    without = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


def test_the_total_is_the_plain_sum_of_the_weighted_terms() -> None:
    net, data = model().eval(), examples()
    output = net(**{k: v for k, v in data.items() if not k.startswith("gt_")})
    loss, parts = total(net, output, data, Losses(), unseen=UNSEEN)
    assert math.isclose(float(loss.detach()), sum(float(p) for p in parts.values()), rel_tol=1e-5)
    double, more = total(net, output, data, Losses(sem=300.0, interaction=3.0), unseen=UNSEEN)
    assert math.isclose(float(more["sem"]), 2 * float(parts["sem"]), rel_tol=1e-5)
    assert math.isclose(float(more["interaction"]), 3 * float(parts["interaction"]), rel_tol=1e-5)
    assert float(double.detach()) > float(loss.detach())
    alone = dict.fromkeys(
        ("recon", "sparse", "unique", "orth", "act_recon", "act_sparse", "act_orth", "sem", "actreg"), 0.0
    )
    _, few = total(net, output, data, Losses(**alone), unseen=UNSEEN)
    assert set(few) == {"interaction"}


@pytest.mark.parametrize("form", ["free", "frozen"])
def test_texts_that_are_not_decomposed_have_no_terms_of_a_decomposition(form: str) -> None:
    net = model(form=form).train()
    regime = HolaRegime(UNSEEN)
    regime.start_(net)
    loss, parts = regime.loss(net, examples())
    loss.backward()
    assert set(parts) == {"interaction", "sem"} and float(regime.penalty()) == 0
    assert regime.finish_() == {}


def test_a_step_with_verbs_that_have_no_example() -> None:
    """Trap 20: unseen verbs leave nothing empty; their logits get no gradient from the task, and no NaN."""
    net = model(dropout=0.0).train()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    regime = HolaRegime(UNSEEN)
    regime.start_(net, 2)
    steps = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        regime.before_step()
        loss, _ = regime.loss(net, examples())
        loss.backward()
        steps.step()
        steps.zero_grad()
        regime.after_step()
    assert regime.step == 2 and all(p.isfinite().all() for p in net.parameters())
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert {W, B, WA} <= moved and not any(".tower." in name for name in moved)
    regime.finish_()
    output = net.eval()(**batch())
    assert output.logits.isfinite().all()


def test_an_image_without_pairs_and_a_batch_without_examples() -> None:
    net = model().train()
    regime = HolaRegime()
    regime.start_(net)
    data = batch(((), (1,)))
    data |= {
        "gt_boxes_h": torch.zeros(2, 0, 4),
        "gt_boxes_o": torch.zeros(2, 0, 4),
        "gt_interactions": torch.zeros(2, 0, dtype=torch.long),
    }
    loss, parts = regime.loss(net, data)
    loss.backward()
    assert float(parts["interaction"]) == float(parts["sem"]) == float(parts["actreg"]) == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_what_is_hidden_is_there_again_after_training() -> None:
    """Trap 19."""
    net = model().train()
    whole = net.eval()(**batch()).prior
    regime = HolaRegime(UNSEEN)
    regime.start_(net)
    net.train()
    verb = table().verbs.index("hug")
    assert not net(**batch()).prior[..., verb].any()
    assert torch.equal(net.eval()(**batch()).prior, whole)  # eval in between
    facts = regime.finish_()
    assert facts["language.decomposition"] >= 0
    assert net.train()(**batch()).prior[..., verb].any()
    with pytest.raises(ValueError, match="not in training"):
        regime.penalty()


def test_the_penalty_is_the_part_of_the_loss_that_needs_no_output() -> None:
    net = model().train()
    regime = HolaRegime(UNSEEN)
    regime.start_(net)
    _, parts = regime.loss(net, examples())
    own = sum(float(p) for name, p in parts.items() if name not in ("interaction", "sem", "actreg"))
    assert math.isclose(float(regime.penalty().detach()), own, rel_tol=1e-5)


def test_ids_of_interactions_are_not_those_of_verbs() -> None:
    """Trap 10: interaction 3 is hug person. Hugging dogs stays, and so does the verb 3, wash."""
    net = model().train()
    regime = HolaRegime((3,))
    regime.start_(net)
    prior = net.train()(**batch(((1, 1, 2, 3),))).prior[0]
    assert prior[:, table().verbs.index("hug")].any() and prior[:, 3].any()
    alone = net(**batch(((1, 1),))).prior[0]
    assert not alone[:, table().verbs.index("hug")].any() and alone[:, table().verbs.index("hold")].any()


def test_weights_are_checked_by_name() -> None:
    assert losses(False) == Losses() and losses(True) == Losses(clamped=False, last_image=True)
    assert losses(True, clamped=True, sem=1.0) == Losses(sem=1.0, last_image=True)
    with pytest.raises(ValueError, match="no term 'uniqe' in the loss; did you mean 'unique'"):
        losses(False, uniqe=1.0)
    for name, value in (("sem", -1.0), ("recon", math.nan), ("alpha", 1.5)):
        with pytest.raises(ValueError, match=f"loss {name}="):
            losses(False, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("lr", 0.0),
        ("lr", math.inf),
        ("batch_size", 0),
        ("accumulate", 0),
        ("drop", -1),
        ("weight_decay", -1.0),
        ("clip", math.nan),
        ("seed", -1),
        ("workers", -1),
    ],
)
def test_settings_of_a_training_are_checked(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} "):
        Training(**{name: value})  # type: ignore[arg-type]
