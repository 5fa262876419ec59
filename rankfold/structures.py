"""The structures that ship: Dense, LowRank, and Sum, which composes them.

    Dense    W = W                      the matrix itself, as a term of a sum
    LowRank  W = left right             left (out, rank), right (rank, in)
    Sum      W = Σ termᵢ                a frozen Dense plus a LowRank is LoRA, LowRank plus Sparse is SLTrain

Factors are bias-free `nn.Linear` children, so that quantizers, adapters, exporters and sharding, which look
for `nn.Linear`, find them without knowing rankfold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.sparse import Sparse, plain, product
from rankfold.structure import Structure, build, check_size


class Dense(Structure, kind="dense"):
    """W stored as it is. Child `full` (out, in). [the frozen base of an adapter; a term of Sum]"""

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(shape)
        self.full = nn.Linear(self.shape[1], self.shape[0], bias=False, dtype=dtype, device=device)

    @classmethod
    def of(cls, weight: Tensor) -> Dense:
        """Wrap a tensor (out, in); shares its storage when it is already contiguous."""
        structure = cls((weight.shape[0], weight.shape[1]), dtype=weight.dtype, device="meta")
        structure.full.weight = nn.Parameter(weight.contiguous())
        return structure

    def forward(self, x: Tensor) -> Tensor:
        return self.full(x)

    def rows(self, index: Tensor) -> Tensor:
        return nn.functional.embedding(index, self.full.weight)

    @property
    def macs(self) -> int:
        return self.shape[0] * self.shape[1]

    def sizes(self) -> dict[str, Any]:
        return {}

    def factors(self) -> tuple[Tensor, ...]:
        return (self.full.weight,)


class LowRank(Structure, kind="low_rank"):
    """W = left right, with children `left` (out, rank) and `right` (rank, in). [SVD, FWSVD, ASVD, SVD-LLM,
    LoRA, …]

    Saves bytes only below the break-even rank, out·in / (out + in). Applying it costs rank·(out + in)
    multiply-adds a row. `scale` multiplies the product, W = scale · left right: with Adam, whose steps do not
    feel it, it sets how fast the product learns [SLTrain, LoRA: alpha / rank].
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        rank: int,
        scale: float = 1.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(shape)
        out_features, in_features = self.shape
        # Above `out` only for a part of a stack, whose `right` serves more rows than its own (`split`).
        self.rank = check_size(f"low-rank structure of shape {self.shape}: rank", rank, in_features)
        good = isinstance(scale, int | float) and not isinstance(scale, bool) and math.isfinite(scale)
        if not good or scale == 0:
            raise ValueError(f"a low-rank structure's scale is a finite number other than 0; got {scale!r}")
        self.scale = float(scale)
        self.right = nn.Linear(in_features, self.rank, bias=False, dtype=dtype, device=device)
        self.left = nn.Linear(self.rank, out_features, bias=False, dtype=dtype, device=device)

    @classmethod
    def of(cls, left: Tensor, right: Tensor, scale: float = 1.0) -> LowRank:
        """From factors left (out, rank) and right (rank, in) of one dtype."""
        shape = (left.shape[0], right.shape[1])
        structure = cls(shape, rank=left.shape[1], scale=scale, dtype=left.dtype, device="meta")
        structure.left.weight = nn.Parameter(left.contiguous())
        structure.right.weight = nn.Parameter(right.contiguous())
        return structure

    def forward(self, x: Tensor) -> Tensor:
        return self.left(self._scaled(self.right(x)))

    def rows(self, index: Tensor) -> Tensor:
        return self._scaled(nn.functional.embedding(index, self.left.weight)) @ self.right.weight

    @property
    def macs(self) -> int:
        return self.rank * (self.shape[0] + self.shape[1])

    def sizes(self) -> dict[str, Any]:
        return {"rank": self.rank} if self.scale == 1 else {"rank": self.rank, "scale": self.scale}

    def factors(self) -> tuple[Tensor, ...]:
        return (self._scaled(self.left.weight), self.right.weight)

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.scale == 1 else x * self.scale

    def split(self, rows: Sequence[int]) -> list[Structure]:
        """Low-rank parts with one `right` parameter. A part may have fewer rows than the rank."""
        lefts = self.left.weight.detach().split(list(rows))
        parts = [LowRank.of(left.clone(), self.right.weight, self.scale) for left in lefts]
        for part in parts:
            part.right.weight = self.right.weight
        return list(parts)


