"""Every term against a hand computation, its gradient's way, and what it does without a class."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import toy_hoi
from torch import Tensor
from torch.nn import functional as F
from toy_hoi import unit

from rankfold.hoi.decomposition import TextDecomposition
from rankfold.hoi.language import LanguageBranch
from rankfold.hoi.penalties import (
    UNSEEN,
    WEIGHTS,
    ClassSets,
    actreg,
    class_sets,
    class_weights,
    decomposition_terms,
    divergence,
    orth,
    recon,
    sem,
    sparse,
    unique,
)

TABLE = toy_hoi.table()


def branch(**options: Any) -> LanguageBranch:
    """With texts, and with adapters that add something."""
    config = toy_hoi.config(**options)
    made = LanguageBranch(config, toy_hoi.texts(), TABLE)
    for adapter in (made.self_adapter, made.mem_adapter, made.ho_fuse):
        torch.nn.init.normal_(adapter.up.weight, std=0.1)
    return made


def reached(term: Tensor, module: torch.nn.Module) -> set[str]:
    """Names of the parameters whose gradient is not zero; adapters as one name."""
    module.zero_grad()
    term.backward()
    named = {n: p.grad for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    return {"adapters" if "adapter" in n or "fuse" in n else n.removeprefix("decomposition.") for n in named}


W, B, WA = "classes.left.weight", "classes.right.weight", "action_weights"


# --- gradient routing (traps 3 and 4) ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("recon", {B}),
        ("sparse", {W}),
        ("act_sparse", {WA}),
        ("unique", {W}),
        ("orth", {B}),
        ("act_recon", {B}),
        ("act_orth", {WA}),
    ],
)
@pytest.mark.parametrize("init", ["upstream", "reconstructing"])
def test_who_learns_from_a_term(name: str, expected: set[str], init: str) -> None:
    made = branch(init=init)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from the start, where W has orthonormal columns
        for parameter in (made.decomposition.weights, made.decomposition.basis):  # type: ignore[union-attr]
            parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.1)
    term = decomposition_terms(made.decomposition)[name]  # type: ignore[arg-type]
    assert term.dim() == 0 and reached(term, made) == expected


def test_who_learns_from_adapted_features_and_from_the_task() -> None:
    """dL_int/dB == 0 and dL_int/dW ≠ 0: the task reads nothing but Th and Tho."""
    made = branch()
    sets = class_sets(torch.tensor([0, 5]), torch.tensor([1, 6]), TABLE.object_of)
    dec, weights = made.decomposition, class_weights(sets, 10)
    assert isinstance(dec, TextDecomposition)
    for kind in ("task", "sem", "actreg"):
        features, pairs = made(unit(3, toy_hoi.D))
        terms = {
            "task": features.square().sum() + pairs.sin().sum(),
            "sem": sem(features, pairs, dec.target, sets),
            "actreg": actreg(features, pairs, dec, TABLE.verb_of, weights),
        }
        assert reached(terms[kind], made) == {W, WA, "adapters"}, kind


def test_weights_name_the_terms() -> None:
    assert set(WEIGHTS) == {*decomposition_terms(branch().decomposition), "sem", "actreg"}  # type: ignore[arg-type]


def test_inverses_are_constants() -> None:
    """Of actreg B learns nothing even where the features let its gradient through."""
    made = branch(trains="both")
    dec = made.decomposition
    assert isinstance(dec, TextDecomposition)
    features, pairs = (x.detach() for x in made(unit(1, toy_hoi.D)))
    term = actreg(features, pairs, dec, TABLE.verb_of, torch.ones(10))
    assert reached(term, made) == {WA}


# --- values by hand ----------------------------------------------------------------------------------------


def test_recon_and_sparse() -> None:
    w, b = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    target = torch.tensor([[1.0, 2.0, 3.0], [1.0, -1.0, 0.0]])
    assert float(recon(w, b, target)) == 1 + 1  # second row: [0, -1, -1] against [1, -1, 0]
    assert float(recon(w, b, w @ b)) == 0
    assert float(sparse(w)) == (3 + 1) / 2


def test_unique_counts_each_pair_twice() -> None:
    w = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, -1.0]])
    half = 1 / math.sqrt(2)
    assert float(unique(w)) == pytest.approx(2 * (half + 0 + half))
    assert float(unique(torch.eye(4)[:, :3])) == 0


def test_orth_of_3x2_keeps_the_diagonal() -> None:
    """Rows e1, e2, (e1 + e2)/√2: G has g = 1/√2 between the third and the others. Entries of G Gᵀ: ½ at
    (1,1), (2,2), (1,2), (2,1), 1 at (3,3), sum 3, of which 2 are the diagonal's."""
    rows = torch.tensor([[2.0, 0.0], [0.0, 0.5], [3.0, 3.0]], dtype=torch.float64, requires_grad=True)
    assert orth(rows).item() == pytest.approx(3)
    between = torch.tensor([[0, 0, 1], [0, 0, 1], [1, 1, 0]]) / math.sqrt(2)
    assert float((between @ between.mT).diagonal().sum()) == pytest.approx(2)
    assert orth(torch.eye(3)).item() == 0
    # A third row at angle t: Σ = c² + s² + 2cs + 1 = 2 + sin 2t, of slope 2 cos 2t, 1 at 30°.
    angle = torch.tensor(math.pi / 6, requires_grad=True)
    turned = torch.stack([angle.cos(), angle.sin()])
    value = orth(torch.stack([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), turned]))
    assert value.item() == pytest.approx(2 + math.sin(math.pi / 3))
    value.backward()
    assert angle.grad is not None and angle.grad.item() == pytest.approx(1.0, rel=1e-5)


