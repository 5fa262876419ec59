"""The reading on a grid of tokens: where it is LoRA, where it is not, and the geometry of grids."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankfold.token_wavelet import TokenWara, token_wara_

LINEAR = r"the transform cancels, this is plain LoRA"


def made(**options: Any) -> TokenWara:
    """Around a layer (12, 8) in float64, with factors that are not zero."""
    torch.manual_seed(0)
    module = TokenWara(nn.Linear(8, 12).double(), 3, **options)
    with torch.no_grad():
        module.left.normal_()
    return module


def lora(module: TokenWara, x: Tensor) -> Tensor:
    """The same factors as plain LoRA, on the tokens of the grid."""
    y, update = module.host(x), module.scale * (x @ module.right.mT) @ module.left.mT
    return torch.cat([y[:, : module.leading], (y + update)[:, module.leading :]], 1)


@pytest.mark.parametrize("wavelet", ["db1", "db2", "sym4"])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (7, 7), (2, 9)])
def test_shared_and_linear_is_lora(grid: tuple[int, int], wavelet: str) -> None:
    x = torch.randn(2, 1 + grid[0] * grid[1], 8, dtype=torch.float64)
    with pytest.warns(UserWarning, match=LINEAR):
        module = made(grid=grid, wavelet=wavelet, activation=None, alpha=6.0)
    torch.testing.assert_close(module(x), lora(module, x), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(
    "options",
    [{}, {"activation": None, "scales": True}, {"activation": None, "bands": ("LL1", "HH1")}],
    ids=str,
)
def test_what_ships_is_not_lora(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = made(**options)
    x = torch.randn(2, 17, 8, dtype=torch.float64)
    if module.scales is not None:
        with torch.no_grad():
            module.scales.copy_(torch.tensor([1.0, 0.5, 2.0, -1.0]))
    update, other = module(x) - module.host(x), lora(module, x) - module.host(x)
    assert (update - other).norm() > 0.1 * other.norm()


def test_outputs_are_unchanged_at_the_start_and_only_the_adapter_trains() -> None:
    host = nn.Linear(8, 12)
    module, x = TokenWara(host, 3, scales=True), torch.randn(2, 17, 8)
    assert torch.equal(module(x), host(x))
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {"left", "right", "scales"}
    module(x).square().sum().backward()
    assert module.left.grad is not None and module.left.grad.abs().max() > 0 and host.weight.grad is None
    assert {"left", "right", "scales"} == {key for key in module.state_dict() if "host" not in key}


def test_tokens_before_the_grid_pass() -> None:
    for leading in (0, 1, 5):
        module = made(leading=leading)
        x = torch.randn(2, leading + 16, 8, dtype=torch.float64)
        y, plain = module(x), module.host(x)
        assert torch.equal(y[:, :leading], plain[:, :leading])
        assert not torch.allclose(y[:, leading:], plain[:, leading:])
        x[:, :leading] += 1
        assert torch.equal(module(x)[:, leading:], y[:, leading:]), "and nothing of them reaches the grid"


def test_resolutions_vary_within_one_run() -> None:
    module = made(wavelet="db2")
    for side in (4, 7, 2, 14):
        assert module(torch.randn(1, 1 + side * side, 8, dtype=torch.float64)).shape == (
            1,
            1 + side * side,
            12,
        )
    module.grid = (3, 5)
    assert module(torch.randn(1, 16, 8, dtype=torch.float64)).shape == (1, 16, 12)
    for tokens, says in ((17, r"grid=\(3, 5\) has 15 tokens, not 16"), (1, "not 0")):
        with pytest.raises(ValueError, match=says):
            module(torch.randn(1, tokens, 8, dtype=torch.float64))
    module.grid = None
    with pytest.raises(ValueError, match=r"15 tokens are no square; set grid"):
        module(torch.randn(1, 16, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"takes \(batch, tokens, features\)"):
        module(torch.randn(16, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"levels=1 is too deep for a matrix \(1, 1\)"):
        module(torch.randn(1, 2, 8, dtype=torch.float64))


def test_gradcheck() -> None:
    module = made(grid=(3, 4), leading=0, wavelet="db2")
    x = torch.randn(1, 12, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,))


def test_bfloat16_hosts_get_float32_factors() -> None:
    module = TokenWara(nn.Linear(8, 12).bfloat16(), 3)
    assert module.left.dtype == torch.float32
    assert module(torch.randn(2, 17, 8).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 9}, r"rank=9\): 1 to 8 for a layer \(12, 8\)"),
        ({"alpha": -1.0}, r"alpha=-1\.0"),
        ({"activation": "tanh"}, "activation='tanh'"),
        ({"levels": 0}, "levels=0"),
        ({"leading": -1}, "leading=-1"),
        ({"bands": ("LL2",)}, "each once, out of LL1, LH1, HL1, HH1"),
        ({"bands": ()}, "each once"),
        ({"bands": ("LL1", "LL1")}, "each once"),
        ({"wavelet": "bior2.2"}, "is biorthogonal"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TokenWara(nn.Linear(8, 12), **{"rank": 2, **options})
    with pytest.raises(ValueError, match="ReLU has no in_features"):
        TokenWara(nn.ReLU(), 2)


def test_on_a_vision_model() -> None:
    from transformers import ViTConfig, ViTModel

    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = ViTModel(ViTConfig(**sizes, intermediate_size=32, image_size=20, patch_size=4)).eval()
    x = torch.randn(2, 3, 20, 20)
    before = model(x).last_hidden_state
    layers = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layer" in name
    ]
    found = token_wara_(model, layers, 2, seed=1)
    assert list(found) == layers and torch.equal(model(x).last_hidden_state, before)
    one, two = list(found.values())[:2]
    assert not torch.equal(one.right, two.right)
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"left", "right"}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        model(x).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(model(x).last_hidden_state, before)


def test_a_layer_that_does_not_fit_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    with pytest.raises(ValueError, match=r"layer '1': .*ReLU has no in_features"):
        token_wara_(model, ["0", "1"], 2)
    assert all(p.requires_grad for p in model.parameters()) and type(model[0]) is nn.Linear
