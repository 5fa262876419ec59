"""A product of full rank whose leading components alone are a model too.

    W = left[:, :width] right[:width]      left (out, rank), right (rank, in), width <= kept <= rank

`kept` is the rank still alive; the width of a training step is drawn (`draw`) and set by a regime. No tensor
ever changes its shape: components beyond the width are sliced off, under torch.compile multiplied by zeros,
and get gradients that are exactly zero. [Maestro: Horváth et al. 2024, arXiv 2308.14929]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.structure import Structure, check_size


class Ordered(Structure, kind="ordered"):
    """W = left[:, :width] right[:width]. [Maestro in training]

    Children `left` (out, rank) and `right` (rank, in) as of `LowRank`, and the buffer `kept`, () int32, at
    first `rank`: the components still alive, which a checkpoint holds. In eval mode the width is `kept`. In
    training it is what `draw_` set, and `kept` where nothing was drawn. Width 0 is the zero matrix.
    """

    kept: Tensor

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        rank: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(shape)
        out_features, in_features = self.shape
        largest = min(self.shape)
        self.rank = check_size(f"ordered structure of shape {self.shape}: rank", rank, largest)
        self.right = nn.Linear(in_features, self.rank, bias=False, dtype=dtype, device=device)
        self.left = nn.Linear(self.rank, out_features, bias=False, dtype=dtype, device=device)
        self.register_buffer("kept", torch.full((), self.rank, dtype=torch.int32, device=device))
        self._drawn: int | None = None
        # The same for compiled code, to which a new integer would be a new program; no part of the state.
        self._bound = torch.tensor(self.rank, dtype=torch.int32, device="cpu")
        self._seen: tuple[Tensor, int, int] | None = None

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> Ordered:
        """From factors left (out, rank) and right (rank, in) of one dtype, all components alive."""
        shape = (left.shape[0], right.shape[1])
        structure = cls(shape, rank=left.shape[1], dtype=left.dtype, device="meta")
        structure.left.weight = nn.Parameter(left.contiguous())
        structure.right.weight = nn.Parameter(right.contiguous())
        structure.kept = torch.tensor(structure.rank, dtype=torch.int32, device=left.device)
        return structure

    @classmethod
    def svd(cls, weight: Tensor) -> Ordered:
        """The thin SVD of a weight (out, in) at rank min(out, in), √σ on either side, in the weight's dtype;
        computed in float64 on the CPU, in float32 elsewhere."""
        exact = weight.double() if weight.device.type == "cpu" else weight.float()
        left, values, right = torch.linalg.svd(exact, full_matrices=False)
        root = values.sqrt()
        return cls.of((left * root).to(weight.dtype), (root[:, None] * right).to(weight.dtype))

    @property
    def alive(self) -> int:
        """`kept` as an int, read from its device only when it has changed; `rank` on meta."""
        kept = self.kept
        if kept.is_meta:
            return self.rank
        if kept.is_inference():  # such a tensor does not count its changes
            return int(kept)
        if self._seen is None or self._seen[0] is not kept or self._seen[1] != kept._version:
            self._seen = (kept, kept._version, int(kept))
        return self._seen[2]

    @property
    def width(self) -> int:
        """Components in use by the next forward pass."""
        if not self.training or self._drawn is None:
            return self.alive
        return self._drawn

    def draw_(self, width: int | None) -> None:
        """Use the first `width` components in training, until told otherwise; None: all that are alive.

        The same width serves every forward pass until then, recomputed ones too. Raises ValueError outside
        [0, kept]."""
        alive = self.alive
        if width is not None and not 0 <= width <= alive:
            raise ValueError(f"width {width} must lie between 0 and the {alive} components that are alive")
        self._drawn = width
        self._bound.fill_(self.rank if width is None else width)

    def keep_(self, rank: int) -> None:
        """Let only the first `rank` components live on. Raises ValueError outside [0, kept]: no component
        comes back."""
        if not 0 <= rank <= self.alive:
            raise ValueError(f"rank {rank} must lie between 0 and the {self.alive} components alive")
        self.kept.fill_(rank)
        self.draw_(None)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.left(self.right(x) * self._mask())
        if self.width == self.rank:
            return self.left(self.right(x))
        left, right = self._sliced()
        return F.linear(F.linear(x, right), left)

    def rows(self, index: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return (F.embedding(index, self.left.weight) * self._mask()) @ self.right.weight
        left, right = self._sliced()
        return F.embedding(index, left) @ right

    def factors(self) -> tuple[Tensor, ...]:
        """The two factors at the present width; one component of zeros at width 0, as a convolution needs at
        least one filter."""
        if torch.compiler.is_compiling():
            return self.left.weight * self._mask(), self.right.weight
        left, right = self._sliced()
        return (left, right) if self.width else (self.left.weight[:, :1] * 0, self.right.weight[:1] * 0)

    def _sliced(self) -> tuple[Tensor, Tensor]:
        width = self.width
        return self.left.weight[:, :width], self.right.weight[:width]

    def _mask(self) -> Tensor:
        bound = torch.minimum(self._bound.to(self.kept.device), self.kept) if self.training else self.kept
        return torch.arange(self.rank, device=self.kept.device) < bound  # (rank,)

    @property
    def macs(self) -> int:
        """At the rank that is kept; at full rank on meta, where no rank is known."""
        return self.alive * (self.shape[0] + self.shape[1])

    def sizes(self) -> dict[str, Any]:
        return {"rank": self.rank}

    def validate(self) -> None:
        if not 0 <= int(self.kept) <= self.rank:
            raise ValueError(f"kept={int(self.kept)} must lie between 0 and the rank {self.rank}")

    def tails(self) -> tuple[Tensor, Tensor]:
        """‖left[:, b:kept]‖ and ‖right[b:kept]‖ for b = 0, 1, …, kept - 1, each (kept,), at least float32.

        Differentiable; where a tail is exactly zero, so is its gradient. Sharded factors are gathered as sums
        of squares, one number a component.
        """
        alive = self.alive
        sides = []
        for weight, dim in ((self.left.weight, 0), (self.right.weight, 1)):
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            squares = whole(wide.square().sum(dim))[:alive]
            tail = squares.flip(0).cumsum(0).flip(0)
            dead = tail == 0  # not `tail > 0`: NaN stays NaN
            sides.append(torch.where(dead, 0.0, torch.where(dead, 1.0, tail).sqrt()))
        return sides[0], sides[1]

    def importance(self) -> Tensor:
        """‖left[:, b:kept]‖ · ‖right[b:kept]‖ for b = 0, …, kept - 1: (kept,), float64, never rising."""
        left, right = (side.detach().double() for side in self.tails())
        return left * right


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is sharded over processes, gathered; any other as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def draw(ranks: Sequence[int], sampler: str, seed: int, step: int, every: int | None) -> list[int]:
    """The width of each layer at a step: a pure function, the same in every process and after resuming.

    "pair": the shuffled list of all pairs is used up and shuffled anew, and begins anew every `every` steps.
    """
    total = sum(ranks)
    if not total:
        return list(ranks)
    if sampler == "independent":
        generator = torch.Generator().manual_seed(_hash(seed, step))
        uniform = torch.rand(len(ranks), generator=generator, dtype=torch.float64).tolist()
        return [min(int(u * rank) + 1, rank) for u, rank in zip(uniform, ranks, strict=True)]
    period, place = divmod(step, every) if every else (0, step)
    cycle, place = divmod(place, total)
    pick = int(_shuffled(_hash(seed, period, cycle), total)[place])
    widths = list(ranks)
    for layer, rank in enumerate(ranks):
        if pick < rank:
            widths[layer] = pick + 1
            break
        pick -= rank
    return widths


def surviving(importance: Tensor, eps: float, relative: bool) -> int:
    """#{b : importance[b] >= eps}, or >= eps · importance[0], and not zero: a prefix, for it never rises."""
    floor = eps * importance[0] if relative and len(importance) else eps
    return int(((importance >= floor) & (importance > 0)).sum())


def _hash(*numbers: int) -> int:
    return int.from_bytes(hashlib.blake2b(json.dumps(numbers).encode(), digest_size=7).digest(), "big")


@lru_cache(maxsize=4)
def _shuffled(seed: int, total: int) -> Tensor:
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))
