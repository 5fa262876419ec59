"""Pairs of boxes for tests of evaluators: ground truth, predictions, and random sets full of ties."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from toy_hoi import table

from rankfold.hoi.annotations import Annotations, Scene
from rankfold.hoi.evaluation import Predicted

H, T, FAR = (0, 0, 10, 20), (10, 10, 30, 20), (40, 40, 60, 60)
Row = tuple[Sequence[float], Sequence[float], int]


def boxes(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def scene(name: str, *rows: Row) -> Scene:
    """Ground truth from rows (human box, object box, interaction)."""
    ids = torch.tensor([i for _, _, i in rows], dtype=torch.int64)
    return Scene(name, (64, 64), boxes([h for h, _, _ in rows]), boxes([o for _, o, _ in rows]), ids)


def predicted(name: str, *rows: tuple[Sequence[float], Sequence[float], int, float]) -> Predicted:
    ids = torch.tensor([row[2] for row in rows], dtype=torch.int64)
    scores = torch.tensor([row[3] for row in rows], dtype=torch.float32)
    return Predicted(name, boxes([r[0] for r in rows]), boxes([r[1] for r in rows]), ids, scores)


def annotations(*scenes: Scene) -> Annotations:
    return Annotations(table(), list(scenes), "toy")


def random_set(seed: int, images: int = 5, classes: int = 4) -> tuple[list[Scene], list[Predicted]]:
    """Boxes on a coarse grid and few scores, so that overlaps of 1/2 and ties of every kind are common."""
    draw = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=draw)

    def some(n: int) -> Tensor:
        corner = 4 * integers(0, 3, n, 2)
        return torch.cat([corner, corner + 4 * integers(1, 4, n, 2)], 1).float()

    scenes, predictions = [], []
    for i in range(images):
        n, m = int(integers(0, 6, 1)), int(integers(0, 25, 1))
        truth = Scene(f"{i}", (24, 24), some(n), some(n), integers(0, classes, n))
        human, thing, ids = some(m), some(m), integers(0, classes + 1, m) % 10
        if n:  # half of the detections start from a pair
            near = integers(0, n, m)
            copied = torch.rand(m, generator=draw) < 0.5
            human[copied], thing[copied] = truth.boxes_h[near][copied], truth.boxes_o[near][copied]
            ids[copied] = truth.interactions[near][copied]
        scores = integers(0, 8, m) / 8 if seed % 2 else torch.rand(m, generator=draw)
        scenes.append(truth)
        predictions.append(Predicted(f"{i}", human, thing, ids, scores.float()))
    order = torch.randperm(images, generator=draw).tolist()
    return scenes, [predictions[i] for i in order]
