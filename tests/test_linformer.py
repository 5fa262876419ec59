"""Linformer attention, and what dense, low-rank and Linformer layers cost: exact integers, then counted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rankfold.attention import MultiheadAttention, unpack_attention_
from rankfold.automatic import auto_, plan
from rankfold.hosts import hosts
from rankfold.linformer import LinformerAttention, crossover_length, layer_flops, share_positions_

# length, dense, low rank, Linformer; d = 512, f = 2048, r = 64, k = 128
TABLE = [
    (64, 411_041_792, 83_886_080, 436_207_616),
    (128, 838_860_800, 184_549_376, 872_415_232),
    (512, 3_758_096_384, 1_140_850_688, 3_489_660_928),
    (1024, 8_589_934_592, 3_355_443_200, 6_979_321_856),
    (2048, 21_474_836_480, 11_005_853_696, 13_958_643_712),
    (2752, 32_824_623_104, 18_756_927_488, 18_756_927_488),
    (4096, 60_129_542_144, 39_191_576_576, 27_917_287_424),
]


def encoder_layer(d: int, f: int, *, rank: int | None = None, k: int | None = None, n: int = 1) -> nn.Module:
    layer = nn.TransformerEncoderLayer(d, 4, f, dropout=0.0, batch_first=True)
    if k is not None:
        layer.self_attn = LinformerAttention(d, 4, n, k, batch_first=True)  # type: ignore[assignment]
    unpack_attention_(layer)
    if rank is not None:
        auto_(layer, rank, solver="random")
    return layer


def counted(layer: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        layer(x)
    return counter.get_total_flops()


@pytest.mark.parametrize(("length", "dense", "low", "linformer"), TABLE)
def test_flops_of_the_page(length: int, dense: int, low: int, linformer: int) -> None:
    assert layer_flops(length, 512, 2048) == dense
    assert layer_flops(length, 512, 2048, rank=64) == low
    assert layer_flops(length, 512, 2048, k=128) == linformer


def test_flops_are_what_the_counter_counts() -> None:
    """At the sizes of the page, on the meta device: nothing is computed."""
    low = encoder_layer(512, 2048, rank=64).to("meta")
    with torch.device("meta"):
        dense, linformer = encoder_layer(512, 2048), encoder_layer(512, 2048, k=128, n=4096)
        for length, *wanted in TABLE:
            x = torch.randn(1, length, 512)
            assert [counted(layer, x) for layer in (dense, low, linformer)] == wanted


def test_flops_of_low_rank_layers_are_counted_too() -> None:
    """Batch 2; the low-rank layer, the Linformer layer, and both in one."""
    for sizes in ({}, {"rank": 4}, {"k": 16}, {"rank": 4, "k": 16}):
        layer = encoder_layer(32, 64, n=160, **sizes)
        for length in (64, 96, 160):
            x = torch.randn(2, length, 32)
            assert counted(layer, x) == 2 * layer_flops(length, 32, 64, **sizes), (sizes, length)


def test_crossover() -> None:
    """n* is where low rank and Linformer cost the same, and they change places there."""
    assert crossover_length(512, 2048, 64, 128) == 2752
    assert crossover_length(64, 128, 16, 64) == 272
    for d, f, r, k in ((512, 2048, 64, 128), (64, 128, 16, 64), (768, 3072, 100, 256)):
        star = crossover_length(d, f, r, k)
        for length, cheaper in ((math.floor(star) - 1, "rank"), (math.floor(star) + 1, "k")):
            low, linformer = layer_flops(length, d, f, rank=r), layer_flops(length, d, f, k=k)
            assert (low < linformer) == (cheaper == "rank"), (d, length)
    # The counter agrees at n*: two layers of the second sizes, at length 272.
    x = torch.randn(1, 272, 64)
    one, two = encoder_layer(64, 128, rank=16), encoder_layer(64, 128, k=64, n=272)
    assert counted(one, x) == counted(two, x) == layer_flops(272, 64, 128, rank=16)


def test_linformer_beats_dense_from_twice_k() -> None:
    for length, less in ((256, False), (257, True)):
        assert (layer_flops(length, 512, 2048, k=128) < layer_flops(length, 512, 2048)) == less


def test_parameters_of_the_page() -> None:
    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(512, 8, 2048)
        assert count(layer) == 3_152_384
        planned = plan(layer, 64)
        assert (planned.params_before, planned.params_after) == (3_152_384, 596_480)
        dense = count(MultiheadAttention(512, 8))
        for sharing, extra in (("none", 8 * 589_824), ("headwise", 589_824), ("kv", 294_912)):
            made = LinformerAttention(512, 8, 2304, 128, sharing=sharing)
            assert count(made) == dense + extra, sharing


def saved_bytes(layer: nn.Module, length: int) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once, parameters aside."""
    kept: dict[int, Tensor] = {}
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(2, length, 32, requires_grad=True)
    with saved_tensors_hooks(pack, lambda tensor: tensor), sdpa_kernel(SDPBackend.MATH):
        y = layer(x)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del y
    return total


