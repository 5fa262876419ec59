"""The tasks of adapters.py: a model trained on one thing, and examples of another to adapt it to.

    Digits    a perceptron on scikit-learn's digits -> shifted, rotated, blurred ones
    Fashion   a small vision transformer on Fashion-MNIST -> rotated, blurred ones

Pretrained models are in adapters_pretrained.py. A part is a dict of tensors with one row an example. A seed
draws the split, the examples and, where the head is new, the head.
"""

from __future__ import annotations

import copy
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import fashion
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.data import fetch
from rankfold.data_images import ImageSet, packaged_images

Part = dict[str, Tensor]
TURN, BLUR = 45.0, 3.0  # degrees; the Gaussian's standard deviation in 28ths of a side


@dataclass(frozen=True)
class Task(ABC):
    """What every task has. `train`, `valid`, `test` count examples; `rank` is LoRA's, for the layers
    `targets`; `head` is what trains beside the adapters in every method (globs of parameters)."""

    name: str
    train: int
    valid: int
    test: int
    epochs: int
    batch: int
    rank: int

    targets: ClassVar[tuple[str, ...]]
    head: ClassVar[tuple[str, ...]]
    pretrained: ClassVar[bool] = False
    tuned: ClassVar[tuple[int, ...]] = (0,)  # seeds whose validation part chooses rates
    head_rate: ClassVar[float | None] = None  # beside adapters; None: the probe's
    without: ClassVar[tuple[str, ...]] = ()  # methods
    half: ClassVar[bool] = False  # products in bfloat16, by autocast
    metric: ClassVar[str] = "accuracy, %"
    sign: ClassVar[int] = 1  # of a better score's difference

    @abstractmethod
    def model(self, seed: int) -> nn.Module:
        """A fresh copy of the model, in eval mode: no dropout, and batch norms keep their statistics."""

    @abstractmethod
    def parts(self, seed: int) -> tuple[Part, Part, Part]:
        """Train, valid and test part."""

    def logits(self, model: Any, batch: Part) -> Tensor:
        return model(batch["x"])

    def loss(self, model: nn.Module, batch: Part) -> Tensor:
        with self.products():
            logits = self.logits(model, batch)
        return F.cross_entropy(logits.float(), batch["y"])

    @torch.no_grad()
    def score(self, model: nn.Module, part: Part) -> float:
        right = 0
        for batch in batches(part, 100, None):
            with self.products():
                right += int((self.logits(model, batch).argmax(-1) == batch["y"]).sum())
        return 100 * right / len(part["x"])

    def products(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.half)


def batches(part: Part, size: int, draw: random.Random | None) -> Iterator[Part]:
    """Batches in an order that `draw` shuffles (None: as they are). Texts of like length come together, and
    are cut to the longest of the batch."""
    order = list(range(len(part["x"])))
    if draw is not None:
        draw.shuffle(order)
    if "mask" in part:
        lengths = part["mask"].sum(1).tolist()
        run = 8 * size
        order = [
            row
            for start in range(0, len(order), run)
            for row in sorted(order[start : start + run], key=lambda row: lengths[row])
        ]
    found = [order[start : start + size] for start in range(0, len(order), size)]
    if draw is not None:
        draw.shuffle(found)
    for rows in found:
        batch = {name: values[rows] for name, values in part.items()}
        if "mask" in batch:
            longest = int(batch["mask"].sum(1).max())
            batch["x"], batch["mask"] = batch["x"][:, :longest], batch["mask"][:, :longest]
        yield batch


def cut(x: Tensor, y: Tensor, order: list[int], sizes: tuple[int, ...]) -> list[Part]:
    """Consecutive parts of these sizes in this order."""
    found, start = [], 0
    for size in sizes:
        rows = order[start : start + size]
        if len(rows) < size:
            raise ValueError(f"{sum(sizes)} examples were asked for, there are {len(order)}")
        found.append({"x": x[rows], "y": y[rows]})
        start += size
    return found


