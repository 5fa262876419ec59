"""The smallest model of human-object interactions: ten classes of six verbs and four objects, images of 32
pixels, and texts that are random unit vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rankfold.hoi.classes import ClassTable
from rankfold.hoi.consnet import installed

needs_consnet = pytest.mark.skipif(
    not installed(),
    reason="HICO-DET's class lists, under the GPL: pip install --no-deps consnet==1.2.0",
)

VERBS = ("ride", "hold", "hug", "wash", "feed", "no_interaction")
OBJECTS = ("bicycle", "person", "dog", "cup")
INTERACTIONS = (  # (verb, object)
    (0, 0),
    (1, 0),
    (3, 0),
    (2, 1),
    (1, 1),
    (2, 2),
    (4, 2),
    (1, 3),
    (3, 3),
    (5, 3),
)
PERSON = 1
D, SIDE, QUERY = 16, 32, 256
GUIDES = (2, 3, 1, 2)  # key texts of each object


def table() -> ClassTable:
    return ClassTable(VERBS, OBJECTS, INTERACTIONS, frozenset({2, 6}), "toy")


def unit(*shape: int, seed: int = 0) -> Tensor:
    """Random rows of length 1, float32."""
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=draw), dim=-1)


def vision(**options: Any) -> Any:
    """Config of an image encoder of two layers: 16 patches."""
    from transformers import CLIPVisionConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPVisionConfig(**sizes | {"image_size": SIDE, "patch_size": 8, "projection_dim": D} | options)


def texts(seed: int = 0, classes: ClassTable | None = None, width: int = D) -> Any:
    """Random `TextFeatures` of the table; object rows are not of length 1."""
    from rankfold.hoi.text import TextFeatures

    known = classes or table()
    counts = [GUIDES[i % len(GUIDES)] for i in range(len(known.objects))]
    return TextFeatures(
        classes=unit(len(known), width, seed=seed),
        actions=unit(len(known.verbs), width, seed=seed + 1),
        objects=3 * unit(len(known.objects) + 1, width, seed=seed + 2),
        guides=tuple(unit(count, width, seed=seed + 3 + i) for i, count in enumerate(counts)),
        source="random",
    )


def config(**options: Any) -> Any:
    """A `HolaConfig` of the toy: rank 6, of which actions use rows 2 to 5."""
    from rankfold.hoi.config import HolaConfig

    sizes = {"bottleneck": 8, "ffn": 12, "context_hidden": 10, "rank": 6, "projection_dim": D}
    given = {"vision": vision(), "classes": table().to_json(), "num_guides": list(GUIDES)}
    return HolaConfig(**given | sizes | options)


def model(seed: int = 0, text: Any = None, **options: Any) -> Any:
    """A `HolaModel` with texts, in eval mode."""
    from rankfold.hoi.model import HolaModel

    torch.manual_seed(seed)
    return HolaModel(config(**options), text if text is not None else texts()).eval()


def batch(labels: tuple[tuple[int, ...], ...] = ((1, 1, 0, 2), (1, 3)), seed: int = 0) -> dict[str, Tensor]:
    """What a `HolaModel` reads, of one image for each tuple of object ids (people first)."""
    draw = torch.Generator().manual_seed(seed)
    rows, most = len(labels), max((len(row) for row in labels), default=0)
    boxes, queries = torch.zeros(rows, most, 4), torch.zeros(rows, most, QUERY)
    scores, ids = torch.zeros(rows, most), torch.full((rows, most), -1)
    for b, row in enumerate(labels):
        corner = torch.rand(len(row), 2, generator=draw) * 16
        size = 4 + torch.rand(len(row), 2, generator=draw) * 12
        boxes[b, : len(row)] = torch.cat([corner, corner + size], 1)
        scores[b, : len(row)] = 0.3 + 0.7 * torch.rand(len(row), generator=draw)
        queries[b, : len(row)] = torch.randn(len(row), QUERY, generator=draw)
        ids[b, : len(row)] = torch.tensor(row, dtype=torch.long)
    return {
        "pixel_values": torch.randn(rows, 3, SIDE, SIDE, generator=draw),
        "boxes": boxes,
        "scores": scores,
        "labels": ids,
        "queries": queries,
        "counts": torch.tensor([len(row) for row in labels]),
    }
