"""Maestro's exact optimum on linear maps: U_b V_b = [A C^½]_b C^{-½} for every prefix b, given sampling.

[M]_b is the best approximation of rank b, C = E[x xᵀ]. Products are compared, never factors: only they are
unique. The tolerance is 1e-3 of the total energy ‖A C^½‖².
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rankfold.methods import SVD
from rankfold.metric import Metric
from rankfold.ordered_dropout import OrderedDropout
from rankfold.structures import LowRank

TOLERANCE = 1e-3


def trained(target: Tensor, root: Tensor, steps: int, sample: bool = True) -> LowRank:
    """The product that training finds for `target` (out, in) on inputs whose second moment is root²; Adam
    with a cosine."""
    net = nn.Sequential(nn.Linear(target.shape[1], target.shape[0], bias=False, dtype=torch.float64))
    regime = OrderedDropout(penalty=0, shrink_every=None, nested=True)
    regime.start_(net, steps=steps)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    wanted = root @ target.mT
    for _ in range(steps):
        if sample:
            regime.before_step()
        loss = (net(root) - wanted).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cosine.step()
        regime.after_step()
    regime.finish_()
    found = net[0].weight
    assert isinstance(found, LowRank)
    return found


def prefixes(structure: LowRank) -> list[Tensor]:
    left, right = structure.left.weight.detach(), structure.right.weight.detach()
    return [left[:, :b] @ right[:b] for b in range(1, structure.rank + 1)]


def optimum(target: Tensor, root: Tensor) -> list[Tensor]:
    left, values, right = torch.linalg.svd(target @ root)
    ranks = range(1, min(target.shape) + 1)
    return [left[:, :b] * values[:b] @ right[:b] @ torch.linalg.inv(root) for b in ranks]


def risks(found: list[Tensor], target: Tensor, root: Tensor) -> list[float]:
    metric = Metric(None, root @ root)
    energy = metric.error(target)
    return [metric.error(each - target) / energy for each in found]


def sizes(structure: LowRank) -> Tensor:
    return (structure.left.weight.norm(dim=0) * structure.right.weight.norm(dim=1)).detach()


def check_optimal(structure: LowRank, target: Tensor, root: Tensor) -> None:
    best, found = optimum(target, root), prefixes(structure)
    for here, least in zip(risks(found, target, root), risks(best, target, root), strict=True):
        assert abs(here - least) < TOLERANCE
    metric = Metric(None, root @ root)
    for here, there in zip(found, best, strict=True):
        assert metric.error(here - there) < TOLERANCE * metric.error(target)


def check_disordered(target: Tensor, root: Tensor, steps: int = 600) -> None:
    """Without sampling the whole fits, and its prefixes are far from the best."""
    found = risks(prefixes(trained(target, root, steps, sample=False)), target, root)
    least = risks(optimum(target, root), target, root)
    assert found[-1] < TOLERANCE
    assert max(one - two for one, two in zip(found, least, strict=True)) > 0.2


def test_data_decide_the_order() -> None:
    """Vector 2: A = diag(3, 2, 1) on data that reverse its importance; its SVD would lose 13, 9 and 0."""
    target = torch.diag(torch.tensor([3.0, 2, 1], dtype=torch.float64))
    root = torch.diag(torch.tensor([1 / 3, 1, 3], dtype=torch.float64))
    energy = Metric(None, root @ root).error(target)
    assert [energy * risk for risk in risks(optimum(target, root), target, root)] == pytest.approx(
        [5, 1, 0], abs=1e-9
    )
    found = trained(target, root, 2000)
    check_optimal(found, target, root)
    first = prefixes(found)[0]
    torch.testing.assert_close(first, torch.diag(first.new_tensor([0, 0, 1])), atol=1e-2, rtol=0)
    check_disordered(target, root)


@pytest.mark.slow
def test_white_data_give_the_svd() -> None:
    target = torch.randn(6, 3, dtype=torch.float64) @ torch.randn(3, 9, dtype=torch.float64)
    root = torch.eye(9, dtype=torch.float64)
    found = trained(target, root, 8000)
    check_optimal(found, target, root)
    values = torch.linalg.svdvals(target)
    torch.testing.assert_close(sizes(found)[:3], values[:3], rtol=5e-3, atol=0)
    assert sizes(found)[3:].max() < 0.02
    check_disordered(target, root)


@pytest.mark.slow
def test_the_identity_gives_principal_components() -> None:
    """A = I in 8 dimensions: ‖u‖‖v‖ goes to 1, not to the eigenvalue."""
    spread = torch.tensor([3, 2.2, 1.6, 1.1, 0.7, 0.4, 0.2, 0.1], dtype=torch.float64)
    axes = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    root, target = axes * spread @ axes.mT, torch.eye(8, dtype=torch.float64)
    found = trained(target, root, 8000)
    check_optimal(found, target, root)
    for b in range(1, 8):
        rows = torch.linalg.svd(prefixes(found)[b - 1])[2][:b]
        cosines = torch.linalg.svdvals(rows @ axes[:, :b])
        assert cosines.min() > 0.999
    assert sizes(found)[:7].sub(1).abs().max() < 0.02
    check_disordered(target, root)


@pytest.mark.slow
def test_general_data_give_the_optimum_of_the_metric() -> None:
    """Any C: what `SVD` finds in the metric right = C. Two ways to one answer."""
    target = torch.randn(5, 7, dtype=torch.float64)
    mixing = torch.randn(7, 7, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(mixing @ mixing.mT / 7 + 0.05 * torch.eye(7, dtype=torch.float64))
    root = vectors * values.sqrt() @ vectors.mT
    found = trained(target, root, 8000)
    check_optimal(found, target, root)
    metric = Metric(None, root @ root)
    for b, here in enumerate(prefixes(found)[:-1], start=1):
        there = SVD().fit(target, metric, b).to_dense().detach()
        assert metric.error(here - there) < TOLERANCE * metric.error(target)
    check_disordered(target, root)
