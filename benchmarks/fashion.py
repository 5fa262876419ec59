"""Fashion-MNIST and a small residual network: what the benchmarks of convolutions share.

Data: the Debian package `dataset-fashion-mnist` [Xiao et al. 2017, arXiv 1708.07747], 60,000 images to train
and 10,000 to test, 28 x 28, 10 classes. Network: a 3 x 3 stem of stride 2 (so 14 x 14), then three stages of
residual blocks with batch norm, of width w, 2w, 4w at 14 x 14, 7 x 7, 4 x 4, a mean, a linear layer.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.data_images import idx
from rankfold.regime import Regime

FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where the Debian package puts it
MEAN, SPREAD = 0.2860, 0.3530  # of the training pixels, from 0 to 1


def load(folder: str | Path = FOLDER) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """train_x (60000, 1, 28, 28) float32, normalised; train_y (60000,) int64; test_x, test_y (10000).

    Raises FileNotFoundError that says where to get the files; ValueError for a damaged one."""
    parts = []
    for part in ("train", "t10k"):
        images = _idx(Path(folder) / f"{part}-images-idx3-ubyte.gz")
        labels = _idx(Path(folder) / f"{part}-labels-idx1-ubyte.gz")
        parts += [((images.float() / 255 - MEAN) / SPREAD)[:, None], labels.long()]
    return parts[0], parts[1], parts[2], parts[3]


def _idx(path: Path) -> Tensor:
    """The bytes of an idx file: a big-endian magic number and sizes, then the data."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: on Debian `apt-get install dataset-fashion-mnist`; without root "
            "`apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb FOLDER`, then "
            "--data FOLDER/usr/share/datasets/fashion-mnist"
        )
    return torch.from_numpy(idx(path.read_bytes(), str(path)).copy())


def split(x: Tensor, y: Tensor, held: int = 5000, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, y without `held` examples, and those: what models are chosen by. The same at every call."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    rest, chosen = order[held:].sort().values, order[:held].sort().values
    return x[rest], y[rest], x[chosen], y[chosen]


class Block(nn.Module):
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x)))))), two 3 x 3 convolutions, the first with the stride."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            conv = nn.Conv2d(inner, outer, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """Images (N, 1, 28, 28) -> logits (N, 10)."""

    def __init__(self, width: int = 16, blocks: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width]
        self.blocks = nn.Sequential(
            *(
                Block(widths[stage] if first else widths[stage + 1], widths[stage + 1], 2 if down else 1)
                for stage in range(3)
                for first, down in [(True, stage > 0)] + [(False, False)] * (blocks - 1)
            )
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.bn(self.stem(x)))).mean((2, 3)))


def resnet(width: int = 16, blocks: int = 1, seed: int = 0) -> ResNet:
    """A fresh network, the same at every call with the same seed; 2 + 6 · blocks layers deep."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResNet(width, blocks)


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    batch: int = 128,
    rate: float = 0.1,
    decay: float = 1e-4,
    seed: int = 0,
    regime: Regime | None = None,
) -> list[float]:
    """SGD with momentum 0.9, rate x 0.1 at 1/2 and 3/4 of the steps; batches drawn
    without replacement, epoch by epoch. `regime` was started on the model; its verbs are called here but
    `finish_`. Returns the losses (nats), without the penalty. Raises ValueError at a loss that is not finite.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=decay)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    losses: list[float] = []
    model.train()
    for step in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(x), generator=generator)
        index, order = order[:batch], order[batch:]
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.1 ** ((step >= steps // 2) + (step >= 3 * steps // 4))
        if regime is not None:
            regime.before_step()
        loss = F.cross_entropy(model(x[index]), y[index])
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the loss is {losses[-1]} at step {step}; lower rate={rate}")
        optimizer.zero_grad()
        (loss if regime is None else loss + regime.penalty()).backward()
        optimizer.step()
        if regime is not None:
            regime.after_step()
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch: int = 1000) -> float:
    """Percent of images named right, in eval mode; the mode is put back."""
    mode = model.training
    model.eval()
    right = sum(
        int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(batch), y.split(batch), strict=True)
    )
    model.train(mode)
    return 100 * right / len(x)
