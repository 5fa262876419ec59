"""Attention from four layers is torch's attention, in every way that torch can be asked for it."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold
from rankfold.attention import MultiheadAttention, unpack_attention_
from rankfold.automatic import auto_
from rankfold.hosts import hosts
from rankfold.recipes import svd

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}
NESTED = "ignore:The PyTorch API of nested tensors:UserWarning"


def near(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=0, atol=TOLERANCE[one.dtype], equal_nan=True)


def pair(**options: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """Torch's attention with biases that are not zero, and ours."""
    packed = nn.MultiheadAttention(16, 4, **options)
    for name, parameter in packed.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return packed, MultiheadAttention.of(packed)


def masks(kind: str, batch: int, length: int, keys: int) -> dict[str, Tensor]:
    padding = torch.zeros(batch, keys, dtype=torch.bool)
    padding[1, keys - 2 :] = True
    between = torch.rand(length, keys) < 0.3
    between[:, 0] = False
    several = torch.rand(batch * 4, length, keys) < 0.3
    several[:, :, 0] = False
    added = torch.randn(length, keys)
    every: dict[str, dict[str, Tensor]] = {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.where(padding, -math.inf, 0.0)},
        "bool": {"attn_mask": between},
        "float": {"attn_mask": added},
        "heads": {"attn_mask": several},
        "both": {"attn_mask": between, "key_padding_mask": padding},
        "both, heads": {"attn_mask": several, "key_padding_mask": padding},
    }
    return every[kind]


KINDS = ("none", "padding", "float padding", "bool", "float", "heads", "both", "both, heads")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_equals_torch(kind: str, training: bool) -> None:
    for batch_first, (kdim, vdim, bias) in itertools.product(
        (True, False), ((None, None, True), (None, None, False), (6, 10, True))
    ):
        packed, ours = pair(batch_first=batch_first, kdim=kdim, vdim=vdim, bias=bias)
        packed.train(training)
        ours.train(training)
        q, k, v = torch.randn(3, 5, 16), torch.randn(3, 7, kdim or 16), torch.randn(3, 7, vdim or 16)
        if not batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        call = masks(kind, 3, 5, 7)
        for weights, average in ((False, True), (True, True), (True, False)):
            call |= {"need_weights": weights, "average_attn_weights": average}
            wanted, got = packed(q, k, v, **call), ours(q, k, v, **call)
            near(got[0], wanted[0])
            assert (got[1] is None) == (wanted[1] is None)
            if weights:
                near(got[1], wanted[1])


@pytest.mark.parametrize("weights", [True, False])
def test_self_attention_without_gradients_and_without_a_batch(weights: bool) -> None:
    """Torch's own fast path, and inputs of two dimensions."""
    packed, ours = pair(batch_first=True)
    x = torch.randn(2, 6, 16)
    with torch.no_grad():
        for one, two in zip(
            packed.eval()(x, x, x, need_weights=weights),
            ours.eval()(x, x, x, need_weights=weights),
            strict=True,
        ):
            assert (one is None) == (two is None)
            if one is not None:
                near(two, one)
    unseen = torch.tensor([False, True, False, False, False, True])
    wanted = packed(x[0], x[0], x[0], key_padding_mask=unseen, need_weights=weights)
    got = ours(x[0], x[0], x[0], key_padding_mask=unseen, need_weights=weights)
    near(got[0], wanted[0])
    assert got[0].shape == (6, 16) and (got[1] is None) == (not weights)


def test_causal_hint() -> None:
    packed, ours = pair(batch_first=True)
    x, mask = torch.randn(2, 6, 16), nn.Transformer.generate_square_subsequent_mask(6)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 4:] = True
    plain = {"attn_mask": mask, "is_causal": True}
    float_padding = torch.where(padding, -math.inf, 0.0)
    for call in (plain, plain | {"need_weights": False}, plain | {"key_padding_mask": float_padding}):
        near(ours(x, x, x, **call)[0], packed(x, x, x, **call)[0])
    with pytest.raises(ValueError, match="is_causal is a hint about attn_mask"):
        ours(x, x, x, is_causal=True)


def test_gradients_and_what_trains() -> None:
    packed = nn.MultiheadAttention(16, 4, batch_first=True).double()
    packed.out_proj.weight.requires_grad_(False)
    ours = MultiheadAttention.of(packed)
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    for model in (packed, ours):
        model(x, x, x, need_weights=False)[0].square().sum().backward()
    assert ours.out_proj.weight.grad is None and not ours.out_proj.weight.requires_grad
    joint = torch.cat([layer.weight.grad for layer in (ours.q_proj, ours.k_proj, ours.v_proj)])  # type: ignore[arg-type]
    near(joint, packed.in_proj_weight.grad)  # type: ignore[arg-type]
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in packed.parameters())


def test_starts_as_torch_starts() -> None:
    packed, ours = nn.MultiheadAttention(256, 4), MultiheadAttention(256, 4)
    near(
        ours.q_proj.weight.abs().max(), torch.tensor(math.sqrt(6 / 1024)).clamp(max=ours.q_proj.weight.max())
    )
    for one, two in (
        (ours.k_proj.weight, packed.in_proj_weight),
        (ours.out_proj.weight, packed.out_proj.weight),
    ):
        assert abs(float(one.detach().std() / two.detach().std()) - 1) < 0.02
    assert all(not p.any() for name, p in ours.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"add_bias_kv": True}, "cannot be unpacked: it was made with add_bias_kv=True"),
        ({"add_zero_attn": True}, "cannot be unpacked: it was made with add_zero_attn=True"),
    ],
)
def test_extra_keys_are_refused(options: dict[str, Any], says: str) -> None:
    packed = nn.MultiheadAttention(16, 4, **options)
    with pytest.raises(ValueError, match=says):
        MultiheadAttention.of(packed)
    model = nn.ModuleDict({"a": nn.MultiheadAttention(16, 4), "b": packed})
    with pytest.raises(ValueError, match=f"layer 'b' {says}"):
        unpack_attention_(model)
    assert type(model["a"]) is nn.MultiheadAttention  # nothing was replaced
    assert unpack_attention_(model, skip=["b"]) == ["a"]


