"""Sparse dictionary coding in a metric, without inverting it.

    min ‖(W - S D) C^½‖²    every row of S (out, atoms) with `nonzeros` entries, D (atoms, in)

The codes are found in the whitened space, Y = W C^½ against D C^½. With the codes fixed, the best dictionary
is D = (Sᵀ G S)⁻¹ Sᵀ G W whatever C is (G weighs the rows): so nothing is ever un-whitened, and C may be
singular. In blocks, every block is a problem of its own. [CoSpaDi, ROCKET, COMPOT; the start of DSFormer]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankfold import dictionary
from rankfold.method import Method
from rankfold.methods.svd import check_finite
from rankfold.metric import Metric, root
from rankfold.sparse_code import STORAGES, SparseCode

RIDGE = 1e-10  # of the mean diagonal of Sᵀ G S: atoms that nobody uses, or that say the same
MEASURED = 12  # sizes of a menu whose error is computed; the others are interpolated


@dataclass(frozen=True)
class Dictionary(Method, kind="dictionary"):
    """Codes times dictionary, nearest in the metric. Size: [atoms, nonzeros], atoms = ratio · nonzeros.

    solver   one of `rankfold.dictionary.SOLVERS` (docs/sparse_coding.md says what each costs and reaches)
    ratio    atoms per nonzero, the papers' ρ = k / s; at least 1
    width    columns of a block; None takes the whole matrix as one block
    orient   "in": blocks of input columns; "out": blocks of output rows, the same for Wᵀ
    sweeps   rounds of coding and dictionary update ("rocket" has none)
    pursuit  how "ksvd" and "mod" code: "fast", or "omp", orthogonal matching pursuit
    start    "eigen": leading eigenvectors; "rows": rows of the whitened weight, drawn with `seed`
    storage  of the values: "float", "bf14" or "int8" (see `SparseCode`)

    A matrix on the output side counts through its diagonal alone while fitting: codes are found row by row.
    """

    solver: str = "fast"
    ratio: float = 2.0
    width: int | None = None
    orient: str = "in"
    sweeps: int = 20
    pursuit: str = "fast"
    start: str = "eigen"
    storage: str = "float"
    seed: int = 42

    costly = True

    def __post_init__(self) -> None:
        for name, value, known in (
            ("solver", self.solver, dictionary.SOLVERS),
            ("pursuit", self.pursuit, ("fast", "omp")),
            ("orient", self.orient, ("in", "out")),
            ("start", self.start, ("eigen", "rows")),
            ("storage", self.storage, STORAGES),
        ):
            if value not in known:
                raise ValueError(f"Dictionary({name}={value!r}): choose one of {tuple(known)}")
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not self.ratio >= 1:
            raise ValueError(f"Dictionary(ratio={self.ratio!r}): atoms per nonzero, a number of at least 1")
        for name, value in (("width", self.width), ("sweeps", self.sweeps)):
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not whole and not (name == "width" and value is None):
                raise ValueError(f"Dictionary({name}={value!r}): a positive integer")

    def size(self, atoms: int) -> list[int]:
        """[atoms, nonzeros] at this method's ratio."""
        return [atoms, max(1, math.floor(atoms / self.ratio))]

    def menu(self, shape: tuple[int, int]) -> list[list[int]]:
        """At most 64 sizes, evenly spaced, the largest still smaller than dense in 16-bit numbers.

        Raises ValueError where the blocks do not divide the shape."""
        rows, width, _ = self._blocks(shape)
        # An orthonormal dictionary, or one of eigenvectors, has no more atoms than columns.
        low, high = 0, min(rows, width) if self.solver in ("compot", "rocket") else rows
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._saves(shape, middle) else (low, middle - 1)
        step = max(1, -(-low // 64))
        return [self.size(atoms) for atoms in range(step, low + 1, step) if self._saves(shape, atoms)]

    def _saves(self, shape: tuple[int, int], atoms: int) -> bool:
        empty = self.empty(shape, self.size(atoms), torch.bfloat16)
        return empty.nbytes < 2 * math.prod(shape) and empty.macs < math.prod(shape)

    def _blocks(self, shape: tuple[int, int]) -> tuple[int, int, int]:
        """Rows of the codes, width of a block, number of blocks."""
        rows, across = shape if self.orient == "in" else (shape[1], shape[0])
        width = self.width or across
        if across % width:
            raise ValueError(
                f"Dictionary(width={width}) does not divide the {across} {self.orient}put features of a "
                f"weight {shape}; choose a divisor, or skip the layer"
            )
        return rows, width, across // width

    def empty(
        self, shape: tuple[int, int], size: Any, dtype: torch.dtype | None = None, device: Any = "meta"
    ) -> SparseCode:
        atoms, nonzeros = size
        return SparseCode(
            shape,
            atoms=atoms,
            nonzeros=nonzeros,
            blocks=self._blocks(shape)[2],
            orient=self.orient,
            storage=self.storage,
            dtype=dtype,
            device=device,
        )

    def fit(self, weight: Tensor, metric: Metric, size: Any) -> SparseCode:
        """Codes in the whitened space (float32), then the dictionary by least squares (float64)."""
        check_finite(weight)
        self.empty((weight.shape[0], weight.shape[1]), size)  # refuses a size that fits no such weight
        atoms, nonzeros = size
        plain, whitened, rows = self._problem(weight, metric)
        coded = dictionary.fit(
            whitened.float(),
            atoms,
            nonzeros,
            solver=self.solver,
            sweeps=self.sweeps,
            pursuit=self.pursuit,
            start=self.start,
            atom_weight=self._importance(metric) if self.solver == "rocket" else None,
            row_weight=None if rows is None else rows.float().expand(whitened.shape[:-1]),
            seed=self.seed,
        )
        values, index = coded.values.double(), coded.index.long()
        found = least_squares(plain, values, index, atoms, rows)
        # One scale a block keeps both factors in the range of float16; the atoms keep their whitened norms.
        scale = (_magnitude(values) / _magnitude(found)).sqrt()
        return SparseCode.of(
            (found * scale).to(weight.dtype),
            (values / scale).transpose(0, 1).to(weight.dtype),
            index.transpose(0, 1),  # (rows, blocks, nonzeros)
            orient=self.orient,
            storage=self.storage,
        )

    def errors(self, weight: Tensor, metric: Metric, sizes: Sequence[Any]) -> list[float]:
        """Upper bounds: what the start of `fit` loses at each size. The sweeps end below it.

        All from one eigendecomposition a block; between MEASURED sizes the logarithm is interpolated. With a
        matrix on the output side they speak of its diagonal; "rocket", which chooses its codes by another
        worth, may end above.
        """
        check_finite(weight)
        if not len(sizes):
            return []
        _, whitened, rows = self._problem(weight, metric)
        if rows is not None:
            whitened = whitened * rows.sqrt()[:, None]
        last = len(sizes) - 1
        picks = sorted({round(i * last / (MEASURED - 1)) for i in range(MEASURED)})
        bounds = dictionary.curve(whitened.float(), [tuple(sizes[i]) for i in picks])
        logs = [math.log(max(float(bound), 1e-300)) for bound in bounds]
        return np.exp(np.interp(range(last + 1), picks, logs)).tolist()

    def _importance(self, metric: Metric) -> Callable[[Tensor], Tensor]:
        """ROCKET's worth of a unit of code on whitened atoms (blocks, atoms, width) of norm 1: the root of
        the atom's norm outside the whitened space."""
        side = metric.right if self.orient == "in" else metric.left

        def worth(vectors: Tensor) -> Tensor:
            blocks, _, width = vectors.shape
            if side is None or side.dim() == 0 or not side.any():
                return vectors.new_ones(vectors.shape[:2])
            if side.dim() == 1:
                plain = vectors.double() * root(side, -0.5).view(blocks, 1, width)  # type: ignore[operator]
            else:
                parts = [root(part, -0.5) for part in _diagonal_blocks(side.double(), blocks)]
                plain = vectors.double() @ torch.stack(parts)  # type: ignore[arg-type]
            return plain.norm(dim=-1).sqrt().to(vectors.dtype)

        return worth

    def _problem(self, weight: Tensor, metric: Metric) -> tuple[Tensor, Tensor, Tensor | None]:
        """The blocks (blocks, rows, width), as they are and whitened, and the weights of the rows; float64.

        A moment that is zero everywhere says nothing and counts as the identity.
        """
        left, right = (
            None if side is None or not side.any() else side.double() for side in (metric.left, metric.right)
        )
        weight = weight.double()
        if self.orient == "out":
            weight, left, right = weight.mT, right, left
        count, across = weight.shape
        blocks = across // (self.width or across)
        plain = weight.reshape(count, blocks, -1).transpose(0, 1).contiguous()
        if left is not None:
            left = left.diagonal() if left.dim() == 2 else left.expand(count)
        if right is None:
            return plain, plain, left
        if right.dim() < 2:
            return plain, plain * right.expand(across).sqrt().view(blocks, 1, -1), left
        # Blocks are coded one by one: what a moment says between two of them is not used.
        parts = torch.stack([root(part) for part in _diagonal_blocks(right, blocks)])  # type: ignore[arg-type]
        return plain, plain @ parts, left


def least_squares(
    weight: Tensor, values: Tensor, index: Tensor, atoms: int, rows: Tensor | None = None
) -> Tensor:
    """The dictionary (blocks, atoms, width) nearest to `weight` (blocks, rows, width) for given codes, in
    every metric on the input side at once; `rows` weighs the rows. An atom without codes is zero."""
    codes = values.new_zeros(*values.shape[:2], atoms).scatter_(-1, index, values)  # (blocks, rows, atoms)
    weighed = codes if rows is None else codes * rows[:, None]
    square = weighed.mT @ codes
    mean = square.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-300)
    square.diagonal(dim1=-2, dim2=-1).add_(RIDGE * mean[:, None])
    factor, failed = torch.linalg.cholesky_ex(square)
    if failed.any():
        return torch.linalg.lstsq(square, weighed.mT @ weight, driver="gelsd").solution
    return torch.cholesky_solve(weighed.mT @ weight, factor)


def _diagonal_blocks(side: Tensor, blocks: int) -> Tensor:
    width = side.shape[0] // blocks
    return side.view(blocks, width, blocks, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _magnitude(numbers: Tensor) -> Tensor:
    """Root mean square of each block, (blocks, 1, 1); 1 for a block of zeros."""
    mean = numbers.square().mean((1, 2), keepdim=True).sqrt()
    return torch.where(mean > 0, mean, 1.0)
