"""Small from the first step: factors drawn at random, in the place of a weight that is thrown away.

    low rank    W = s · left right                    s = alpha / rank
    SLTrain     W = s · left right + S                S has `sparsity` of the entries, at random fixed places

Nothing here is fitted: of the weight only shape, dtype and device are read, and the metric is ignored. The
one exception is `init="svd_of_dense"`, which keeps what a truncated SVD keeps. [SLTrain, arXiv 2406.02214]
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankfold.method import Curve, Method
from rankfold.methods.svd import check_finite, truncate
from rankfold.metric import Metric
from rankfold.sparse import Sparse
from rankfold.structures import LowRank, Sum

INITS = ("zero", "torch", "variance_preserving", "svd_of_dense")


@dataclass(frozen=True)
class Scratch(Method, kind="scratch"):
    """A fresh low-rank or low-rank plus sparse weight. Size: the rank, or [rank, nonzeros].

    rank      an int; or a float in (0, 1), the share of the break-even rank out·in / (out + in), rounded down
    sparsity  share of W's entries that the sparse term has, int(sparsity · out·in) of them; None: low rank
              alone
    alpha     s = alpha / rank; None: s = 1
    init      of the product, by U(-a, a):
              "zero"  left 0 and right a = 1/√in, so that W starts as the sparse term [SLTrain, LoRA]. Without
              one W is 0: a block whose matrices all are passes no gradient, and never learns
              "torch"  each factor as `nn.Linear` starts it
              "variance_preserving"  right a = 1/√in, and left so that entries of s · left right have the
              variance of those of `nn.Linear`, 1 / (3 in)
              "svd_of_dense"  truncated SVD of the weight, √σ / √s to both sides; the sparse term takes the
              rest of the weight at its places
              The values of the sparse term start with a = 1/√in, but for the last.
    above     what happens to a layer where this saves nothing (rank·(out + in) + nonzeros >= out·in):
              "refuse" raises ValueError, "dense" leaves it as it is
    seed      with the layer's name, of everything drawn: all processes of a run draw the same
    """

    costly: ClassVar[bool] = True

    rank: int | float = 0.5
    sparsity: float | None = None
    alpha: float | None = None
    init: str = "variance_preserving"
    above: str = "refuse"
    seed: int = 0

    def __post_init__(self) -> None:
        good = isinstance(self.rank, int) and not isinstance(self.rank, bool) and self.rank >= 1
        if not good and not (isinstance(self.rank, float) and 0 < self.rank < 1):
            raise ValueError(
                f"Scratch(rank={self.rank!r}): an int of at least 1 is the rank, a float between 0 and 1 its "
                "share of the break-even rank; for rank 128 write rank=128, for half of break-even rank=0.5"
            )
        if self.sparsity is not None and not (_is_number(self.sparsity) and 0 < self.sparsity < 1):
            raise ValueError(
                f"Scratch(sparsity={self.sparsity!r}): the share of entries that are not zero, above 0 and "
                "below 1, e.g. 0.03; None for low rank alone"
            )
        if self.alpha is not None and not (
            _is_number(self.alpha) and math.isfinite(self.alpha) and self.alpha > 0
        ):
            raise ValueError(
                f"Scratch(alpha={self.alpha!r}): a number above 0: the scale is alpha / rank; None: scale 1"
            )
        for option, value, known in (("init", self.init, INITS), ("above", self.above, ("refuse", "dense"))):
            if value not in known:
                raise ValueError(f"Scratch({option}={value!r}): choose one of {', '.join(known)}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"Scratch(seed={self.seed!r}): an integer")

    @property
    def fresh(self) -> bool:
        return self.init != "svd_of_dense"

    def menu(self, shape: tuple[int, int]) -> list[Any]:
        """The one size that the options name; none where it saves nothing and `above` is "dense". Raises
        ValueError where it saves nothing otherwise."""
        (out, inner), entries = shape, shape[0] * shape[1]
        even = entries / (out + inner)
        rank = self.rank if isinstance(self.rank, int) else int(self.rank * even)
        nonzeros = 0 if self.sparsity is None else int(self.sparsity * entries)
        params = rank * (out + inner) + nonzeros
        if rank >= 1 and (nonzeros or self.sparsity is None) and params < entries:
            return [rank if self.sparsity is None else [rank, nonzeros]]
        if self.above == "dense":
            return []
        asked = f"rank {rank}" + ("" if self.sparsity is None else f" and {nonzeros} nonzeros")
        raise ValueError(
            f"a weight {shape} of {entries} parameters: {asked} would be {params}, and break-even is at rank "
            f"{even:.4g}. Both parts must exist and cost less than dense: choose a rank from 1 to "
            f"{max(math.ceil((entries - nonzeros) / (out + inner)) - 1, 0)}, skip the layer, or leave such "
            "layers dense with above='dense'"
        )

    def empty(
        self, shape: tuple[int, int], size: Any, dtype: torch.dtype | None = None, device: Any = "meta"
    ) -> LowRank | Sum:
        rank, nonzeros = _read(size)
        low = LowRank(shape, rank=rank, scale=self._scale(rank), dtype=dtype, device=device)
        return Sum.of(low, Sparse(shape, nonzeros=nonzeros, dtype=dtype, device=device)) if nonzeros else low

    def fit(self, weight: Tensor, metric: Metric, size: Any) -> LowRank | Sum:
        """A structure of this size in the weight's dtype and device. The metric is ignored.

        Raises ValueError for float16, in which Adam's small steps vanish, and for weights that are not
        finite.
        """
        check_weight(weight)
        shape, (rank, nonzeros) = (weight.shape[0], weight.shape[1]), _read(size)
        random, scale = torch.Generator().manual_seed(self.seed), self._scale(rank)

        def uniform(bound: float, *sizes: int) -> Tensor:
            drawn = torch.rand(sizes, generator=random).mul_(2 * bound).sub_(bound)
            return drawn.to(weight.device, weight.dtype)

        places = Sparse.draw(shape, nonzeros, random).to(weight.device) if nonzeros else None
        bound = shape[1] ** -0.5
        if self.init == "svd_of_dense":
            left, right = balanced(weight, rank, scale)
        else:
            right = uniform(bound, rank, shape[1])
            if self.init == "zero":
                left = right.new_zeros(shape[0], rank)
            else:
                wide = rank**-0.5 if self.init == "torch" else math.sqrt(3 / rank) / scale
                left = uniform(wide, shape[0], rank)
        low = LowRank.of(left, right, scale)
        if places is None:
            return low
        if self.fresh:
            values = uniform(bound, nonzeros)
        else:
            with torch.no_grad():
                rest = weight.double() - scale * left.double() @ right.double()
            values = rest.flatten()[places.long()].to(weight.dtype)
        return Sum.of(low, Sparse.of(shape, values, places))

    def at(self, name: str, seed: int) -> Scratch:
        digest = hashlib.sha256(f"{seed} {self.seed} {name}".encode()).digest()
        return replace(self, seed=int.from_bytes(digest[:7], "big"))

    def errors(self, weight: Tensor, metric: Metric, sizes: Sequence[Any]) -> list[float]:
        """Zero for what starts anew: it has no error, because it means nothing. Measured for
        "svd_of_dense"."""
        if self.fresh:
            return [0.0 for _ in sizes]
        with torch.no_grad():
            fits = [self.fit(weight.double(), metric, size) for size in sizes]
            return [metric.error(weight.double() - fit.to_dense()) for fit in fits]

    def curve(self, weight: Tensor, metric: Metric, unit: str = "nbytes", *, errors: bool = True) -> Curve:
        """As `Method.curve`. Raises ValueError where fewer parameters are not fewer bytes: a sparse entry has
        an index of 4 bytes beside its value."""
        check_weight(weight)
        shape = (weight.shape[0], weight.shape[1])
        for size in self.menu(shape):
            stored = self.empty(shape, size, weight.dtype).nbytes
            if unit == "nbytes" and stored >= weight.nbytes:
                if self.above == "dense":
                    return Curve((None,), (weight.nbytes,), (0.0,))
                raise ValueError(
                    f"size {size} of a weight {shape} takes {stored} bytes in {weight.dtype}, indices "
                    f"included, and dense takes {weight.nbytes}: lower rank or sparsity, or count "
                    "unit='params'"
                )
        return super().curve(weight, metric, unit, errors=errors)

    def _scale(self, rank: int) -> float:
        return 1.0 if self.alpha is None else self.alpha / rank


def check_weight(weight: Tensor) -> None:
    """Raise ValueError for float16 and for what is not finite."""
    if weight.dtype == torch.float16:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} is float16, in which training from scratch breaks "
            "down: its smallest step is 6e-8. Convert the model to bfloat16 or float32 first"
        )
    check_finite(weight)


def _read(size: Any) -> tuple[int, int]:
    """(rank, nonzeros) of a size; without a sparse term nonzeros is 0. Raises ValueError for rank 0."""
    rank, nonzeros = (size, 0) if isinstance(size, int) else size
    if rank < 1 or nonzeros < 0:
        raise ValueError(f"size {size!r}: a rank of at least 1, or [rank, nonzeros] with both at least 1")
    return rank, nonzeros


def balanced(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Factors with s · left right = the truncated SVD of the weight, √σ / √s in both."""
    with torch.no_grad():
        left, right = truncate(weight.double(), Metric(), rank)
        # One of them is orthonormal, the other carries σ: equal norms leave √σ on both sides.
        ratio = (right.norm(dim=1) / left.norm(dim=0).clamp_min(1e-300)).clamp_min(1e-300).sqrt()
        left, right = left * ratio / scale**0.5, right / ratio[:, None] / scale**0.5
    return left.to(weight.dtype), right.to(weight.dtype)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
