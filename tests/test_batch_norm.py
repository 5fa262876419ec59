"""Batch norm recalibrated: the average of one pass, and everything else as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankfold.batch_norm import recalibrate_


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten())
    model.extend([nn.Linear(4 * 36, 5), nn.BatchNorm1d(5, momentum=0.3)])
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_statistics_are_the_mean_over_batches() -> None:
    model = net().eval()
    parts = torch.randn(32, 3, 8, 8).split(8)
    with torch.no_grad():  # statistics of earlier batches must not remain
        model[1].running_mean.fill_(7.0)
        model[1].running_var.fill_(9.0)
    assert recalibrate_(model, parts) == 2
    with torch.no_grad():
        seen = [model[0](part) for part in parts]
    mean = torch.stack([y.mean((0, 2, 3)) for y in seen]).mean(0)
    var = torch.stack([y.transpose(0, 1).flatten(1).var(1) for y in seen]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, var)
    assert int(model[1].num_batches_tracked) == 4
    assert (model[1].momentum, model[6].momentum) == (0.1, 0.3)
    assert not any(module.training for module in model.modules())


def test_batches_count_the_same_whatever_their_size() -> None:
    model, x = net(), torch.randn(12, 3, 8, 8)
    recalibrate_(model, [x[:8], x[8:]])
    with torch.no_grad():
        means = [model[0](part).mean((0, 2, 3)) for part in (x[:8], x[8:])]
    torch.testing.assert_close(model[1].running_mean, (means[0] + means[1]) / 2)


def test_batch_norm_after_another_sees_batch_statistics() -> None:
    """In the pass the first norm normalises by the batch, as in training: one pass settles all of them."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    recalibrate_(model, [5 + 4 * torch.randn(64, 3)])
    torch.testing.assert_close(model[1].running_mean, torch.zeros(3), atol=1e-5, rtol=0)


def test_other_modules_are_in_eval_mode_and_modes_come_back() -> None:
    model = net().train()
    model[0].eval()
    model[6].weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    torch.manual_seed(0)
    recalibrate_(model, [torch.randn(16, 3, 8, 8)])
    dropped = state(model)
    torch.manual_seed(0)
    recalibrate_(model, [torch.randn(16, 3, 8, 8)])
    assert same(model, dropped)  # no dropout
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_tensor_is_cut_into_equal_batches() -> None:
    one, x = net(), torch.randn(130, 3, 8, 8)  # 128 + 2 would be a poor last batch
    other = net()
    other.load_state_dict(one.state_dict())
    recalibrate_(one, x)
    recalibrate_(other, [x[:65], x[65:]])
    assert same(one, state(other))


@pytest.mark.parametrize("form", ["pair", "mapping"])
def test_forms_of_a_batch(form: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, pixels: Tensor) -> Tensor:
            return self.norm(pixels)

    model, x = Named(), 3 + torch.randn(9, 3)
    batch: Any = (x, torch.zeros(9)) if form == "pair" else {"pixels": x, "labels": torch.zeros(9)}
    assert recalibrate_(model, [batch]) == 1
    torch.testing.assert_close(model.norm.running_mean, x.mean(0))


def test_without_batch_norm_nothing_happens() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.LayerNorm(3))
    before = state(model)
    assert recalibrate_(model, []) == 0 and recalibrate_(model, torch.randn(4, 3)) == 0
    assert same(model, before)


def test_a_norm_that_does_not_run_keeps_its_statistics() -> None:
    class Half(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](x)

    model = Half(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[1].running_mean.fill_(4.0)
    assert recalibrate_(model, [torch.randn(8, 3)]) == 1
    assert model[1].running_mean.tolist() == [4.0] * 3


@pytest.mark.parametrize("batches", [[], torch.zeros(0, 3, 8, 8), iter(())])
def test_no_batches(batches: Any) -> None:
    model = net()
    before = state(model)
    with pytest.raises(ValueError, match="2 batch norms from data, but got 0 batches"):
        recalibrate_(model, batches)
    assert same(model, before)


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = net().train()
    before = state(model)
    with pytest.raises(RuntimeError):
        recalibrate_(model, [torch.randn(8, 3, 8, 8), torch.randn(8, 2, 8, 8)])
    with pytest.raises(ValueError, match=r"batch norm '1'.*NaN"):
        recalibrate_(model, [torch.full((8, 3, 8, 8), torch.nan)])
    assert same(model, before) and model[1].momentum == 0.1
    assert all(module.training for module in model.modules())