def test_divergence_by_hand() -> None:
    goal, found = torch.tensor([[0.1, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.2]])
    p = math.e / (1 + math.e)
    first = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    q = 1 / (1 + math.e**2)
    second = 0.5 * math.log(0.5 / q) + 0.5 * math.log(0.5 / (1 - q))
    assert divergence(goal, found).item() == pytest.approx((first + second) / 4)
    assert divergence(goal, found, torch.tensor([0.2, 3.0])).item() == pytest.approx(
        (0.2 * first + 3 * second) / 4
    )
    assert divergence(goal, goal + 5).item() == pytest.approx(0, abs=1e-7)


def slow_kl(target: Tensor, prediction: Tensor) -> float:
    goal, found = (target / 0.1).softmax(-1), (prediction / 0.1).softmax(-1)
    return float(F.kl_div(found.log(), goal, reduction="sum") / target.numel())


def test_sem_by_hand() -> None:
    """The mean over three sets, two kinds of features and two images of torch's own KL."""
    target, single, pair = (
        unit(10, 5),
        unit(20, 5, seed=1).view(2, 10, 5),
        unit(20, 10, seed=2).view(2, 10, 10),
    )
    sets = class_sets(torch.tensor([0, 5, 0]), torch.tensor([1, 6, 8]), TABLE.object_of)
    assert [ids.tolist() for ids in sets] == [[0, 5], [1, 6], [0, 1, 5, 6]]
    terms = [
        slow_kl(target[ids] @ target[ids].mT, adapted[image, ids] @ adapted[image, ids].mT)
        for ids in sets
        for adapted in (single, pair)
        for image in (0, 1)
    ]
    assert sem(3 * single, pair, target, sets).item() == pytest.approx(sum(terms) / 12, rel=1e-4)
    assert sem(single[:1], pair[:1], target, sets).item() == pytest.approx(sum(terms[::2]) / 6, rel=1e-4)
    repeated = pair[:1].expand(2, -1, -1)
    copied = sem(single, repeated.clone(), target, sets)
    assert sem(single, repeated, target, sets).item() == pytest.approx(copied.item(), rel=1e-5)


def test_sem_does_not_depend_on_the_order_of_images() -> None:
    """Trap 11: the public code reads the last image of the batch alone."""
    target, single, pair = (
        unit(10, 5),
        unit(30, 5, seed=1).view(3, 10, 5),
        unit(30, 10, seed=2).view(3, 10, 10),
    )
    sets = class_sets(torch.arange(4), torch.tensor([6]), TABLE.object_of)
    turned = [2, 0, 1]
    same = sem(single[turned], pair[turned], target, sets)
    assert sem(single, pair, target, sets).item() == pytest.approx(same.item())
    last = sem(single, pair, target, sets, images="last")
    assert last.item() == pytest.approx(sem(single[2:], pair[2:], target, sets).item())
    assert last.item() != pytest.approx(sem(single[turned], pair[turned], target, sets, images="last").item())
    with pytest.raises(ValueError, match="images='first'"):
        sem(single, pair, target, sets, images="first")


def test_sem_is_zero_where_similarities_are_those_of_the_texts() -> None:
    target, sets = unit(10, 5), ClassSets(torch.arange(4), torch.arange(4, 10), torch.arange(10))
    turn = torch.linalg.qr(torch.randn(5, 5)).Q
    features = (7 * target @ turn).unsqueeze(0)
    assert sem(features, torch.cat([features, features], -1), target, sets).item() == pytest.approx(
        0, abs=1e-6
    )