class Sum(Structure, kind="sum"):
    """W = Σ termᵢ, structures of one shape, in `terms`. [LoRA: frozen Dense + LowRank; SLTrain: LowRank +
    Sparse]

    Each term is applied by itself, but for LowRank + Sparse in training: there W is rebuilt for the product,
    and dropped (`rankfold.sparse`). `frozen` says that the first term is not trained and the others adapt
    it (`rankfold.adapters`). A term may have a dtype of its own, float32 beside a bfloat16 base: it computes
    in that, and its part of the output is cast. Its spec then says so: {"dtype": "float32", …}.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        terms: Sequence[Mapping[str, Any]],
        frozen: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(shape)
        if not isinstance(terms, Sequence) or isinstance(terms, str) or not 1 <= len(terms) <= 64:
            raise ValueError(f"a sum has between 1 and 64 terms, each a spec; got {terms!r}")
        if not isinstance(frozen, bool) or (frozen and len(terms) == 1):
            raise ValueError(
                f"frozen={frozen!r}: true where the first of several terms is frozen, or left out"
            )
        self.frozen = frozen
        self._adopt([_term(term, dtype, device) for term in terms])

    @classmethod
    def of(cls, *terms: Structure, frozen: bool = False) -> Sum:
        """The sum of structures of one shape, which become its children. With `frozen` the first one is an
        adapter's base; whether its parameters take gradients is the caller's to say."""
        if not terms:
            raise ValueError("a sum has at least one term; got none")
        specs = [term.spec() for term in terms]
        structure = cls(terms[0].shape, terms=specs, frozen=frozen, device="meta")
        structure._adopt(list(terms))
        return structure

    def _adopt(self, terms: list[Structure]) -> None:
        for position, term in enumerate(terms):
            if term.shape != self.shape:
                raise ValueError(f"term {position} of a sum has shape {term.shape}, the sum has {self.shape}")
        self.terms = nn.ModuleList(terms)

    def _structures(self) -> list[Structure]:
        return [term for term in self.terms if isinstance(term, Structure)]

    def forward(self, x: Tensor) -> Tensor:
        pair = self._low_rank_and_sparse()
        if pair is not None and self._rebuilding_pays(x, pair[1]):
            low, sparse = pair
            factors = (low.left.weight, low.right.weight, low.scale)
            return product(x, sparse.values, sparse.places, self.shape[0], *factors)
        return self.beside(x, self.base(x))

    @property
    def base(self) -> Structure:
        """The first term: what an adapter adapts."""
        return self._structures()[0]

    @property
    def added(self) -> list[Structure]:
        """Every term but the first."""
        return self._structures()[1:]

    def beside(self, x: Tensor, y: Tensor) -> Tensor:
        """y, which is the first term's output for x, plus that of the other terms."""
        for term in self.added:
            y = y + (term(x) if term.dtype == x.dtype else term(x.to(term.dtype))).to(y.dtype)
        return y

    def _low_rank_and_sparse(self) -> tuple[LowRank, Sparse] | None:
        """The two terms of SLTrain, where they may be multiplied without calling them; else None."""
        if len(self.terms) != 2:
            return None
        low, sparse = self.terms if isinstance(self.terms[0], LowRank) else reversed(self.terms)
        if not (isinstance(low, LowRank) and plain(low, LowRank)):
            return None
        if not (isinstance(sparse, Sparse) and plain(sparse, Sparse)):
            return None
        return (low, sparse) if plain(low.left, nn.Linear) and plain(low.right, nn.Linear) else None

    def _rebuilding_pays(self, x: Tensor, sparse: Sparse) -> bool:
        """In training: autograd would keep more. Without gradients where the sparse term would be filled up
        anyway, from out·in / (out + in) rows of x on: there building W takes fewer multiply-adds than two
        factors."""
        out, inner = self.shape
        many = x.numel() * (out + inner) > out * inner * inner
        return torch.is_grad_enabled() or (many and not sparse.entrywise(x))

    def rows(self, index: Tensor) -> Tensor:
        rows = self.base.rows(index)
        for term in self.added:
            rows = rows + term.rows(index).to(rows.dtype)
        return rows

    @property
    def macs(self) -> int:
        return sum(term.macs for term in self._structures())

    def sizes(self) -> dict[str, Any]:
        terms = [
            term.spec() | ({} if term.dtype == self.dtype else {"dtype": str(term.dtype).rpartition(".")[2]})
            for term in self._structures()
        ]
        return {"terms": terms} | ({"frozen": True} if self.frozen else {})


def _term(spec: Any, dtype: torch.dtype | None, device: torch.device | str | None) -> Structure:
    """A term from its spec, which may name a dtype of its own."""
    if isinstance(spec, Mapping) and "dtype" in spec:
        known = {"float64": torch.float64, "float32": torch.float32}
        known |= {"bfloat16": torch.bfloat16, "float16": torch.float16}
        if not isinstance(spec["dtype"], str) or spec["dtype"] not in known:
            raise ValueError(f"a term's dtype is one of {', '.join(known)}; got {spec['dtype']!r}")
        dtype = known[spec["dtype"]]
        spec = {key: value for key, value in spec.items() if key != "dtype"}
    return build(spec, dtype=dtype, device=device)
