"""FWSVD, the factorization: the paper's vector, the floor, the axes, what stays dense."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold import recipes
from rankfold.factorize import factorize_
from rankfold.layers import select
from rankfold.methods import SVD
from rankfold.metric import Metric
from rankfold.metrics import Fisher
from rankfold.observe import observe

# The vector of the page papers/fwsvd.md: a weight, and the Fisher of each of its entries.
WEIGHT = torch.tensor([[1.0, 2, 0], [0, 1, 3]], dtype=torch.float64)
ENTRIES = torch.tensor([[1.0, 3, 0.25], [3, 6, 0]], dtype=torch.float64)


class Scaled(nn.Module):
    """A model with a loss of its own, times a constant."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.last, self.scale = nn.Linear(24, 20), nn.Linear(20, 1), scale

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        logits = self.last(torch.tanh(self.layer(x)))
        loss = None if labels is None else self.scale * (logits[:, 0] - labels).square().mean()
        return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]


def test_scaling_the_loss_changes_nothing() -> None:
    """The floor is relative, so that 1e-6 of the loss is as good as all of it."""
    x, y = torch.randn(6, 24).double(), torch.randn(6).double()
    batches = [{"x": x[i : i + 1], "labels": y[i : i + 1]} for i in range(6)]
    products = []
    for scale in (1.0, 1e-6):
        model = Scaled(scale).double()
        report = factorize_(model, recipes.fwsvd, budget=0.5, batches=batches, targets=["layer"])
        assert report.layers[0].structure == "low_rank"
        products.append(model.layer.weight.to_dense())  # type: ignore[union-attr, operator]
    torch.testing.assert_close(
        products[0], products[1], rtol=1e-4, atol=1e-6
    )  # gradients are squared in float32


def test_dead_inputs_stay_finite() -> None:
    """Columns of zero Fisher are floored, not divided by: finite factors, and live columns kept."""
    model = nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 3))
    x, y = torch.randn(8, 24), torch.randint(3, (8,))
    x[:, :6] = 0
    metric = Fisher()(model, select(model, ["0"]), [(x, y)])["0"]
    assert metric.right is not None and metric.right.min() > 0
    assert metric.right[:6].max() < 1e-5 < metric.right[6:].min()
    weight = model[0].weight.detach().clone()
    factorize_(model, recipes.fwsvd, budget=0.5, batches=[(x, y)], targets=["0"])
    after = model[0].weight.to_dense()  # type: ignore[union-attr, operator]
    assert torch.isfinite(after).all()
    assert (after - weight)[:, 6:].norm() < 0.8 * weight[:, 6:].norm()


def test_the_pages_vector() -> None:
    f = ENTRIES.sum(0)
    assert f.tolist() == [4, 9, 0.25]
    metric = Metric(right=f)
    approximation = SVD().fit(WEIGHT, metric, 1).to_dense().detach()
    expected = [[0.812017, 2.014732, 1.172097], [0.390699, 0.969381, 0.563950]]
    torch.testing.assert_close(approximation, torch.tensor(expected).double(), rtol=0, atol=1e-6)
    residual = WEIGHT - approximation
    assert metric.error(residual) == pytest.approx(2.589362, abs=1e-6)
    assert float(residual.square().sum()) == pytest.approx(7.497287, abs=1e-6)
    plain = WEIGHT - SVD().fit(WEIGHT, Metric(), 1).to_dense().detach()
    assert metric.error(plain) == pytest.approx(25.605478, abs=1e-6)
    assert float(plain.square().sum()) == pytest.approx(4.298437, abs=1e-6)
    quarter = WEIGHT - SVD().fit(WEIGHT, Metric(right=f**0.5), 1).to_dense().detach()
    assert metric.error(quarter) == pytest.approx(2.951174, abs=1e-6)
    wrong = WEIGHT - SVD().fit(WEIGHT, Metric(left=ENTRIES.sum(1)), 1).to_dense().detach()
    assert metric.error(wrong) == pytest.approx(30.175757, abs=1e-6)


def test_axes_and_power() -> None:
    """right = f^(2·power): the factorization scales by its root, so that the paper's exponent on f is ½."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    layers, batches = select(model, ["0"]), [(torch.randn(6, 6), torch.randint(3, (6,)))]
    by_out, by_in = observe(model, layers, batches, fisher=True, labels="data").fisher["0"]

    def metric(**options: Any) -> Metric:
        return Fisher(eps=0.0, **options)(model, layers, batches)["0"]

    paper, outer, both = metric(), metric(axes="out"), metric(axes="both")
    assert paper.left is None and outer.right is None
    assert paper.right is not None and outer.left is not None
    torch.testing.assert_close(paper.right, by_in / by_in.mean())
    torch.testing.assert_close(outer.left, by_out / by_out.mean())
    assert both.left is not None and both.right is not None
    assert torch.equal(both.left, outer.left) and torch.equal(both.right, paper.right)
    quarter = metric(power=0.25).right
    assert quarter is not None
    torch.testing.assert_close(quarter, paper.right.sqrt())
    with pytest.raises(ValueError, match="axes='rows'"):
        Fisher(axes="rows")


def test_conv1d_equals_linear() -> None:
    from transformers.pytorch_utils import Conv1D

    one = nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 3)).double()
    other = nn.Sequential(Conv1D(20, 24), nn.Tanh(), nn.Linear(20, 3)).double()
    with torch.no_grad():
        other[0].weight.copy_(one[0].weight.mT)
        other[0].bias.copy_(one[0].bias)
        other[2].load_state_dict(one[2].state_dict())
    batches = [(torch.randn(8, 24).double(), torch.randint(3, (8,)))]
    for model in (one, other):
        factorize_(model, recipes.fwsvd, budget=0.5, batches=batches, targets=["0"])
    torch.testing.assert_close(one[0].weight.to_dense(), other[0].weight.to_dense())  # type: ignore[union-attr, operator]
    torch.testing.assert_close(one(batches[0][0]), other(batches[0][0]))


def test_no_rank_that_saves_nothing() -> None:
    """576 x 192 breaks even at 144: a budget of all bytes keeps the layer, and no budget ever adds bytes."""
    assert all(r * (576 + 192) < 576 * 192 for r in SVD(multiple=1).menu((576, 192)))
    model = nn.Sequential(nn.Linear(192, 576), nn.Linear(576, 2))
    x, y = torch.randn(4, 192), torch.randint(2, (4,))
    report = factorize_(model, recipes.fwsvd, budget=1.0, batches=[(x, y)], targets=["0"])
    assert isinstance(model[0], nn.Linear) and report.layers[0].structure == "dense"
    for keep in (0.3, 0.5, 0.7, 0.9):
        model = nn.Sequential(nn.Linear(192, 576), nn.Linear(576, 2))
        before = sum(p.numel() for p in model.parameters())
        row = factorize_(model, recipes.fwsvd, budget=keep, batches=[(x, y)], targets=["0"]).layers[0]
        assert row.size is not None and row.size <= math.floor(keep * 144)
        assert sum(p.numel() for p in model.parameters()) < before
        assert row.params_after == row.size * (576 + 192) <= keep * 576 * 192


def test_factors_train_and_keep_their_gradients() -> None:
    model = nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 3))
    x, y = torch.randn(8, 24), torch.randint(3, (8,))
    factorize_(model, recipes.fwsvd, budget=0.5, batches=[(x, y)], targets=["0"])
    F.cross_entropy(model(x), y).backward()
    factors = [p for name, p in model.named_parameters() if name.startswith("0.weight.")]
    assert len(factors) == 2 and all(p.grad is not None and p.grad.abs().sum() > 0 for p in factors)