def test_bad_input() -> None:
    ours, x = MultiheadAttention(16, 4, batch_first=True), torch.randn(2, 6, 16)
    with pytest.raises(ValueError, match=r"attn_mask has shape \(5, 6\); it must be \(6, 6\) or \(8, 6, 6\)"):
        ours(x, x, x, attn_mask=torch.zeros(5, 6))
    with pytest.raises(ValueError, match=r"key_padding_mask has shape \(2, 5\); it must be \(2, 6\)"):
        ours(x, x, x, key_padding_mask=torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"a mask is boolean or floating point, not torch.int64"):
        ours(x, x, x, attn_mask=torch.zeros(6, 6, dtype=torch.long))
    with pytest.raises(ValueError, match="multiple of num_heads=3"):
        MultiheadAttention(16, 3)
    with pytest.raises(ValueError, match=r"dropout=1\.0 of attention weights"):
        MultiheadAttention(16, 4, dropout=1.0)
    with pytest.raises(ValueError, match=r"itself an nn\.MultiheadAttention"):
        unpack_attention_(nn.MultiheadAttention(16, 4))
    model = nn.ModuleList(nn.MultiheadAttention(16, 4) for _ in range(2))
    model[1].in_proj_weight = model[0].in_proj_weight
    with pytest.raises(ValueError, match="layer '0' cannot be unpacked: it shares a weight"):
        unpack_attention_(model)


def test_an_optimizer_made_before_is_noticed() -> None:
    model = nn.TransformerEncoderLayer(16, 4, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"unpack_attention_ replaces .* SGD made earlier holds"):
        unpack_attention_(model)
    del optimizer


def transformer(**options: Any) -> nn.Transformer:
    sizes = {"d_model": 16, "nhead": 4, "num_encoder_layers": 2, "num_decoder_layers": 2}
    model = nn.Transformer(**sizes, dim_feedforward=24, dropout=0.0, batch_first=True, **options)
    for parameter in model.parameters():  # torch's biases start at zero, and so would say nothing
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5)
    return model


@pytest.mark.filterwarnings(NESTED)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_whole_transformer_keeps_its_outputs(training: bool, dtype: torch.dtype) -> None:
    """Encoder, decoder and cross-attention; in eval torch takes its fused path, and nested tensors."""
    model = transformer().to(dtype).train(training)
    ours = copy.deepcopy(model)
    assert len(unpack_attention_(ours)) == 6
    src, tgt = torch.randn(3, 7, 16, dtype=dtype), torch.randn(3, 5, 16, dtype=dtype)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 5:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=dtype)
    seen = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    for call in ({}, seen, {"tgt_mask": causal, "tgt_is_causal": True}):
        near(ours(src, tgt, **call), model(src, tgt, **call))
        with torch.no_grad():
            near(ours(src, tgt, **call), model(src, tgt, **call))
    with torch.no_grad():  # alone: pads apart, which torch leaves at zero in its nested form
        one, two = (m.encoder(src, src_key_padding_mask=padding) for m in (model, ours))
        near(two[~padding], one[~padding])


@pytest.mark.parametrize("training", [True, False])
def test_an_encoder_layer_takes_and_refuses_what_it_should(training: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True).train(training)
    unpack_attention_(layer)
    auto_(layer, 4)
    assert sorted(hosts(layer)) == ["linear1", "linear2"] + [
        f"self_attn.{name}_proj" for name in ("k", "out", "q", "v")
    ]
    x = torch.randn(2, 6, 16)
    with torch.no_grad():
        assert layer(x).shape == layer(x[0].unsqueeze(0).expand(2, -1, -1)).shape == x.shape
    around = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    near(around(x), around.layers[1](around.layers[0](x)))


@pytest.mark.filterwarnings(NESTED)
def test_nested_tensors_are_refused() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True).eval()
    unpack_attention_(layer)
    nested = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(5, 16)])
    with torch.no_grad(), pytest.raises(ValueError, match="takes no nested tensors"):
        layer(nested)


def test_compiles_without_a_break() -> None:
    ours, x = MultiheadAttention(16, 4, batch_first=True), torch.randn(2, 6, 16)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    near(compiled(x, x, x, need_weights=False)[0], ours(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("targets", [None, ["*.linear1"]])
def test_save_and_load(tmp_path: Path, targets: list[str] | None) -> None:
    """A fresh model is filled as it is: what was unpacked when it was saved is unpacked."""
    model = transformer()
    unpack_attention_(model)
    rankfold.factorize_(model, svd, budget=0.7, targets=targets)
    assert any("multihead_attn.k_proj" in name for name in hosts(model)) == (targets is None)
    rankfold.save(model, tmp_path / "model")
    again = rankfold.load_(transformer(), tmp_path / "model")
    src, tgt = torch.randn(2, 4, 16), torch.randn(2, 3, 16)
    assert torch.equal(again.eval()(src, tgt), model.eval()(src, tgt))
    rankfold.to_dense_(again)
    assert not hosts(again)
    torch.testing.assert_close(again(src, tgt), model(src, tgt), rtol=0, atol=1e-5)
