"""Parameter counts that the authors' notebooks print, from our plan: exact integers, no weights.

The configurations are those of transformers; the convolutional nets are built here. All on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from rankfold.automatic import auto_, plan


def blocks(pattern: str, numbers: range, *more: str) -> list[str]:
    return [pattern.format(number) for number in numbers] + list(more)


@pytest.mark.parametrize(
    ("rank", "targets", "wanted"),
    [
        (256, None, 66_818_304),
        (0.4, None, 58_052_352),
        (0.2, blocks("encoder.layer.{}.*", range(6, 12), "pooler.*"), 74_965_248),
    ],
)
def test_bert_base(rank: int | float, targets: list[str] | None, wanted: int) -> None:
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig())
    planned = plan(model, rank, targets=targets)
    assert (planned.params_before, planned.params_after) == (109_482_240, wanted)
    assert not planned.dense
    if isinstance(rank, float) and targets is None:
        assert planned.ranks["encoder.layer.0.attention.self.query"] == 153
        assert planned.ranks["encoder.layer.0.intermediate.dense"] == 245


@pytest.mark.slow
def test_bert_base_as_it_is_stored() -> None:
    """The plan is what `auto_` does, on 440 MB of weights."""
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig())
    report = auto_(model, 256, solver="random")
    assert sum(p.numel() for p in model.parameters()) == report.totals["params_after"] == 66_818_304


def test_bert_classifier() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig(vocab_size=28_996, num_labels=2))
    planned = plan(model, 192, targets=blocks("*.layer.{}.*", range(8, 12), "*.pooler.*"))
    assert (planned.params_before, planned.params_after) == (108_311_810, 90_322_178)


@pytest.mark.parametrize(
    ("size", "rank", "targets", "before", "wanted"),
    [
        ({}, 256, None, 124_439_808, 77_253_888),
        ({}, 0.4, None, 124_439_808, 73_383_168),
        ({}, 0.2, blocks("transformer.h.{}.*", range(6, 12)), 124_439_808, 90_414_336),
        (
            {"n_embd": 1280, "n_layer": 36, "n_head": 20},
            384,
            blocks("transformer.h.{}.*", range(24, 36)),
            774_030_080,
            632_472_320,
        ),
    ],
)
def test_gpt2(size: dict[str, int], rank: float, targets: list[str] | None, before: int, wanted: int) -> None:
    """The tied head stays dense; c_attn (d to 3d) is one matrix."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(**size))
    planned = plan(model, rank, targets=targets)
    assert (planned.params_before, planned.params_after) == (before, wanted)
    assert not any("lm_head" in name or "wte" in name for name in planned.ranks)


def vgg16() -> nn.ModuleDict:
    def features() -> Iterator[nn.Module]:
        inner = 3
        for out in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
            if out:
                yield nn.Conv2d(inner, out, 3, padding=1)
                yield nn.ReLU()
                inner = out
            else:
                yield nn.MaxPool2d(2)

    classifier = [nn.Linear(25_088, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU()]
    classifier += [nn.Dropout(), nn.Linear(4096, 1000)]
    return nn.ModuleDict({"features": nn.Sequential(*features()), "classifier": nn.Sequential(*classifier)})


@pytest.mark.parametrize(
    ("rank", "targets", "wanted"),
    [
        (256, None, 25_596_712),
        (0.4, None, 52_613_904),  # the first convolution, of rank floor(2 · 0.4) = 0, stays dense
        (0.2, blocks("features.{}", range(24, 29, 2), "classifier.*"), 33_140_776),
    ],
)
def test_vgg16(rank: int | float, targets: list[str] | None, wanted: int) -> None:
    with torch.device("meta"):
        model = vgg16()
    planned = plan(model, rank, targets=targets, limit="channels")
    assert (planned.params_before, planned.params_after) == (138_357_544, wanted)


def resnext50() -> nn.Module:
    """ResNeXt-50 32x4d with 10 classes: bottlenecks whose 3 x 3 convolution has 32 groups."""

    def bottleneck(inner: int, width: int, out: int, stride: int) -> nn.ModuleDict:
        parts: dict[str, nn.Module] = {
            "conv1": nn.Conv2d(inner, width, 1, bias=False),
            "bn1": nn.BatchNorm2d(width),
            "conv2": nn.Conv2d(width, width, 3, stride, 1, groups=32, bias=False),
            "bn2": nn.BatchNorm2d(width),
            "conv3": nn.Conv2d(width, out, 1, bias=False),
            "bn3": nn.BatchNorm2d(out),
        }
        if inner != out:
            shortcut: list[Any] = [nn.Conv2d(inner, out, 1, stride, bias=False), nn.BatchNorm2d(out)]
            parts["downsample"] = nn.Sequential(*shortcut)
        return nn.ModuleDict(parts)

    model = nn.ModuleDict({"conv1": nn.Conv2d(3, 64, 7, 2, 3, bias=False), "bn1": nn.BatchNorm2d(64)})
    inner = 64
    for number, (depth, width) in enumerate(((3, 128), (4, 256), (6, 512), (3, 1024)), 1):
        units = [bottleneck(inner if i == 0 else 2 * width, width, 2 * width, 1) for i in range(depth)]
        model[f"layer{number}"] = nn.Sequential(*units)
        inner = 2 * width
    model["fc"] = nn.Linear(2048, 10)
    return model


def test_resnext50() -> None:
    """Its grouped convolutions stay dense."""
    with torch.device("meta"):
        model = resnext50()
    planned = plan(model, 0.5, targets=["layer3.*", "layer4.*"], limit="channels")
    assert (planned.params_before, planned.params_after) == (23_000_394, 12_889_418)
