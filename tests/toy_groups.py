"""A tower of blocks of one shape, and recipes that fit them in pairs, for the tests of groups."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rankfold import SVD, Dictionary, Frobenius, Recipe, allocate
from rankfold.groups import Groups

PAIRS = Groups(2, ("*o_proj", "*down_proj"))
LOW = Recipe("low", SVD(), Frobenius(), allocate.uniform, groups=PAIRS)
SPARSE = Recipe("sparse", Dictionary(solver="rocket"), Frobenius(), allocate.uniform, groups=PAIRS)


class Tower(nn.Module):
    """Four blocks of one shape, a fifth of another, and a head."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.last = nn.ModuleDict({"blocks": nn.ModuleDict({"4": nn.Linear(width, 10)})})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.last["blocks"]["4"](x)  # type: ignore[index]


def tower(seed: int = 0) -> Tower:
    torch.manual_seed(seed)
    return Tower()


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 24, generator=generator) * torch.logspace(0, -1, 24)
    return list(zip(x.split(8), torch.randint(10, (40,), generator=generator).split(8), strict=True))


def stored(model: nn.Module) -> int:
    """Bytes of the model, a tensor under several names once."""
    held = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in held.values())
