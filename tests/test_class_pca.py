"""PCA over classes: closed forms of its errors, the laws of methods, and what centres what."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankfold import factorize_
from rankfold.allocate import fixed
from rankfold.method import Method, from_json
from rankfold.methods.class_pca import INITS, ClassPCA, components, kept, rank_for
from rankfold.metric import Metric
from rankfold.metrics import Frobenius
from rankfold.recipe import Recipe
from rankfold.testing import check_method, sample_metrics

PLAIN = {"": Metric()}


def features(classes: int = 30, width: int = 20) -> Tensor:
    """Unit rows around a common direction, as text features are."""
    rows = torch.randn(classes, 6, dtype=torch.float64) @ torch.randn(6, width, dtype=torch.float64)
    rows = rows + 0.1 * torch.randn(classes, width, dtype=torch.float64) + torch.randn(width)
    return torch.nn.functional.normalize(rows, dim=-1)


def error(weight: Tensor, init: str, rank: int) -> float:
    dense = ClassPCA(init=init).fit(weight, Metric(), rank).to_dense()
    return float((dense.detach() - weight).square().sum())


@pytest.mark.parametrize("shape", [(30, 20), (14, 40), (24, 24)])
def test_laws_of_the_nearest(shape: tuple[int, int]) -> None:
    check_method(ClassPCA(variance=None, init="pca"), shape, metrics=PLAIN, best=True)


@pytest.mark.parametrize("shape", [(30, 20), (14, 40)])
def test_laws_of_reconstructing(shape: tuple[int, int]) -> None:
    """Not exact: a matrix of rank r, centred by rows, has another row space."""
    check_method(ClassPCA(variance=None), shape, metrics=PLAIN, exact=False)


@pytest.mark.parametrize("init", INITS)
def test_errors_are_those_of_the_fit_in_any_metric(init: str) -> None:
    weight = features()
    for metric in sample_metrics((30, 20)).values():
        fitted = ClassPCA(init=init).fit(weight, metric, 5).to_dense()
        [told] = ClassPCA(init=init).errors(weight, metric, [5])
        assert told == pytest.approx(metric.error(weight - fitted), rel=1e-9)


def test_upstream_is_no_compression() -> None:
    """Why its law cannot hold: every component whose σ is below a half adds to the error."""
    weight = features()
    sigma = components(weight).sigma
    for rank in (1, 5, 12):
        expected = float(weight.square().sum() + (1 - 2 * sigma[:rank]).sum())
        assert error(weight, "upstream", rank) == pytest.approx(expected, rel=1e-9)
    few, many = ClassPCA(init="upstream").errors(weight, Metric(), [5, 19])
    assert many > few > float(weight.square().sum()) / 3


def test_reconstructing_has_the_best_weights_for_the_basis_of_upstream() -> None:
    weight = features()
    up, best = (ClassPCA(init=init).fit(weight, Metric(), 7) for init in ("upstream", "reconstructing"))
    left, right = up.left.weight.detach(), up.right.weight.detach()
    assert torch.allclose(left.mT @ left, torch.eye(7, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(right.norm(dim=1), torch.ones(7, dtype=torch.float64))
    assert torch.equal(right, best.right.weight)
    solved = weight @ torch.linalg.pinv(right)
    assert torch.allclose(best.left.weight, solved, atol=1e-10)
    assert error(weight, "reconstructing", 7) == pytest.approx(
        float(weight.square().sum() - components(weight).sigma[:7].square().sum())
    )
    assert error(weight, "pca", 7) <= error(weight, "reconstructing", 7) < error(weight, "upstream", 7)


def test_components_are_those_of_a_pca_with_classes_as_variables() -> None:
    """scikit-learn's, given features as samples: components, scores and shares."""
    decomposition = pytest.importorskip("sklearn.decomposition")
    weight = features()
    theirs = decomposition.PCA(6, svd_solver="full").fit(weight.mT.numpy())
    ours = components(weight)
    basis = torch.from_numpy(theirs.transform(weight.mT.numpy())).mT
    signs = torch.sign((ours.weights[:, :6].mT * torch.from_numpy(theirs.components_)).sum(1))
    assert torch.allclose(ours.weights[:, :6].mT * signs[:, None], torch.from_numpy(theirs.components_))
    assert torch.allclose(ours.basis[:6] * ours.sigma[:6, None] * signs[:, None], basis)
    assert torch.allclose(kept(ours.sigma)[:6], torch.from_numpy(theirs.explained_variance_ratio_).cumsum(0))
    for share in (0.5, 0.9, 0.95, 0.99):
        assert (
            rank_for(weight, share)
            == decomposition.PCA(share, svd_solver="full").fit(weight.mT.numpy()).n_components_
        )


