"""The text features of interaction classes and of actions as weights of one low-rank basis.

    T ≈ W B        T (N, D), W (N, r), B (r, D)        one row an interaction, one an action below
    Ac ≈ Wa B[idx]        Wa (V, |idx|), idx = floor(r/3) … r-1: actions use two thirds of the basis

The task trains W and Wa, what reconstructs T and Ac trains B: `trains="w"` cuts the task's gradient at B.
Every class is written in the same B, seen or not. [HOLa: arXiv 2507.15542]
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.methods.class_pca import INITS, ClassPCA
from rankfold.metric import Metric
from rankfold.pursuit import pursue
from rankfold.structures import LowRank

TRAINS = ("w", "b", "both")


class TextDecomposition(nn.Module):
    """W B and Wa B[idx] with the routing of gradients.

    classes, actions, width   N, V and D
    rank                      r, at most min(N, D)
    first_action              the first row of B that actions use; None: floor(r / 3)
    trains                    which factors the features let the task's gradient through to: "w", "b", "both"

    `start_` fills it; before, its parameters are random and `target` and `action_target` (T and Ac, buffers)
    are zero. Raises ValueError for sizes that do not fit.
    """

    target: Tensor
    action_target: Tensor

    def __init__(
        self,
        classes: int,
        actions: int,
        width: int,
        *,
        rank: int = 71,
        first_action: int | None = None,
        trains: str = "w",
    ) -> None:
        super().__init__()
        if not 1 <= rank <= min(classes, width):
            raise ValueError(
                f"rank={rank} of {classes} class features of width {width} must lie between 1 and "
                f"{min(classes, width)}"
            )
        if trains not in TRAINS:
            raise ValueError(f"trains={trains!r}: choose one of {TRAINS}")
        self.first_action = rank // 3 if first_action is None else first_action
        if not 0 <= self.first_action < rank:
            raise ValueError(f"first_action={first_action} must be a row of the basis, 0 to {rank - 1}")
        self.trains = trains
        self.classes = LowRank((classes, width), rank=rank)
        self.action_weights = nn.Parameter(torch.empty(actions, rank - self.first_action))
        nn.init.normal_(self.action_weights, std=rank**-0.5)
        self.register_buffer("target", torch.zeros(classes, width))
        self.register_buffer("action_target", torch.zeros(actions, width))

    @torch.no_grad()
    def start_(self, classes: Tensor, actions: Tensor, init: str = "reconstructing") -> None:
        """Decompose text features T (N, D) and Ac (V, D): `init` is one of `ClassPCA`'s, and Wa = Ac B[idx]⁺.

        Raises ValueError for other shapes, for numbers that are not finite, and for an unknown init.
        """
        check_features(self, classes, actions)
        fitted = ClassPCA(init=init).fit(classes.double(), Metric(), self.classes.rank)
        basis = fitted.right.weight
        self.weights.copy_(fitted.left.weight)
        self.basis.copy_(basis)
        self.action_weights.copy_(actions.double() @ torch.linalg.pinv(basis[self.first_action :]))
        self.target.copy_(classes)
        self.action_target.copy_(actions)

    @property
    def weights(self) -> Tensor:
        """W (N, r), the parameter."""
        return self.classes.left.weight

    @property
    def basis(self) -> Tensor:
        """B (r, D), the parameter."""
        return self.classes.right.weight

    @property
    def action_basis(self) -> Tensor:
        """B[idx] (|idx|, D), a view of the parameter."""
        return self.basis[self.first_action :]

    def class_features(self) -> Tensor:
        """W B (N, D), not normalised, by interaction id."""
        return self._routed(self.weights, self.basis)

    def action_features(self) -> Tensor:
        """Wa B[idx] (V, D) with unit rows, by verb id."""
        return F.normalize(self._routed(self.action_weights, self.action_basis), dim=-1)

    def _routed(self, weights: Tensor, basis: Tensor) -> Tensor:
        if self.trains == "w":
            basis = basis.detach()
        elif self.trains == "b":
            weights = weights.detach()
        return weights @ basis

    @torch.no_grad()
    def residual(self) -> float:
        """‖W B - T‖², of ‖T‖² = N for unit rows."""
        product = self.weights.double() @ self.basis.double()
        return float((product - self.target.double()).square().sum())

    @torch.no_grad()
    def code(self, features: Tensor, nonzeros: int | None = None, *, actions: bool = False) -> Tensor:
        """Weights (k, r) of new classes' text features (k, D) in the basis as it is: least squares, or with
        `nonzeros` entries a row, found as the codes of a dictionary are (`rankfold.pursuit`).

        actions  of actions' features, (k, |idx|) in B[idx]

        Raises ValueError for features of another width, and a number of entries outside [1, r].
        """
        if features.dim() != 2 or features.shape[1] != self.basis.shape[1]:
            raise ValueError(
                f"features have shape {tuple(features.shape)}; this basis codes (k, {self.basis.shape[1]})"
            )
        target, basis = features.double(), (self.action_basis if actions else self.basis).double()
        if nonzeros is None:
            return (target @ torch.linalg.pinv(basis)).to(features.dtype)
        return pursue(target, basis, nonzeros).dense(len(basis)).to(features.dtype)


class TextTable(nn.Module):
    """What `TextDecomposition` is compared with: T and Ac as they are, frozen, or as a free table that the
    task trains. Same methods, and the same buffers `target` and `action_target`."""

    target: Tensor
    action_target: Tensor

    def __init__(self, classes: int, actions: int, width: int, *, trained: bool) -> None:
        super().__init__()
        self.register_buffer("target", torch.zeros(classes, width))
        self.register_buffer("action_target", torch.zeros(actions, width))
        self.table = nn.Parameter(torch.empty(classes, width)) if trained else None
        self.action_table = nn.Parameter(torch.empty(actions, width)) if trained else None
        for table in self.parameters():
            nn.init.normal_(table, std=width**-0.5)

    @torch.no_grad()
    def start_(self, classes: Tensor, actions: Tensor, init: str = "reconstructing") -> None:
        """Both tables, as they are whatever `init` says. Raises ValueError as the decomposition does."""
        check_features(self, classes, actions)
        if init not in INITS:
            raise ValueError(f"init={init!r}: choose one of {INITS}")
        self.target.copy_(classes)
        self.action_target.copy_(actions)
        if self.table is not None and self.action_table is not None:
            self.table.copy_(classes)
            self.action_table.copy_(actions)

    def class_features(self) -> Tensor:
        """(N, D), by interaction id."""
        return self.target if self.table is None else self.table

    def action_features(self) -> Tensor:
        """(V, D) with unit rows, by verb id."""
        return F.normalize(self.action_target if self.action_table is None else self.action_table, dim=-1)


def check_features(module: TextDecomposition | TextTable, classes: Tensor, actions: Tensor) -> None:
    """ValueError where text features have other shapes than the module, or numbers that are not finite."""
    for name, given, held in (
        ("class", classes, module.target),
        ("action", actions, module.action_target),
    ):
        if given.shape != held.shape:
            raise ValueError(
                f"{name} features have shape {tuple(given.shape)}, the model {tuple(held.shape)}: they are "
                "of another encoder or class table"
            )
        if not torch.isfinite(given).all():
            raise ValueError(f"{name} features {tuple(given.shape)} hold NaN or infinite entries")