def test_saved_activations() -> None:
    """Second differences in n: a linear function has none, and a n² has 2 a h²."""
    curvature = {}
    for name, sizes in (("dense", {}), ("low", {"rank": 4}), ("linformer", {"k": 16})):
        layer = encoder_layer(32, 64, n=192, **sizes)
        one, two, three = (saved_bytes(layer, length) for length in (64, 128, 192))
        curvature[name] = three - 2 * two + one
    assert curvature["linformer"] == 0
    assert curvature["low"] == curvature["dense"] > 0
    assert curvature["dense"] % (2 * 64**2 * 2 * 4 * 4) == 0  # copies of scores: batch 2, 4 heads, 4 bytes


def linformer(**options: Any) -> LinformerAttention:
    sizes = {"embed_dim": 16, "num_heads": 4, "max_length": 12, "k": 5, "batch_first": True}
    return LinformerAttention(**(sizes | options))


@pytest.mark.parametrize("sharing", ["none", "headwise", "kv", "layerwise"])
@pytest.mark.parametrize("project", ["after", "before"])
def test_identity_positions_are_dense_attention(sharing: str, project: str) -> None:
    if (sharing, project) == ("none", "before"):
        with pytest.raises(ValueError, match="has no heads yet"):
            linformer(sharing=sharing, project=project)
        return
    made = linformer(k=12, sharing=sharing, project=project)
    with torch.no_grad():
        for positions in (made.E, made.F):
            if positions is not None:
                positions.copy_(torch.eye(12).expand_as(positions))
        for layer in (made.q_proj, made.k_proj, made.v_proj):
            nn.init.normal_(layer.bias)
    dense = MultiheadAttention(16, 4, batch_first=True)
    dense.load_state_dict({k: v for k, v in made.state_dict().items() if k not in ("E", "F")})
    x = torch.randn(3, 12, 16)
    torch.testing.assert_close(made(x, x, x)[0], dense(x, x, x, need_weights=False)[0], rtol=0, atol=2e-6)


def test_the_bias_is_mixed_after_and_not_before() -> None:
    """E(x Wᵀ + b) has the row sums of E times b, (E x) Wᵀ + b has b."""
    for project in ("after", "before"):
        made, x = linformer(project=project), torch.randn(2, 12, 16)
        with torch.no_grad():
            nn.init.normal_(made.v_proj.bias)
        values = made._mixed(x, made.v_proj, made.F, None).transpose(1, 2).flatten(2)
        offset = made.v_proj.bias * (made.F.sum(1, keepdim=True) if project == "after" else 1)
        torch.testing.assert_close(values, made.F @ (x @ made.v_proj.weight.mT) + offset)