def test_a_constant_row_adds_nothing_to_the_centred_variance() -> None:
    weight = features()
    weight[3] = 7.0
    assert float(components(weight).weights[3, :10].abs().max()) < 1e-10
    assert float(components(weight, centre=False).weights[3, 0].abs()) > 0.9


def test_signs_do_not_depend_on_the_solver() -> None:
    weights = components(features()).weights
    assert bool((weights.gather(0, weights.abs().argmax(0, keepdim=True)) > 0).all())


def test_variance_picks_one_rank_for_each_weight() -> None:
    weight = features(40, 30)
    curve = ClassPCA(variance=0.9).curve(weight, Metric())
    rank = rank_for(weight, 0.9)
    assert curve.sizes == (rank, None)
    share = kept(components(weight).sigma)
    assert float(share[rank - 1]) > 0.9 >= float(share[rank - 2])
    assert ClassPCA(rank=3).curve(weight, Metric()).sizes == (3, None)
    assert ClassPCA(rank=30).menu((40, 30)) == []  # saves nothing: stays dense
    assert ClassPCA(rank=30).curve(weight, Metric()).sizes == (None,)


def test_variance_of_nothing() -> None:
    assert rank_for(torch.ones(4, 5), 0.9) == 1
    assert not ClassPCA().fit(torch.ones(4, 5), Metric(), 2).to_dense().any()


def test_as_a_recipe_on_a_classifier() -> None:
    """The paper's: fixed rank, or 95 % of the variance; a layer that would not shrink stays dense."""
    hola = Recipe("hola", ClassPCA(), Frobenius(), fixed, "arXiv 2507.15542")
    assert Recipe.from_json(hola.to_json()) == hola
    dense = features(40, 30)
    for recipe, rank in ((hola, rank_for(dense, 0.95)), (hola(rank=3), 3), (hola(rank=30), None)):
        model = torch.nn.Sequential(torch.nn.Linear(30, 40).double())
        with torch.no_grad():
            model[0].weight.copy_(dense)
        x = torch.randn(5, 30, dtype=torch.float64)
        before = model(x).detach()
        factorize_(model, recipe)
        if rank is None:
            assert torch.equal(model(x), before)
            continue
        assert model[0].weight.rank == rank
        expected = x @ ClassPCA().fit(dense, Metric(), rank).to_dense().mT + model[0].bias
        assert torch.allclose(model(x), expected)


@pytest.mark.parametrize("options", [{}, {"rank": 71}, {"variance": None, "init": "upstream"}])
def test_json(options: dict[str, object]) -> None:
    method = ClassPCA(**options)
    assert from_json(Method.kinds, "method", method.to_json()) == method


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 0}, r"rank=0"),
        ({"rank": True}, r"rank=True"),
        ({"variance": 1.0}, r"variance=1.0\): a share"),
        ({"variance": True}, r"variance=True"),
        ({"init": "random"}, r"init='random'.*upstream"),
    ],
)
def test_bad_options(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ClassPCA(**options)


def test_bad_fits() -> None:
    with pytest.raises(ValueError, match="rank 21 of a matrix"):
        ClassPCA().fit(features(), Metric(), 21)
    with pytest.raises(ValueError, match="NaN or infinite"):
        ClassPCA().fit(torch.full((4, 4), float("nan")), Metric(), 2)