def test_actreg_by_hand() -> None:
    dec = branch().decomposition
    assert isinstance(dec, TextDecomposition)
    single, pair = unit(20, 16, seed=1).view(2, 10, 16), unit(20, 32, seed=2).view(2, 10, 32)
    weights = torch.tensor([0, 0.2, 0, 0, 0, 0.999, 0, 0, 0, 0])
    total = 0.0
    for found in (
        (single.mean(0) @ torch.linalg.pinv(dec.basis))[:, dec.first_action :],
        pair.mean(0)[:, :16] @ torch.linalg.pinv(dec.action_basis),
    ):
        for i in (1, 5):
            goal = F.normalize(dec.action_weights[TABLE.verb_of[i]], dim=0)
            rows = slow_kl(goal.detach(), F.normalize(found[i], dim=0).detach()) * len(goal)
            total += float(weights[i]) * rows / (2 * len(goal))
    assert actreg(single, pair, dec, TABLE.verb_of, weights).item() == pytest.approx(total, rel=1e-4)


def test_actreg_is_zero_where_classes_have_the_weights_of_their_actions() -> None:
    dec = branch().decomposition
    assert isinstance(dec, TextDecomposition)
    with torch.no_grad():
        dec.weights[:, dec.first_action :] = 2 * dec.action_weights[TABLE.verb_of]
    single = dec.class_features().unsqueeze(0)
    pair = torch.cat([dec.action_features()[TABLE.verb_of], torch.randn(10, 16)], -1).unsqueeze(0)
    assert actreg(single, pair, dec, TABLE.verb_of, torch.ones(10)).item() == pytest.approx(0, abs=1e-6)
    assert actreg(pair[..., 16:], pair, dec, TABLE.verb_of, torch.ones(10)).item() > 1e-3


# --- sets and weights of classes (traps 9 and 10) ----------------------------------------------------------


def test_sets_go_by_object_and_never_take_an_unseen_class_as_seen() -> None:
    sets = class_sets(torch.tensor([7, 1, 1]), torch.tensor([1, 2, 8, 9]), TABLE.object_of)
    assert [ids.tolist() for ids in sets] == [[7], [8, 9], [7, 8, 9]]  # objects: 7, 8, 9 are of a cup
    for ids in (torch.tensor([-1]), torch.tensor([10])):
        with pytest.raises(
            ValueError, match=r"present interaction ids reach from .* but the table has 0 to 9"
        ):
            class_sets(ids, torch.tensor([1]), TABLE.object_of)


@pytest.mark.parametrize("unseen", [[1], [1, 2], [1, 6, 5], list(range(1, 10))])
def test_the_unseen_weight_is_the_same_for_any_share(unseen: list[int]) -> None:
    sets = class_sets(torch.tensor([0]), torch.tensor(unseen), TABLE.object_of)
    weights = class_weights(sets, 10)
    assert weights[sets.unseen].tolist() == pytest.approx([UNSEEN] * len(sets.unseen)) and UNSEEN == 0.999
    assert weights[sets.seen].tolist() == pytest.approx([0.2])
    assert int((weights > 0).sum()) == len(sets.both)


def test_seen_weights_are_by_interaction_id() -> None:
    """Interactions 3 and 5 both are of verb 2: read as verb ids, 3 and 5 would be other classes."""
    sets = class_sets(torch.tensor([3, 5]), torch.tensor([], dtype=torch.long), TABLE.object_of)
    by_class = torch.arange(10) / 10
    weights = class_weights(sets, 10, seen=by_class)
    assert weights.tolist() == pytest.approx([0, 0, 0, 0.3, 0, 0.5, 0, 0, 0, 0])
    by_verb = by_class[TABLE.verb_of[sets.seen]]
    assert weights[sets.seen].tolist() != pytest.approx(by_verb.tolist())
    rare = class_weights(sets, 10, rare=torch.tensor([2, 6]))
    assert rare.nonzero().flatten().tolist() == [2, 3, 5, 6] and float(rare[2]) == pytest.approx(UNSEEN)


def test_no_class_gives_zero_and_no_nan() -> None:
    """No unseen class, no class of the batch at all: finite, and the graph stays whole."""
    made = branch()
    dec, none = made.decomposition, torch.tensor([], dtype=torch.long)
    assert isinstance(dec, TextDecomposition)
    features, pairs = made(unit(2, toy_hoi.D))
    for present, empty in ((torch.tensor([3]), False), (none, True)):
        sets = class_sets(present, none, TABLE.object_of)
        weights = class_weights(sets, 10)
        for term in (
            sem(features, pairs, dec.target, sets),
            actreg(features, pairs, dec, TABLE.verb_of, weights),
        ):
            term.backward(retain_graph=True)
            assert term.isfinite() and (not empty or term.item() == 0)
    assert all(p.grad.isfinite().all() for p in made.parameters() if p.grad is not None)
