"""The decomposed text features: start, routing of gradients, codes of new classes, and the page's numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from toy_hoi import unit

from rankfold.hoi.classes import from_consnet
from rankfold.hoi.decomposition import TRAINS, TextDecomposition, TextTable
from rankfold.hoi.text import prompts
from rankfold.hoi.text_encoder import TextEncoder
from rankfold.methods.class_pca import INITS, components, kept, rank_for
from rankfold.structures import LowRank

N, V, D = 30, 9, 16


def made(init: str = "reconstructing", rank: int = 7, **options: Any) -> TextDecomposition:
    text = TextDecomposition(N, V, D, rank=rank, **options)
    text.start_(unit(N, D), unit(V, D, seed=1), init)
    return text


def test_shapes_and_rows_of_actions() -> None:
    """idx = floor(r / 3) … r - 1; the action basis is the parameter's own rows."""
    assert [TextDecomposition(N, V, D, rank=r).first_action for r in (1, 2, 3, 7, 12)] == [0, 0, 1, 2, 4]
    assert TextDecomposition(600, 117, 512).first_action == 23
    text = made()
    assert isinstance(text.classes, LowRank)
    assert text.weights.shape == (N, 7) and text.basis.shape == (7, D)
    assert text.action_weights.shape == (V, 5) and text.action_basis.shape == (5, D)
    with torch.no_grad():
        text.basis[2] += 1
    assert torch.equal(text.action_basis, text.basis[2:])
    assert made(first_action=0).action_weights.shape == (V, 7)


@pytest.mark.parametrize(("width", "expected"), [(512, 84_568), (768, 102_744)])
def test_parameters_of_hico(width: int, expected: int) -> None:
    text = TextDecomposition(600, 117, width, rank=71)
    assert sum(p.numel() for p in text.parameters()) == expected


@pytest.mark.parametrize("init", INITS)
def test_start(init: str) -> None:
    text = made(init)
    target, basis = unit(N, D).double(), text.basis.detach().double()
    assert torch.allclose(text.basis.norm(dim=1), torch.ones(7))
    actions = unit(V, D, seed=1).double() @ torch.linalg.pinv(text.action_basis.double())
    assert torch.allclose(text.action_weights.double(), actions, atol=1e-5)
    least = (target - target @ torch.linalg.pinv(basis) @ basis).square().sum()
    if init == "upstream":
        assert torch.allclose(text.weights.mT @ text.weights, torch.eye(7), atol=1e-5)
        sigma = components(target).sigma[:7]
        assert text.residual() == pytest.approx(N + float((1 - 2 * sigma).sum()), rel=1e-4)
        assert text.residual() > 1.4 * float(least)
    else:
        assert text.residual() == pytest.approx(float(least), rel=1e-4)
    assert torch.equal(text.target, unit(N, D)) and torch.equal(text.action_target, unit(V, D, seed=1))


@pytest.mark.parametrize("trains", TRAINS)
def test_routing(trains: str) -> None:
    text = made(trains=trains)
    for features in (text.class_features(), text.action_features()):
        weights = text.weights if features.shape[0] == N else text.action_weights
        task = (features * unit(*features.shape)).sum()
        found = torch.autograd.grad(task, [weights, text.basis], allow_unused=True)
        assert [g is not None and bool(g.any()) for g in found] == [trains != "b", trains != "w"]
    assert torch.allclose(text.action_features().norm(dim=1), torch.ones(V))
    assert torch.allclose(text.class_features(), text.classes.to_dense())


def test_codes_of_new_classes() -> None:
    text, new = made(), unit(4, D, seed=5)
    exact = text.code(new)
    solved = torch.linalg.lstsq(text.basis.mT.double(), new.mT.double()).solution.mT
    assert torch.allclose(exact.double(), solved, atol=1e-5)
    errors = []
    for nonzeros in (1, 3, 7):
        codes = text.code(new, nonzeros)
        assert codes.shape == (4, 7) and codes.dtype == new.dtype
        assert ((codes != 0).sum(1) <= nonzeros).all()
        errors.append(float((codes @ text.basis.detach() - new).square().sum()))
    assert errors == sorted(errors, reverse=True)
    assert torch.allclose(codes, exact, atol=1e-4)
    one = text.code(new, 1)  # rows of B are orthonormal: the best atom is that of the largest product
    assert torch.equal(one.abs().argmax(1), (new @ text.basis.detach().mT).abs().argmax(1))
    own = text.class_features().detach()[:3]
    assert torch.allclose(text.code(own), text.weights[:3], atol=1e-5)