@pytest.mark.parametrize("project", ["after", "before"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_what_is_in_a_pad_changes_nothing(project: str, batch_first: bool) -> None:
    made, x = linformer(project=project, batch_first=batch_first), torch.randn(2, 9, 16)
    nn.init.normal_(made.k_proj.bias)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    other = x.masked_fill(padding.unsqueeze(-1), 7.0)
    out = []
    for rows in (x, other):
        y = rows if batch_first else rows.transpose(0, 1)
        for mask in (padding, torch.where(padding, -math.inf, 0.0)):
            z = made(y, y, y, key_padding_mask=mask)[0]
            out.append((z if batch_first else z.transpose(0, 1))[~padding])
    assert all(torch.equal(out[0], each) for each in out[1:])
    # A shorter sequence takes the first columns of E: the same as the padded one.
    short = x[1:, :6] if batch_first else x[1:, :6].transpose(0, 1)
    alone = made(short, short, short)[0].reshape(6, 16)
    torch.testing.assert_close(alone, out[0][9:], rtol=0, atol=2e-6)
    row = x[1, :6]
    bare, weights = made(row, row, row)
    torch.testing.assert_close(bare, alone, rtol=0, atol=2e-6)
    assert weights is None


def test_limits() -> None:
    made, x = linformer(), torch.randn(2, 13, 16)
    with pytest.raises(ValueError, match=r"length 13 .* at most max_length=12"):
        made(x, x, x)
    y = x[:, :12]
    with pytest.raises(ValueError, match="cannot be causal"):
        made(y, y, y, is_causal=True)
    with pytest.raises(ValueError, match="takes no attn_mask"):
        made(y, y, y, attn_mask=torch.zeros(12, 12))
    with pytest.raises(ValueError, match="query, key and value are one tensor"):
        made(y, y.clone(), y)
    with pytest.raises(ValueError, match="no weights over positions"):
        made(y, y, y, need_weights=True)
    with pytest.raises(ValueError, match=r"it must be \(2, 12\)"):
        made(y, y, y, key_padding_mask=torch.zeros(2, 11))
    for options in ({"k": 13}, {"k": 0}, {"sharing": "all"}, {"project": "both"}, {"init": "zeros"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            linformer(**options)
    for bad in ({"rank": 0}, {"k": 0}):
        with pytest.raises(ValueError, match="must be a positive integer"):
            layer_flops(64, 32, 64, **bad)


def test_init() -> None:
    """Xavier with gain 1/√2, or within ±1/√k; by head where each has its own."""
    for init, bound in (("xavier", math.sqrt(3 / (32 + 96))), ("uniform", 1 / math.sqrt(32))):
        for sharing in ("none", "headwise"):
            made = linformer(max_length=96, k=32, init=init, sharing=sharing)
            for matrix in made.E.detach().view(-1, 32, 96):
                assert 0.97 * bound < matrix.abs().max() <= bound
            assert made.F is not None and not torch.equal(made.E, made.F)


def test_in_torch_s_encoder() -> None:
    """Train and eval, pads, one E for all layers, and low-rank projections; all of it learns."""
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    layer.self_attn = linformer(sharing="layerwise")  # type: ignore[assignment]
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    with_three = sum(p.numel() for p in model.parameters())
    assert share_positions_(model) == 3
    assert sum(p.numel() for p in model.parameters()) == with_three - 2 * 5 * 12
    report = auto_(model, 3)
    assert len(hosts(model)) == 18 and {row.name for row in report.skipped} == {"layers.0.self_attn.E"}
    x, padding = torch.randn(2, 12, 16), torch.zeros(2, 12, dtype=torch.bool)
    padding[0, 9:] = True
    trained = model(x, src_key_padding_mask=padding)
    trained.square().sum().backward()
    assert all(
        p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "k_proj.bias" not in n
    )
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x, src_key_padding_mask=padding), trained)
    with pytest.raises(ValueError, match="no LinformerAttention with sharing='layerwise'"):
        share_positions_(linformer())
