"""What an error in a weight costs: ‖E‖² = tr(left E right Eᵀ), with left (out) and right (in) second moments.

Each side is None (identity), a scalar, a vector (diagonal) or a positive semi-definite matrix. Frobenius,
FWSVD, ASVD, SVD-LLM and K-FAC differ in nothing but their two sides. The moments themselves are kept, not
their roots: the truncation needs only the root of the smaller side, and layers that share an input share one
tensor.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-12  # eigenvalues below FLOOR x the largest are rounding, not information


@dataclass(frozen=True, eq=False)
class Metric:
    """‖E‖² = tr(left E right Eᵀ) for E (out, in).

    left   None | scalar () | (out,) | (out, out): output side, e.g. the second moment of output gradients
    right  None | scalar () | (in,) | (in, in): input side, e.g. the second moment of inputs
    Both in float32 or float64, finite, symmetric, positive semi-definite.
    """

    left: Tensor | None = None
    right: Tensor | None = None

    def error(self, residual: Tensor) -> float:
        """‖E‖² of E (out, in), computed in float64; never negative."""
        residual = residual.detach().double()
        return max(float((times(self.left, residual) * times(self.right, residual.mT).mT).sum()), 0.0)

    def whiten(self, weight: Tensor) -> Tensor:
        """left^½ W right^½ (out, in) in float64, whose squared Frobenius norm is `error(weight)`."""
        weight = times(root(self.left), weight.double())
        return times(root(self.right), weight.mT).mT

    def unwhiten_left(self, factor: Tensor) -> Tensor:
        """left^-½ F for F (out, ·), by the pseudo-inverse."""
        return times(root(self.left, -0.5), factor.double())

    def unwhiten_right(self, factor: Tensor) -> Tensor:
        """F right^-½ for F (·, in), by the pseudo-inverse."""
        return times(root(self.right, -0.5), factor.double().mT).mT

    def to(self, device: torch.device | str) -> Metric:
        return Metric(*(None if side is None else side.to(device) for side in (self.left, self.right)))

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Raise ValueError naming the layer if a side is not finite or does not fit a weight of `shape`."""
        for label, side, length in (("left", self.left, shape[0]), ("right", self.right, shape[1])):
            if side is None:
                continue
            if side.dim() > 2 or any(extent != length for extent in side.shape):
                raise ValueError(
                    f"layer {name!r}: the metric's {label} side has shape {tuple(side.shape)}, "
                    f"but the weight {shape} asks for ({length},) or ({length}, {length})"
                )
            if not torch.isfinite(side).all():
                raise ValueError(
                    f"layer {name!r}: the metric's {label} side holds NaN or infinity. The model's "
                    f"activations or "
                    "gradients overflow on the calibration data; calibrate in float32 or bfloat16, or check "
                    "the data"
                )


def times(side: Tensor | None, columns: Tensor) -> Tensor:
    """side @ columns, for a side in any of its four forms and columns (n, k)."""
    if side is None:
        return columns
    side = side.to(columns.dtype)
    if side.dim() == 2:
        return side @ columns
    return side[:, None] * columns if side.dim() == 1 else side * columns


def root(side: Tensor | None, power: float = 0.5) -> Tensor | None:
    """side^power in float64, in the side's own form. Negative powers invert on the range only (eigenvalues
    above FLOOR x the largest), so a singular moment has a root, an inverse root, and never an exception."""
    if side is None:
        return None
    side = side.double()
    if side.dim() == 2:
        values, vectors = symmetric_eigen(side)
        return (vectors * _power(values, power)) @ vectors.mT
    return _power(side, power)


class DecompositionError(RuntimeError):
    """Every solver failed on a matrix. Nothing has been replaced."""


def symmetric_eigen(square: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,), ascending, and eigenvectors (n, n) of a symmetric positive semi-definite matrix.

    Where the eigensolver fails, by a singular value decomposition (with a warning); where both do,
    DecompositionError.
    """
    try:
        return torch.linalg.eigh(square)
    except torch.linalg.LinAlgError as first:
        warnings.warn(
            f"symmetric eigensolver failed ({first}); falling back to a singular value decomposition",
            stacklevel=2,
        )
        try:
            vectors, values, _ = torch.linalg.svd(square)
        except torch.linalg.LinAlgError as second:
            raise DecompositionError(
                f"eigh failed ({first}) and so did svd ({second}); no layer was replaced"
            ) from second
        return values.flip(0), vectors.flip(1)


def _power(values: Tensor, power: float) -> Tensor:
    values = values.clamp_min(0)
    kept = values > FLOOR * values.max() if values.numel() else values.bool()
    return torch.where(kept, values.clamp_min(torch.finfo(values.dtype).tiny) ** power, 0.0)


def shrunk(side: Tensor, amount: float) -> Tensor:
    """(1 - amount) side + amount · mean(diagonal) · I: the same trace, no zero eigenvalue. Relative, hence
    unit-free."""
    if side.dim() == 2:
        side = side * (1 - amount)
        side.diagonal().add_(side.diagonal().mean() * (amount / (1 - amount)))
        return side
    return side * (1 - amount) + side.mean() * amount if side.dim() == 1 else side
