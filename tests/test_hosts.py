"""Hosts: a factorized layer does what the dense layer with the reconstructed weight does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rankfold import hosts as H
from rankfold import recipes, select
from rankfold.factorize import factorize_
from rankfold.hosts import hosts, is_conv1d
from rankfold.layers import Layer
from rankfold.structures import Dense, LowRank
from rankfold.testing import check_host

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "1x1": {"kernel_size": 1, "bias": False},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "uneven": {"kernel_size": (2, 5), "stride": (1, 3), "padding": (2, 1), "dilation": (2, 1)},
    "wide": {"kernel_size": (1, 7), "padding": (0, 3)},
    "tall": {"kernel_size": (5, 1), "stride": (2, 1)},
    "dilated": {"kernel_size": 3, "dilation": (2, 3), "padding": 2},
    "same": {"kernel_size": 3, "padding": "same"},
    "same, even": {"kernel_size": (4, 2), "padding": "same"},
    "same, dilated": {"kernel_size": (2, 3), "padding": "same", "dilation": 3},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "circular": {"kernel_size": (3, 2), "padding": (1, 2), "padding_mode": "circular"},
    "replicate, same": {"kernel_size": (4, 3), "padding": "same", "padding_mode": "replicate"},
}


# torch itself warns that an even kernel with 'same' copies its input
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("spatial", [False, True], ids=["channel", "spatial"])
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=list(CONVOLUTIONS))
def test_convolution(options: dict[str, Any], spatial: bool) -> None:
    check_host(nn.Conv2d(3, 4, **options), torch.randn(2, 3, 11, 13), spatial=spatial)


@pytest.mark.parametrize("spatial", [False, True], ids=["channel", "spatial"])
def test_rows_of_a_convolution_are_what_its_matrix_multiplies(spatial: bool) -> None:
    """The inputs and outputs that calibration sees belong to the matrix that is factorized."""
    conv = nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=False)
    layer, x = Layer(conv, spatial), torch.randn(2, 3, 9, 8)
    rows = layer.inputs(x)
    y = conv(x)
    gradient = torch.randn_like(y)
    # <gradient, conv(x)> is the same sum, read through the matrix.
    through = ((rows @ layer.matrix().mT) * layer.outputs(gradient, x)).sum()
    torch.testing.assert_close(through, (gradient * y).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 4), (1, 7), (7, 1), (4, 9)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_linear(shape: tuple[int, int], bias: bool, lead: tuple[int, ...]) -> None:
    check_host(nn.Linear(shape[1], shape[0], bias=bias), torch.randn(*lead, shape[1]))


def test_embedding() -> None:
    check_host(nn.Embedding(7, 4, padding_idx=2), torch.randint(7, (2, 3)))
    check_host(nn.Embedding(7, 4).eval(), torch.tensor(6))


def test_conv1d_is_transposed() -> None:
    from transformers.pytorch_utils import Conv1D

    module = Conv1D(5, 3)
    nn.init.normal_(module.bias)
    assert is_conv1d(module) and Layer(module).shape == (5, 3)
    check_host(module, torch.randn(2, 3))
    dense = Layer(module).wrap(Dense.of(Layer(module).matrix())).to_dense()
    assert type(dense) is Conv1D
    assert torch.equal(dense.weight, module.weight) and torch.equal(dense.bias, module.bias)


def test_a_host_answers_for_its_weight() -> None:
    host = Layer(nn.Linear(4, 6).bfloat16()).wrap(LowRank((6, 4), rank=2, dtype=torch.bfloat16))
    assert isinstance(host, H.Linear)
    assert (host.in_features, host.out_features) == (4, 6)
    assert (host.weight.dtype, host.weight.device.type, host.weight.shape) == (torch.bfloat16, "cpu", (6, 4))
    assert set(host.state_dict()) == {"weight.left.weight", "weight.right.weight", "bias"}


def test_bias_and_mode_are_carried_over_not_copied() -> None:
    module = nn.Linear(4, 6).eval()
    host = Layer(module).wrap(LowRank((6, 4), rank=2))
    assert host.bias is module.bias and not host.training and not host.weight.training


def test_a_structure_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 6\) cannot replace a matrix of shape \(6, 4\)"):
        Layer(nn.Linear(4, 6)).wrap(LowRank((4, 6), rank=2))
    with pytest.raises(ValueError, match=r"shape \(4, 26\) fits a convolution as \(4, 27\) or \(12, 9\)"):
        H.Conv2d(LowRank((4, 26), rank=1), None, vars(nn.Conv2d(3, 4, 3)))


class Net(nn.Module):
    """A small network for images: plain, strided and grouped convolutions, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.grouped = nn.Conv2d(12, 12, 3, padding="same", groups=4)
        self.body = nn.Conv2d(12, 16, (3, 5), stride=2, padding=1, dilation=(1, 2))
        self.up = nn.ConvTranspose2d(16, 8, 2)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        x = self.body(self.grouped(self.stem(x).relu()).relu()).relu()
        return self.fc(self.norm(self.up(x)).mean((-1, -2)))


@pytest.mark.parametrize("conv", ["channel", "spatial"])
@pytest.mark.parametrize("name", ["svd", "svd_llm", "fwsvd", "kfac"])
def test_a_convolutional_network(conv: str, name: str) -> None:
    model = Net().eval()
    x = torch.randn(6, 3, 12, 14)
    labels = torch.randint(10, (6,))
    report = factorize_(model, recipes.get(name), budget=0.6, batches=[(x, labels)], conv=conv)
    assert 0 < report.reached <= 0.6
    assert set(hosts(model)) <= {"stem", "body", "fc"}
    skipped = {row.name: row.reason for row in report.skipped}
    assert skipped["grouped.weight"] == "grouped convolution (4 groups)"
    assert "ConvTranspose2d is not" in skipped["up.weight"]
    assert set(skipped) == {"grouped.weight", "up.weight"}
    after = model(x)
    for each, host in hosts(model).items():
        model.set_submodule(each, host.to_dense())
    torch.testing.assert_close(model(x), after, rtol=1e-4, atol=1e-5)


def test_grouped_convolution_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"'grouped' matches only layers that cannot.*grouped convolution \(4 groups\)"
    ):
        select(Net(), ["grouped"])


def test_convolution_with_the_whole_rank_changes_nothing() -> None:
    model, x = Net().eval(), torch.randn(2, 3, 12, 14)
    before = model(x)
    for name, layer in select(model, ["stem", "body"], conv="spatial").items():
        full = recipes.svd.method.fit(
            layer.matrix(), recipes.svd.metric(model, {name: layer})[name], min(layer.shape)
        )
        model.set_submodule(name, layer.wrap(full))
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_multihead_attention_inside_stays_dense_and_is_reported() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
            self.fc = nn.Linear(16, 16)

        def forward(self, x):
            return self.fc(self.attention(x, x, x, need_weights=False)[0])

    model, x = Block().eval(), torch.randn(2, 5, 16)
    before = model.attention(x, x, x, need_weights=False)[0]
    report = factorize_(model, recipes.svd, budget=0.5)
    assert list(hosts(model)) == ["fc"]
    assert torch.equal(model.attention(x, x, x, need_weights=False)[0], before)
    reasons = {row.name: row.reason for row in report.skipped}
    assert reasons["attention.in_proj_weight"] == "a bare parameter of MultiheadAttention, not a layer"
    assert "NonDynamicallyQuantizableLinear" in reasons["attention.out_proj.weight"]
