"""A token for each human-object pair, from what the detector knew of both ends and where they stand.

t = (query of x + query of y) / 2 + MLP(36 numbers of both boxes)
token = norm(Linear(adapter(t | key texts of y's object, name of y's object)))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rankfold.hoi.bottleneck import AdapterBlock
from rankfold.hoi.config import HolaConfig
from rankfold.hoi.pairs import SPATIAL, of_pairs


class PairTokens(nn.Module):
    """See the module. `config` says the sizes, `objects` how many there are, and `width` what a token of the
    image encoder has. Each pair is adapted by itself."""

    guides: Tensor
    guided: Tensor

    def __init__(self, config: HolaConfig, objects: int, width: int) -> None:
        super().__init__()
        counts = config.num_guides or [0] * objects
        if len(counts) != objects or min(counts) < 0:
            raise ValueError(f"num_guides has {len(counts)} numbers for {objects} objects; give one for each")
        hidden, queries = config.context_hidden, config.query_width
        self.position = nn.Sequential(nn.Linear(SPATIAL, hidden), nn.ReLU(), nn.Linear(hidden, queries))
        self.adapter = AdapterBlock(
            queries,
            config.projection_dim,
            bottleneck=config.bottleneck,
            heads=config.heads,
            ffn=config.ffn,
            hidden=hidden,
            dead=bool(config.dead),
        )
        self.project, self.norm = nn.Linear(queries, width), nn.LayerNorm(width)
        # Buffers that are stored: a model built on meta is filled from its checkpoint alone.
        self.register_buffer("guides", torch.zeros(objects, max(counts), config.projection_dim))
        there = torch.arange(max(counts)) < torch.tensor(counts).unsqueeze(1)
        self.register_buffer("guided", torch.cat([there, torch.ones(objects, 1, dtype=torch.bool)], 1))

    @torch.no_grad()
    def start_(self, guides: Sequence[Tensor]) -> None:
        """Take the key texts of each object, (count, D) each. Raises ValueError for other numbers of them, or
        another width."""
        counts = (self.guided.sum(1) - 1).tolist()
        for thing, (rows, count) in enumerate(zip(guides, counts, strict=True)):
            if rows.shape != (count, self.guides.shape[2]):
                raise ValueError(
                    f"key texts of object {thing} have shape {tuple(rows.shape)}, the model's config says "
                    f"{(count, self.guides.shape[2])}"
                )
            self.guides[thing, :count] = rows

    def forward(
        self, queries: Tensor, encoding: Tensor, pairs: Tensor, things: Tensor, names: Tensor
    ) -> Tensor:
        """Tokens (B, M, width) of `pairs` (B, M, 2) of detections.

        queries   (B, n, query_width) of the detections
        encoding  (B, M, 36), of `spatial_encoding`
        things    (B, M) object ids of the pairs' other ends, any id at padding
        names     (O, D), features of the objects' names
        """
        x, y = pairs.unbind(-1)
        t = (of_pairs(queries, x) + of_pairs(queries, y)) / 2 + self.position(encoding)
        read = self.adapter.read
        assert read is not None
        keys = read(torch.cat([self.guides, names.unsqueeze(1)], 1))  # once an object, not once a pair
        adapted = self.adapter(t.unsqueeze(2), keys[things], self.guided[things]).squeeze(2)
        return self.norm(self.project(adapted))


__all__ = ["PairTokens"]
