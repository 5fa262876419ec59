"""TRP, trained rank pruning: train dense weights that the final decomposition finds low-rank already.

    M(W) = U diag(σ) Vᵀ,    k = min{k : Σ_{j<=k} σ_j² >= (1 - e) Σ_j σ_j²}
    W <- M⁻¹(U_k diag(σ_k) V_kᵀ),    G <- M⁻¹(U_k V_kᵀ)       every `every` steps, before the forward pass

M reads a kernel (out, in, kh, kw) as a matrix, (out·kw, in·kh) or (out, in·kh·kw). The gradient is taken at
the truncated weight and applied to it: no dense copy is kept, and the rank may rise again. λ G, a subgradient
of the nuclear norm λ‖W‖_* [Xu et al. 2020, arXiv 2004.14566], is added on those steps only.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.batches import Batch
from rankfold.factorize import check_weights, tied
from rankfold.hosts import hosts
from rankfold.layers import Layer, replace_, select
from rankfold.manifest import stamp_, unstamp_
from rankfold.metric import DecompositionError
from rankfold.regime import Regime
from rankfold.truncate_layers import (
    Terms,
    factors,
    large,
    macs,
    product,
    sharded,
    stored,
    traced,
    truncated,
    whole,
    wide,
    write_,
)

SCHEMES = ("spatial", "channel")
TINY = 1e-12  # a largest σ below this is a layer that has vanished


class Truncate(Regime):
    """A regime, see `rankfold.regime`; any optimizer, made before or after `start_`.

        regime = Truncate(e=0.1)
        regime.start_(model)
        ...                                        # the loop, with its four verbs
        ranks = regime.finish_(example)            # small convolutions; {layer: rank}
        recalibrate_(model, batches)               # rankfold.batch_norm: where there are batch norms

    e        share of a layer's energy Σ σ² that a truncation may drop, in [0, 1). Scale-free
    every    steps between two truncations, counted over the whole training
    nuclear  λ of the nuclear norm. It acts on truncation steps only, so that its rate is λ / every
    scheme   "spatial": (out·kw, in·kh), kh x 1 then 1 x kw filters [Jaderberg et al. 2014], for kernels
             larger than 1 x 1; "channel": (out, in·kh·kw), kh x kw then 1 x 1 filters
    final    the rule of `finish_`: "energy", that of e; or a number: σ below it are dropped, as in the
             authors' code (theirs: 5e-2), which depends on the scale of the weights

    The layers stay dense and their parameters the same until `finish_`. Costs one SVD a layer every `every`
    steps, and on those steps one more copy of the weights (where nuclear > 0). Processes of a data-parallel
    run truncate alike, each on its own; a sharded weight (DTensor, FSDP2) is gathered for it, layer by layer.

    Raises ValueError for options out of range.
    """

    def __init__(
        self,
        e: float = 0.02,
        *,
        every: int = 20,
        nuclear: float = 3e-4,
        scheme: str = "spatial",
        final: str | float = "energy",
    ) -> None:
        super().__init__()
        if not _number(e) or not 0 <= e < 1:
            raise ValueError(f"Truncate(e={e!r}): the share of energy dropped, at least 0 and below 1")
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(
                f"Truncate(every={every!r}): steps between truncations, an integer of at least 1"
            )
        if not _number(nuclear) or not 0 <= nuclear < math.inf:
            raise ValueError(f"Truncate(nuclear={nuclear!r}): λ of the nuclear norm, a number of at least 0")
        if scheme not in SCHEMES:
            raise ValueError(f"Truncate(scheme={scheme!r}): choose one of {SCHEMES}")
        if final != "energy" and not (_number(final) and 0 < float(final) < math.inf):
            raise ValueError(f"Truncate(final={final!r}): 'energy', or the least σ kept, a number above 0")
        self.e, self.every, self.nuclear, self.scheme, self.final = e, every, float(nuclear), scheme, final
        self.failures = 0  # decompositions that failed; each was raised too
        self._layers: dict[str, Layer] = {}
        self._slopes: dict[str, Tensor] = {}  # G of the truncation step in progress

    def start_(
        self,
        model: nn.Module,
        *,
        steps: int | None = None,
        targets: Sequence[str] | None = None,
        skip: Sequence[str] = (),
    ) -> None:
        """Choose the layers; nothing in `model` changes.

        targets  globs over layer names; None: every `nn.Conv2d` of one group whose kernel is larger than
                 1 x 1, but the model's first convolution. A linear layer or a 1 x 1 kernel that is named is
                 read as the plain matrix
        skip     globs of layers to leave alone

        Raises ValueError where no such layer is left, for embeddings and grouped convolutions that are named,
        for weights that are on meta, not finite, or of 16 bits (truncate what the optimizer holds: float32,
        with autocast), and where a layer shares its weight with one that is not chosen.
        """
        chosen = select(model, ["*"] if targets is None else targets, skip)
        if targets is None:
            first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
            chosen = {n: layer for n, layer in chosen.items() if large(layer) and layer.module is not first}
        if not chosen:
            raise ValueError(
                "no convolution is left to truncate: by default those of one group with a kernel larger than "
                "1 x 1, but the first; name others, e.g. linear layers, by targets=['*.fc1']"
            )
        check_weights(model)
        for name, layer in chosen.items():
            if layer.lookup:
                raise ValueError(
                    f"layer {name!r} is an embedding: Truncate takes convolutions and linear layers"
                )
            if layer.tensor.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"layer {name!r} is {layer.tensor.dtype}: rounded to 16 bits, a truncated weight has "
                    "full rank again. Keep the weights in float32 and train under torch.autocast"
                )
        layers = {
            name: Layer(layer.module, self.scheme == "spatial" and wide(layer))
            for name, layer in chosen.items()
        }
        tied(model, layers)
        self._model, self._layers, self._slopes = model, layers, {}
        self.schedule(steps)

    @torch.no_grad()
    def before_step(self) -> None:
        """On truncation steps: truncate the weights in place. Raises DecompositionError naming the layer
        where an SVD fails; that layer and those after it are as they were."""
        _ = self.model
        self._slopes = {}
        if self.step % self.every:
            return
        for name, layer in self._distinct():
            terms = self._terms(name, layer)
            write_(layer, product(terms))
            if self.nuclear and layer.tensor.requires_grad:
                ones = terms._replace(sigma=torch.ones_like(terms.sigma))
                self._slopes[name] = stored(layer, product(ones))

    def penalty(self) -> Tensor:
        """λ⟨G, W⟩ on truncation steps, else 0: λ times the nuclear norm in value, λ G in gradient."""
        _ = self.model
        terms = [whole((slope * self._layers[name].tensor).sum()) for name, slope in self._slopes.items()]
        return self.nuclear * torch.stack(terms).sum() if terms else torch.zeros(())

    @torch.no_grad()
    def penalty_gradients_(self) -> None:
        """Add λ G to the gradients on truncation steps; after the backward pass."""
        _ = self.model
        for name, slope in self._slopes.items():
            weight = self._layers[name].tensor
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            weight.grad.add_(slope, alpha=self.nuclear)

    def after_step(self) -> None:
        super().after_step()
        self._slopes = {}

    @torch.no_grad()
    def ranks(self) -> dict[str, int]:
        """By layer, the rank that `finish_` would give it now. Costs one SVD a layer; changes nothing."""
        _ = self.model
        ranks = {
            id(layer.tensor): len(self._terms(name, layer, True).sigma) for name, layer in self._distinct()
        }
        return {name: ranks[id(layer.tensor)] for name, layer in self._layers.items()}

    @contextmanager
    def truncated(self) -> Iterator[None]:
        """The model as `finish_` would leave it, within a `with` block, e.g. to choose the best of several
        checkpoints; afterwards the weights are as they were, bit for bit."""
        _ = self.model
        before = {name: layer.tensor.detach().clone() for name, layer in self._distinct()}
        try:
            with torch.no_grad():
                for name, layer in self._distinct():
                    write_(layer, product(self._terms(name, layer, True)))
            yield
        finally:
            with torch.no_grad():
                for name, weight in before.items():
                    self._layers[name].tensor.copy_(weight)

    @torch.no_grad()
    def finish_(self, example: Batch | None = None) -> dict[str, int]:
        """Truncate once more, put small layers in the place of those that pay, and end. Returns each layer's
        rank, also of those that stay dense because their multiply-adds would not fall.

        example  an input of the model, to see the real widths of strided layers; without it a layer of
                 stride s is taken to make s columns into one

        Batch norms are left as they are: `rankfold.batch_norm.recalibrate_`. Make a new optimizer for what
        is trained afterwards. Warns of layers that have vanished: they keep rank 1. Raises ValueError for
        sharded weights, DecompositionError where an SVD fails; the model is then unchanged and in training.
        """
        model = self.model
        for name, layer in self._layers.items():
            if sharded(layer.tensor):
                raise ValueError(
                    f"layer {name!r} is sharded over processes: gather the full state dict, load it "
                    "into the model on one process, start_ and schedule(steps, step) this regime there, and "
                    "finish_ it"
                )
        seen = {} if example is None else traced(model, self._layers, example)
        terms = {id(layer.tensor): self._terms(name, layer, True) for name, layer in self._distinct()}
        ranks = {name: len(terms[id(layer.tensor)].sigma) for name, layer in self._layers.items()}
        for name, layer in self._distinct():
            self._warn_vanished(name, float(terms[id(layer.tensor)].sigma[0]))
        for key, members in tied(model, self._layers).items():
            first, found = self._layers[members[0]], terms[key]
            calls = [(self._layers[name], seen.get(name)) for name in members]
            small = sum(macs(layer, len(found.sigma), at) for layer, at in calls)
            write_(first, product(found))
            if small < sum(macs(layer, None, at) for layer, at in calls):
                structure = factors(first, found)
                structure.requires_grad_(first.tensor.requires_grad)
                for name in members:
                    replace_(model, name, self._layers[name].wrap(structure))
        if hosts(model):
            unstamp_(model)
            stamp_(model, {"name": "trp", "regime": self.to_json()})
        self._model, self._layers, self._slopes = None, {}, {}
        return ranks

    def to_json(self) -> dict[str, Any]:
        """The options, as JSON."""
        return {key: getattr(self, key) for key in ("e", "every", "nuclear", "scheme", "final")}

    def _distinct(self) -> list[tuple[str, Layer]]:
        """One layer of each weight: some share theirs."""
        return list({id(layer.tensor): (name, layer) for name, layer in self._layers.items()}.values())

    def _terms(self, name: str, layer: Layer, final: bool = False) -> Terms:
        least = float(self.final) if final and self.final != "energy" else None
        try:
            return truncated(layer.read(whole(layer.tensor.detach())), self.e, least)
        except torch.linalg.LinAlgError as error:
            self.failures += 1
            raise DecompositionError(
                f"layer {name!r}: the SVD of its weight {layer.shape} failed at step {self.step} ({error}). "
                "Has the training diverged? Go back to the last checkpoint, and lower the learning rate"
            ) from error

    def _warn_vanished(self, name: str, largest: float) -> None:
        if largest < (TINY if self.final == "energy" else float(self.final)):
            warnings.warn(
                f"layer {name!r} has vanished: its largest σ is {largest:.3g}. It is kept at rank 1; lower "
                f"nuclear={self.nuclear:g} or the weight decay",
                stacklevel=3,
            )


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
