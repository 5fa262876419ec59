"""Ordered dropout: train full-rank products so that their components come out sorted by use to the data.

    every step   one pair (layer i, b), b in 1..rᵢ:  layer i uses its first b components, the others all
                 loss + λ Σᵢ Σ_b (‖left[:, b:]‖ + ‖right[b:]‖)            the hierarchical group lasso
    every s      rᵢ <- #{b : ‖left[:, b:]‖ ‖right[b:]‖ >= eps}            ranks only fall

Sampling sorts, the lasso removes. For one linear map, prefix b of the optimum is the best rank-b map on the
data. [Maestro: Horváth et al. 2024, arXiv 2308.14929]
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.factorize import check_weights, tied
from rankfold.hosts import hosts
from rankfold.layers import replace_, select
from rankfold.manifest import stamp_, unstamp_
from rankfold.optimizers import check_unheld
from rankfold.ordered import Ordered, draw, surviving
from rankfold.regime import Regime
from rankfold.structures import LowRank

SAMPLERS = ("pair", "independent")


class OrderedDropout(Regime):
    """A regime for the user's own training loop.

        regime = OrderedDropout(penalty=1e-5)
        regime.start_(model, steps=10_000)          # before the optimizer is made
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for batch in batches:
            regime.before_step()
            (loss(model, batch) + regime.penalty()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)       # see below
            optimizer.step(); optimizer.zero_grad()
            regime.after_step()
        ranks = regime.finish_()                    # small layers; then recalibrate_ batch norms

    penalty       λ, at least 0, in loss per norm: it depends on the loss and on the sizes of the model, and
                  there is no default. 0 sorts the components and removes none but dead ones
    sampler       "pair": one layer a step, from the list of all pairs (layer, b), in random order without
                  replacement, so that P(layer) ∝ its rank; "independent": its own b for every layer
    eps, relative a component goes when the importance of its tail, ‖left[:, b:]‖ ‖right[b:]‖, is below eps;
                  with `relative`, below eps times that of the whole product. The paper's 1e-7 is absolute and
                  for SGD: the steps of Adam hold a norm near rate · √entries, above any small number
    shrink_every  steps between two shrinkings, about an epoch; None: only when `shrink_` is called
    smallest      a layer keeps at least so many components, and warns
    nested        `finish_` leaves every layer a LowRank of all that it kept, also where an ordinary layer is
                  smaller: for `cut_`, which deploys one model at any rank
    seed          of the draws

    **Clip the gradients** (norm 1.0; the Trainer of transformers does so by itself). Prefixes of changing
    width make rare large gradients, and rates at which the dense network trains diverge without it.
    **Weight decay** on factors removes components too: set it to 0 to see what the lasso alone does.
    **Cost.** Until ranks fall, a full-rank product costs up to twice the dense layer, and in memory always:
    see `macs`. **Evaluate** in eval mode: it uses all components that are kept, none is drawn.

    Raises ValueError for options out of range.
    """

    def __init__(
        self,
        *,
        penalty: float,
        sampler: str = "pair",
        eps: float = 1e-3,
        relative: bool = True,
        shrink_every: int | None = 100,
        smallest: int = 1,
        nested: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if sampler not in SAMPLERS:
            raise ValueError(f"OrderedDropout(sampler={sampler!r}): choose one of {SAMPLERS}")
        for name, number in (("penalty", penalty), ("eps", eps)):
            if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < math.inf:
                raise ValueError(f"OrderedDropout({name}={number!r}): a finite number of at least 0")
        if relative and eps >= 1:
            raise ValueError(
                f"OrderedDropout(eps={eps}, relative=True) removes everything: a share of the importance of "
                "the whole product, below 1; for an absolute threshold relative=False"
            )
        for name, count, least in (("shrink_every", shrink_every, 1), ("smallest", smallest, 0)):
            if name == "shrink_every" and count is None:
                continue
            if not isinstance(count, int) or isinstance(count, bool) or count < least:
                raise ValueError(f"OrderedDropout({name}={count!r}): an integer of at least {least}")
        self.lasso, self.sampler = float(penalty), sampler
        self.eps, self.relative = float(eps), bool(relative)
        self.shrink_every, self.smallest = shrink_every, smallest
        self.nested, self.seed = bool(nested), int(seed)
        self._layers: dict[str, Ordered] = {}
        self._warned: set[str] = set()

    def start_(
        self,
        model: nn.Module,
        *,
        steps: int | None = None,
        targets: Sequence[str] | None = None,
        skip: Sequence[str] = (),
        conv: str = "channel",
    ) -> None:
        """Replace the selected dense layers by their thin SVD at full rank, √σ on either side, in place:
        the model's function stays, to rounding. Before an optimizer is made.

        targets, skip, conv  which layers, and how a convolution is read (see `select`). Layers that share a
                             weight go on sharing it, and have to be selected together

        A model that is in this training already (restored from a checkpoint) goes on as it is. Raises
        ValueError where nothing is selected, where a weight is zero, not finite or on meta, and where a
        live optimizer holds what would be replaced; the model is then unchanged.
        """
        if not _ordered(model):
            layers = select(model, targets, skip, conv=conv)
            ties = tied(model, layers)
            check_weights(model)
            check_unheld({name: layer.tensor for name, layer in layers.items()}, "OrderedDropout.start_")
            for name, layer in layers.items():
                if not bool(layer.tensor.any()):
                    raise ValueError(
                        f"layer {name!r} is zero, and as a product of zeros would stay so for ever; skip it, "
                        "or initialise it otherwise"
                    )
            made = {key: Ordered.svd(layers[names[-1]].matrix()) for key, names in ties.items()}
            for key, names in ties.items():
                made[key].requires_grad_(layers[names[-1]].tensor.requires_grad)
                for name in names:
                    replace_(model, name, layers[name].wrap(made[key]))
        self._layers = _ordered(model)
        self._model, self._warned = model, set()
        self._stamp_(model)
        self.schedule(steps)

    def before_step(self) -> None:
        """Before the forward passes of a step: this step's widths, from the seed, the step and the ranks."""
        _ = self.model
        ranks = [layer.alive for layer in self._layers.values()]
        drawn = draw(ranks, self.sampler, self.seed, self.step, self.shrink_every)
        for layer, width in zip(self._layers.values(), drawn, strict=True):
            layer.draw_(width)

    def penalty(self) -> Tensor:
        """λ Σ_layers Σ_b (‖left[:, b:]‖ + ‖right[b:]‖), over the components alive; tails include b."""
        _ = self.model
        layers = [layer for layer in self._layers.values() if layer.alive]
        if not self.lasso or not layers:
            return torch.zeros(())
        return self.lasso * torch.stack([sum(side.sum() for side in x.tails()) for x in layers]).sum()  # type: ignore[misc]

    def penalty_gradients_(self) -> None:
        """Add the gradient of `penalty` to the gradients, for who does not write the loss."""
        with torch.enable_grad():
            value = self.penalty()
        if value.requires_grad:
            factors = [p for layer in self._layers.values() for p in layer.parameters() if p.requires_grad]
            slopes = torch.autograd.grad(value, factors, allow_unused=True)
            for factor, slope in zip(factors, slopes, strict=True):
                if factor.grad is not None and slope is not None:
                    factor.grad.add_(slope)

    def after_step(self) -> None:
        """After the optimizer's step: shrink at the end of a period."""
        super().after_step()
        if self.shrink_every and self.step % self.shrink_every == 0:
            self.shrink_()

    @torch.no_grad()
    def shrink_(self) -> dict[str, int]:
        """Drop the components whose tail is below eps, and return the ranks: {layer: rank}.

        Raises ValueError naming a layer that is not finite: the training has diverged."""
        _ = self.model
        for name, layer in self._layers.items():
            tail = layer.importance()
            if not tail.isfinite().all():
                raise ValueError(
                    f"layer {name!r} holds NaN or infinity after {self.step} steps: the training diverged. "
                    "Lower the learning rate, or clip the gradients (norm 1.0), and go on from a checkpoint"
                )
            left = surviving(tail, self.eps, self.relative)
            floor = min(self.smallest, layer.alive)
            if (left < floor or left <= self.smallest < layer.alive) and name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"layer {name!r}: penalty={self.lasso:g} and eps={self.eps:g} leave {left} of its "
                    f"{layer.rank} components; it keeps {floor}. Lower the penalty if that is too few",
                    stacklevel=2,
                )
            layer.keep_(max(left, floor))
        return self.ranks

    @property
    def ranks(self) -> dict[str, int]:
        """{layer: components alive}."""
        _ = self.model
        return {name: layer.alive for name, layer in self._layers.items()}

    def macs(self, positions: Mapping[str, int] | None = None) -> dict[str, float]:
        """Multiply-adds of the trained layers for one example, at the present ranks.

        {"dense": as they were, "training": expected of a step's forward pass, "final": after `finish_`}

        positions  {layer: rows of input an example brings: tokens, or output pixels}; 1 where not given. The
                   training figure is of the present ranks: average it over the steps for that of a run
        """
        _ = self.model
        dense = training = final = 0.0
        total = sum(layer.alive for layer in self._layers.values())
        for name, layer in self._layers.items():
            (out, inner), rank, rows = layer.shape, layer.alive, (positions or {}).get(name, 1)
            share = (rank / total if total else 0.0) if self.sampler == "pair" else 1.0
            each = rows * (out + inner)
            dense += rows * out * inner
            training += each * ((1 - share) * rank + share * (rank + 1 if rank else 0) / 2)
            final += rows * (out * inner if self._folds(layer) else rank * (out + inner))
        return {"dense": dense, "training": training, "final": final}

    @torch.no_grad()
    def finish_(self) -> dict[str, int]:
        """Put the small layers in place and end: {layer: the rank it kept}.

        A layer becomes a LowRank of its rank, or an ordinary layer where that is no smaller (unless
        `nested`). The function in eval mode stays, to rounding. A layer of rank 0 holds one component of
        zeros. Batch norms still hold the statistics of sampled networks: `recalibrate_` them. Raises
        ValueError for sharded factors; the model is then unchanged and in training.
        """
        model, ranks = self.model, self.ranks
        for name, layer in self._layers.items():
            if hasattr(layer.left.weight, "full_tensor"):
                raise ValueError(
                    f"layer {name!r} is sharded over processes: gather the full state dict, load it into a "
                    "whole model on which an OrderedDropout was started, and finish that one"
                )
        small: dict[int, LowRank] = {}
        weights: dict[int, nn.Parameter] = {}
        for name, host in hosts(model).items():
            layer = host.weight
            if not isinstance(layer, Ordered):
                continue
            host.weight = small.setdefault(id(layer), _sliced(layer)).train(host.training)
            if self._folds(layer):
                dense: Any = host.to_dense()
                dense.weight = weights.setdefault(id(layer), dense.weight)
                replace_(model, name, dense)
        unstamp_(model)
        if hosts(model):
            self._stamp_(model)
        self._model, self._layers = None, {}
        return ranks

    def _folds(self, layer: Ordered) -> bool:
        out, inner = layer.shape
        return not self.nested and layer.alive * (out + inner) >= out * inner

    def _stamp_(self, model: nn.Module) -> None:
        options = ("sampler", "eps", "relative", "shrink_every", "smallest", "nested", "seed")
        said = {"penalty": self.lasso, **{name: getattr(self, name) for name in options}}
        unstamp_(model)
        stamp_(model, {"name": "maestro", "regime": said})


def _sliced(layer: Ordered) -> LowRank:
    rank = layer.alive
    left, right = layer.left.weight.detach(), layer.right.weight.detach()
    if not rank:  # the zero matrix
        left, right, rank = left[:, :1] * 0, right[:1] * 0, 1
    made = LowRank.of(left[:, :rank].clone(), right[:rank].clone())
    return made.requires_grad_(layer.left.weight.requires_grad)


def _ordered(model: nn.Module) -> dict[str, Ordered]:
    """The distinct ordered structures of a model, by the first layer that holds each."""
    found: dict[int, tuple[str, Ordered]] = {}
    for name, host in hosts(model).items():
        if isinstance(host.weight, Ordered):
            found.setdefault(id(host.weight), (name, host.weight))
    return dict(found.values())