def moved(x: Tensor, kind: str) -> Tensor:
    """Images (n, 1, h, w) shifted by an eighth of their sides, rotated by 45°, or blurred."""
    side = x.shape[-1]
    if kind == "shifted":
        return torch.roll(x, (side // 8, side // 8), (2, 3))
    if kind == "rotated":
        c, s = math.cos(math.radians(TURN)), math.sin(math.radians(TURN))
        turn = torch.tensor([[c, -s, 0.0], [s, c, 0.0]]).expand(len(x), 2, 3)
        grid = F.affine_grid(turn, list(x.shape), align_corners=False)
        low = x.amin()  # what lies outside is black
        return F.grid_sample(x - low, grid, align_corners=False) + low
    reach = max(side // 8, 1)
    taps = torch.exp(-torch.arange(-reach, reach + 1.0).square() / (2 * (BLUR * side / 28) ** 2))
    kernel = torch.outer(taps, taps)[None, None] / taps.sum() ** 2
    return F.conv2d(F.pad(x, [reach] * 4, mode="replicate"), kernel)


def fit_(task: Task, model: nn.Module, part: Part, epochs: int, rate: float, batch: int) -> None:
    """Train all of a model on what it is to know before it is adapted."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    steps = epochs * math.ceil(len(part["x"]) / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    draw = random.Random(0)
    for _ in range(epochs):
        for some in batches(part, batch, draw):
            task.loss(model, some).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


@dataclass(frozen=True)
class Digits(Task):
    """The perceptron learns `base` upright digits, a new one for every seed; other digits are moved."""

    base: int = 800
    tuned = (0, 1, 2, 3, 4)
    targets = ("0", "2")
    head = ("4.*",)

    def model(self, seed: int) -> nn.Module:
        return copy.deepcopy(self._trained(seed))

    @cache  # noqa: B019  a task lives as long as the program
    def _trained(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
        model = nn.Sequential(*layers)
        fit_(self, model, self._cut(seed, "upright")[0], 40, 5e-3, 32)
        return model.eval()

    def parts(self, seed: int) -> tuple[Part, Part, Part]:
        _, train, valid, test = self._cut(seed, self.name.partition("_")[2])
        return train, valid, test

    def _cut(self, seed: int, kind: str) -> list[Part]:
        from sklearn.datasets import load_digits

        data: Any = load_digits()
        x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
        x = x if kind == "upright" else moved(x, kind)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).tolist()
        sizes = (self.base, self.train, self.valid, self.test)
        return cut(x.flatten(1), torch.tensor(data.target), order, sizes)


@dataclass(frozen=True)
class Fashion(Task):
    """The transformer learns `base` upright images once; others of the training images are moved, and for
    the test some of the 10,000 test images."""

    base: int = 20_000
    base_epochs: int = 3
    patch: int = 7
    targets = ("vit.layers.*",)
    head = ("classifier.*",)

    def model(self, seed: int) -> nn.Module:
        return copy.deepcopy(transformer(self))

    def logits(self, model: Any, batch: Part) -> Tensor:
        return model(pixel_values=batch["x"]).logits

    def parts(self, seed: int) -> tuple[Part, Part, Part]:
        kind = self.name.partition("_")[2]
        x, y, test_x, test_y = images()
        draw = torch.Generator().manual_seed(seed)
        order = (self.base + torch.randperm(len(x) - self.base, generator=draw)).tolist()
        train, valid = cut(x, y, order, (self.train, self.valid))
        order = torch.randperm(len(test_x), generator=draw).tolist()
        (test,) = cut(test_x, test_y, order, (self.test,))
        train, valid, test = ({**part, "x": moved(part["x"], kind)} for part in (train, valid, test))
        return train, valid, test


@cache
def images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """train_x (60000, 1, 28, 28) float32, normalised; train_y (60000,) int64; test_x, test_y (10000)."""
    found = []
    for split in ("train", "test"):
        part = stored("fashion", split)
        names = part.names or []
        pixels = torch.stack([torch.tensor(part.pictures.read(row)) for row in range(len(part.labels))])
        found.append(((pixels.float() / 255 - fashion.MEAN) / fashion.SPREAD)[:, None])
        found.append(torch.tensor([names.index(label) for label in part.labels]))
    return found[0], found[1], found[2], found[3]


def stored(name: str, split: str) -> ImageSet:
    """A packaged set of images, downloaded into the data folder unless it is there or installed."""
    try:
        return packaged_images(name, split)
    except ValueError:
        fetch(name)
        return packaged_images(name, split)


_transformers: dict[tuple[int, int, int], nn.Module] = {}


def transformer(task: Fashion) -> nn.Module:
    """Four blocks of width 64, trained from scratch; the same at every call."""
    from transformers import ViTConfig, ViTForImageClassification

    key = (task.base, task.base_epochs, task.patch)
    if key not in _transformers:
        sizes: dict[str, Any] = {
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_labels": 10,
        }
        torch.manual_seed(0)
        config = ViTConfig(
            **sizes, intermediate_size=128, image_size=28, patch_size=task.patch, num_channels=1
        )
        model = ViTForImageClassification(config).eval()
        x, y, _, _ = images()
        fit_(task, model, {"x": x[: task.base], "y": y[: task.base]}, task.base_epochs, 3e-3, 64)
        _transformers[key] = model
    return _transformers[key]