def test_a_state_dict_is_everything() -> None:
    text = made("upstream")
    with torch.device("meta"):
        empty = TextDecomposition(N, V, D, rank=7)
    empty.load_state_dict(text.state_dict(), assign=True)
    assert torch.equal(empty.class_features(), text.class_features())
    assert torch.equal(empty.action_features(), text.action_features())
    assert torch.equal(empty.target, text.target)


@pytest.mark.parametrize("trained", [True, False])
def test_tables_to_compare_with(trained: bool) -> None:
    table = TextTable(N, V, D, trained=trained)
    table.start_(unit(N, D), 2 * unit(V, D, seed=1), "upstream")
    assert torch.equal(table.class_features(), unit(N, D))
    assert torch.allclose(table.action_features(), unit(V, D, seed=1))
    assert sum(p.numel() for p in table.parameters()) == (N + V) * D * trained
    assert table.class_features().requires_grad == trained == table.action_features().requires_grad


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 17}, "rank=17 of 30 class features of width 16 must lie between 1 and 16"),
        ({"rank": 0}, "rank=0"),
        ({"first_action": 7}, "first_action=7 must be a row of the basis, 0 to 6"),
        ({"trains": "all"}, "trains='all'"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        made(**options)


def test_bad_features() -> None:
    for text in (TextDecomposition(N, V, D, rank=7), TextTable(N, V, D, trained=True)):
        before = {key: tensor.clone() for key, tensor in text.state_dict().items()}
        for classes, actions, init, says in (
            (unit(N, 8), unit(V, D), "pca", r"class features have shape \(30, 8\), the model \(30, 16\)"),
            (
                unit(N, D),
                unit(V + 1, D),
                "pca",
                r"action features have shape \(10, 16\), the model \(9, 16\)",
            ),
            (unit(N, D), unit(V, D) * float("nan"), "pca", "action features .* NaN or infinite"),
            (unit(N, D), unit(V, D), "best", "init='best'"),
        ):
            with pytest.raises(ValueError, match=says):
                text.start_(classes, actions, init)
        assert all(torch.equal(before[key], tensor) for key, tensor in text.state_dict().items())
    with pytest.raises(ValueError, match=r"features have shape \(2, 8\)"):
        made().code(unit(2, 8))
    with pytest.raises(ValueError, match="nonzeros=8 of atoms=7"):
        made().code(unit(2, D), 8)


# --- the page's numbers ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hico() -> Tensor:
    """all-MiniLM-L6-v2 features of the 600 prompts "a photo of a person boarding an airplane", "a photo of a
    person and an airplane", with unit rows."""
    try:
        table, encoder = from_consnet(), TextEncoder.open("minilm")
    except ValueError as error:  # how to install them
        pytest.skip(str(error))
    return F.normalize(encoder(prompts(table).classes), dim=-1)


@pytest.mark.slow
def test_real_texts_as_on_the_page(hico: Tensor) -> None:
    """Trap 1 and 2: shares of the variance, ranks for 95 %, and residuals, both orientations."""
    assert hico.shape == (600, 384)
    usual = (hico - hico.mean(0)).mT  # features as variables
    shares = [float(kept(components(hico).sigma)[70]), float(kept(components(usual, centre=False).sigma)[70])]
    assert shares == pytest.approx([0.949, 0.916], abs=5e-4)
    assert (rank_for(hico, 0.95), rank_for(usual, 0.95, centre=False)) == (72, 87)
    text = TextDecomposition(600, 117, 384, rank=71)
    residuals = []
    for init in ("upstream", "reconstructing"):
        text.start_(hico, unit(117, 384), init)
        residuals.append(text.residual())
    assert residuals == pytest.approx([363, 30.8], rel=2e-3)
