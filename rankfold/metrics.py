"""The metrics that ship, each a calibration: (model, layers, batches) -> {name: Metric}.

    Frobenius   none                           plain SVD
    AbsMean     right = mean|x|^2α             ASVD
    Fisher      right = Fisher summed over out, to the power 2·½        FWSVD
    Activation  right = E[x xᵀ]                SVD-LLM, CoSpaDi;  with output="scalar", left = E‖g‖²/out
    KFAC        left = E[g gᵀ], right = E[x xᵀ]  K-FAC-SVD: the error is nats per token, and adds across
                layers

Right moments are divided by the tokens of the calibration set (examples, where the input is not tokens), so
that errors are per token. Nothing is stored but the moments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankfold.batches import Batch
from rankfold.layers import Layer
from rankfold.metric import Metric, shrunk
from rankfold.observe import observe

Progress = Callable[[str, int, int | None], None]


class Calibration(ABC):
    """A metric's recipe: call it to calibrate. Subclass as `class KFAC(Calibration, kind="kfac")`, a frozen
    dataclass."""

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Calibration]]] = {}
    needs_data: ClassVar[bool] = True
    additive: ClassVar[bool] = (
        False  # are its errors in the unit of the loss, so that they may be added across layers?
    )

    def __init_subclass__(cls, kind: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind is not None:
            cls.kind = kind
            Calibration.kinds[kind] = cls

    @abstractmethod
    def __call__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        batches: Iterable[Batch] | None = None,
        *,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> dict[str, Metric]:
        """One Metric for each layer that ran on the calibration data; a layer that never ran has no entry."""


@dataclass(frozen=True)
class Frobenius(Calibration, kind="frobenius"):
    """‖E‖_F²: no data. Every weight entry counts alike."""

    needs_data: ClassVar[bool] = False

    def __call__(self, model, layers, batches=None, *, seed=0, progress=None) -> dict[str, Metric]:
        return {name: Metric() for name in layers}


@dataclass(frozen=True)
class Activation(Calibration, kind="activation"):
    """right = E[x xᵀ], so that ‖E‖² is the squared output error on the calibration data [SVD-LLM: arXiv
    2403.07378].

    output  None, or "scalar": left = E‖g‖²/out with g the gradient of the loss of sampled labels at the
            output, which puts the errors of all layers in one unit, the loss, so that they may be added
    power   exponent on that scalar
    shrink  in [0, 1): share of the trace moved to the identity; for fewer tokens than inputs
    """

    output: str | None = None
    power: float = 1.0
    shrink: float = 0.0

    def __post_init__(self) -> None:
        if self.output not in (None, "scalar"):
            raise ValueError(
                f"Activation(output={self.output!r}): choose None or 'scalar' (KFAC() has the full matrix)"
            )
        _check_share("Activation", "shrink", self.shrink)

    @property
    def additive(self) -> bool:  # type: ignore[override]
        return self.output == "scalar"

    def __call__(self, model, layers, batches=None, *, seed=0, progress=None) -> dict[str, Metric]:
        seen = observe(
            model,
            layers,
            batches,
            input="gram",
            gradient=self.output,
            labels="sampled",
            seed=seed,
            progress=progress,
        )
        inputs = _shared(seen.second, lambda moment: shrunk(moment, self.shrink) if self.shrink else moment)
        metrics = {}
        for name, moment in inputs.items():
            side = None
            if self.output:
                side = seen.energy[name] ** self.power
            metrics[name] = Metric(moment, side) if layers[name].lookup else Metric(side, moment)
        return metrics


@dataclass(frozen=True)
class AbsMean(Calibration, kind="absmean"):
    """right = diag((mean|x|)^2α) [ASVD: arXiv 2312.05821]."""

    alpha: float = 0.5

    def __call__(self, model, layers, batches=None, *, seed=0, progress=None) -> dict[str, Metric]:
        seen = observe(model, layers, batches, input="absolute", seed=seed, progress=progress)
        floored = {name: _floor(mean) ** (2 * self.alpha) for name, mean in seen.absolute.items()}
        return {
            name: Metric(f, None) if layers[name].lookup else Metric(None, f) for name, f in floored.items()
        }


@dataclass(frozen=True)
class Fisher(Calibration, kind="fisher"):
    """The empirical Fisher diagonal of the true labels, row-summed: one weight per input feature, f = Σ_out
    E[(dL/dW)²], and right = diag(f^2·power) [FWSVD: arXiv 2207.00112]. Exact per example: gradients are
    squared before they are averaged.

    axes   "in" (the paper), "out" (one weight per output) or "both"
    power  exponent on f inside the factorization; the paper's is ½
    eps    relative floor: f / mean(f) + eps
    Per-sequence sums of the loss for language models, the task's own loss for classification.
    """

    axes: str = "in"
    power: float = 0.5
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.axes not in ("in", "out", "both"):
            raise ValueError(f"Fisher(axes={self.axes!r}): choose 'in', 'out' or 'both'")

    def __call__(self, model, layers, batches=None, *, seed=0, progress=None) -> dict[str, Metric]:
        seen = observe(model, layers, batches, fisher=True, labels="data", seed=seed, progress=progress)
        metrics = {}
        for name, (by_out, by_in) in seen.fisher.items():
            # What the matrix's own in side is: an embedding's inputs live on its out side (the vocabulary).
            inner, outer = (by_out, by_in) if layers[name].lookup else (by_in, by_out)
            right = _floor(inner, self.eps) ** (2 * self.power) if self.axes != "out" else None
            left = _floor(outer, self.eps) ** (2 * self.power) if self.axes != "in" else None
            metrics[name] = Metric(right, left) if layers[name].lookup else Metric(left, right)
        return metrics


@dataclass(frozen=True)
class KFAC(Calibration, kind="kfac"):
    """left = E[g gᵀ] over tokens with sampled labels, right = E[x xᵀ]: ½‖E‖² ≈ KL(original ‖ factorized) in
    nats per token.

    shrink_in, shrink_out  shares of the trace moved to the identity on either side (0.1 and 0.3: KFAC-SVD's
                           public code)
    """

    shrink_in: float = 0.1
    shrink_out: float = 0.3
    additive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_share("KFAC", "shrink_in", self.shrink_in)
        _check_share("KFAC", "shrink_out", self.shrink_out)

    def __call__(self, model, layers, batches=None, *, seed=0, progress=None) -> dict[str, Metric]:
        seen = observe(
            model,
            layers,
            batches,
            input="gram",
            gradient="matrix",
            labels="sampled",
            seed=seed,
            progress=progress,
        )
        inputs = _shared(
            seen.second, lambda moment: shrunk(moment, self.shrink_in) if self.shrink_in else moment
        )
        metrics = {}
        for name, moment in inputs.items():
            outer = shrunk(seen.gradient[name], self.shrink_out) if self.shrink_out else seen.gradient[name]
            metrics[name] = Metric(moment, outer) if layers[name].lookup else Metric(outer, moment)
        return metrics


def _shared(moments: Mapping[str, Tensor], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Apply `change` once for each distinct tensor, so that layers that share a moment go on sharing it."""
    done: dict[int, Tensor] = {}
    for moment in moments.values():
        if id(moment) not in done:
            done[id(moment)] = change(moment)
    return {name: done[id(moment)] for name, moment in moments.items()}


def _floor(diagonal: Tensor, eps: float = 1e-6) -> Tensor:
    """diagonal / mean + eps: unit-free, positive. A diagonal of zeros says nothing and becomes ones."""
    mean = diagonal.mean()
    return diagonal / mean + eps if mean > 0 else torch.ones_like(diagonal)


def _check_share(owner: str, name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(
            f"{owner}({name}={value!r}) must lie in [0, 1): the share of the trace moved to the identity"
        )
