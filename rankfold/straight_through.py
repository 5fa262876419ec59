"""Straight-through factorization: train dense masters, use their factorization, pass the gradient through.

    "coefficient"  C = the s largest |Z| of every row and block, W = C D; Z and D train      (SparseCode)
    "weight"       W' = fit(W), warm started where the codes allow it; W trains              (any method)

Tuning a factorized model keeps every discrete choice as the factorization made it. Here the choices move with
the task, then are fixed for the last part of training, so that what is exported is what was trained. The two
are our reading of DSFormer's straight-through factorizer, whose body we could not read (papers/dsformer.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.allocate import uniform
from rankfold.factorize import factorize_
from rankfold.hosts import hosts
from rankfold.layers import select
from rankfold.manifest import recipe_of, stamp_, unstamp_
from rankfold.masters import CodeMaster, Master, WeightMaster
from rankfold.method import Method, Size
from rankfold.metric import Metric
from rankfold.metrics import Frobenius
from rankfold.optimizers import check_unheld
from rankfold.recipe import Recipe
from rankfold.regime import Regime
from rankfold.sparse_code import SparseCode
from rankfold.straight_through_layers import coded_again, draft_, masters_of, size_of
from rankfold.structure import Structure

READINGS = ("coefficient", "weight")


class StraightThrough(Regime):
    """A regime: four verbs for the user's own training loop.

        regime = StraightThrough(freeze=0.15)
        regime.start_(model, steps=1000)           # before the optimizer is made
        optimizer = torch.optim.AdamW(regime.parameter_groups(weight_decay=0.01), lr=5e-5)
        for batch in batches:
            regime.before_step()
            (model(**batch).loss + regime.penalty()).backward()
            optimizer.step(); optimizer.zero_grad()
            regime.after_step()
        moved = regime.finish_()                   # small structures again; {layer: share of places moved}

    With the Trainer of transformers: `rankfold.trainer_callback.RegimeCallback`.

    method   fits dense layers (`start_` with a budget), and fits masters anew in the weight reading
    reading  "coefficient" or "weight" (see the top of this file)
    decay    SR-STE [Zhou et al. 2021]: λ in the penalty λ/2 ‖master − what is used of it‖², which keeps
             unused entries small and so the choices from oscillating; 0 is off
    freeze   the last share of the steps, in [0, 1], in which the choices are fixed; 1 is ordinary tuning of
             the factors. In the weight reading it is the share without refits: the layers stand still
    ramp     the first share of the steps in which the nonzeros a row go from all atoms down to their number;
             coefficient reading only
    refit    weight reading: steps between two factorizations

    **Memory.** Masters, their gradients and the optimizer's state take what tuning the dense layers takes
    (half of it for codes of half as many atoms as columns), plus two bytes a code: only the export is small.
    **Optimizer.** After every step the dictionary's rows are scaled to unit norm and their codes by the
    inverse. The product stays, but moments that the optimizer holds (Adam) are those of the old scale; one
    step changes a norm by about the learning rate, so we leave them. Clipping by the norm of all gradients
    counts those of unused codes too, and so clips more than in ordinary tuning. No shape changes.
    **Processes.** DistributedDataParallel works, in the weight reading with find_unused_parameters=True: its
    masters have no gradient once they stand still. FSDP is refused.

    Raises ValueError for options out of range.
    """

    def __init__(
        self,
        method: Method | None = None,
        *,
        reading: str = "coefficient",
        decay: float = 0.0,
        freeze: float = 0.15,
        ramp: float = 0.0,
        refit: int = 1,
    ) -> None:
        super().__init__()
        if reading not in READINGS:
            raise ValueError(f"StraightThrough(reading={reading!r}): choose one of {READINGS}")
        if not isinstance(decay, int | float) or not 0 <= decay < math.inf:
            raise ValueError(f"StraightThrough(decay={decay!r}): a number of at least 0")
        for name, share in (("freeze", freeze), ("ramp", ramp)):
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
                raise ValueError(f"StraightThrough({name}={share!r}): a share of the steps, from 0 to 1")
        if ramp and (ramp + freeze > 1 or reading == "weight"):
            raise ValueError(
                f"StraightThrough(ramp={ramp}, freeze={freeze}, reading={reading!r}): a ramp is for the "
                "coefficient reading, and ends before the freeze: ramp + freeze is at most 1"
            )
        if not isinstance(refit, int) or isinstance(refit, bool) or refit < 1:
            raise ValueError(f"StraightThrough(refit={refit!r}): steps between factorizations, at least 1")
        if reading == "weight" and method is None:
            raise ValueError("StraightThrough(reading='weight') needs a method, to fit the weights anew")
        self.method, self.reading, self.decay = method, reading, float(decay)
        self.freeze, self.ramp, self.refit = float(freeze), float(ramp), refit
        self._masters: dict[str, Master] = {}
        self._metrics: dict[str, Metric] = {}
        self._sizes: dict[int, Size] = {}

    def start_(
        self,
        model: nn.Module,
        *,
        steps: int | None = None,
        weights: Mapping[str, Tensor] | None = None,
        budget: float | None = None,
        targets: Sequence[str] | None = None,
        skip: Sequence[str] = (),
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        """Give every factorized layer of `model` its master, in place; before an optimizer is made.

        steps    of the whole training; the callback of the Trainer knows them itself
        weights  the dense weights (out, in) that factorized layers stand for, by layer. In the weight reading
                 they are the masters, else the product is; in the coefficient reading they say what unused
                 codes start at, else it is zero and few places will move (see `CodeMaster.of`)
        budget   factorize dense layers first, and take their weights: the share of the bytes of `targets`
                 that is KEPT, the same of every layer (see `factorize_`), in `metrics` or plainly

        A model that holds masters already, e.g. of an interrupted run, goes on from them. Raises ValueError
        where there is nothing to train, for values that are stored packed or as 16-bit floats, and naming a
        layer that the reading does not fit; the model is then unchanged, unless it was factorized here.
        """
        dense = dict(weights or {})
        structures = {n: h.weight for n, h in hosts(model).items() if not isinstance(h.weight, Master)}
        held = {f"{n}.{key}": p for n, s in structures.items() for key, p in s.named_parameters()}
        check_unheld(held, "StraightThrough.start_")
        if budget is not None:
            if self.method is None:
                raise ValueError(f"start_(budget={budget}) factorizes: it needs StraightThrough(method)")
            recipe = Recipe("straight_through", self.method, Frobenius(), uniform)
            chosen = select(model, targets, skip)
            check_unheld({n: layer.tensor for n, layer in chosen.items()}, "StraightThrough.start_")
            dense |= {name: layer.matrix().clone() for name, layer in chosen.items()}
            factorize_(model, recipe, budget=budget, targets=targets, skip=skip, metrics=metrics)
        masters = masters_of(model, self.reading, dense)
        self._sizes = {
            id(master): size_of(self.method, name, master.fitted)
            for name, master in masters.items()
            if self.method and isinstance(master, WeightMaster) and not isinstance(master.fitted, SparseCode)
        }
        for name, host in hosts(model).items():
            host.weight = masters[name]
        self._model, self._masters = model, masters
        self._metrics = dict(metrics or {})
        draft_(model)
        self.schedule(steps)
        if not self.frozen:
            self._fold_()

    def before_step(self) -> None:
        """Before the forward passes of a step. Raises ValueError where the number of steps is not known, and
        freeze or ramp depend on it; and for masters that FSDP has sharded."""
        self._check()
        if any(hasattr(p, "full_tensor") for master in self._distinct() for p in master.parameters()):
            raise ValueError(
                "the masters are sharded over processes, and choices are made among whole rows of them: use "
                "DistributedDataParallel, or shard only what is not factorized"
            )
        for master in self._distinct():
            master.straight = not self.frozen
            if self.ramp and not self.frozen and isinstance(master, CodeMaster):
                master.select_(self._count(master))

    def penalty(self) -> Tensor:
        """What to add to the loss: decay/2 · Σ ‖master − what is used of it‖², 0 once the choices are fixed.

        Its gradient is SR-STE's decay · (1 − mask) ∘ Z."""
        self._check()
        terms = []
        for master in self._distinct() if self.decay and not self.frozen else ():
            full = master.master()
            terms.append((full - (full.detach() - master.gap())).square().sum() / 2)
        return self.decay * torch.stack(terms).sum() if terms else torch.zeros(())

    @torch.no_grad()
    def penalty_gradients_(self) -> None:
        """Add the gradient of `penalty` to the gradients, for who does not write the loss; before the
        optimizer's step."""
        self._check()
        for master in self._distinct() if self.decay and not self.frozen else ():
            full = master.master()
            if full.grad is not None:
                full.grad.add_(master.gap(), alpha=self.decay)

    @torch.no_grad()
    def after_step(self) -> None:
        """After the optimizer's step: unit rows of the dictionaries, their norms into the codes; the choices
        anew from the masters, unless they are fixed."""
        self._check()
        was_frozen = self.frozen
        self.step += 1
        if was_frozen:
            return
        self._fold_()
        for name, master in self._distinct_items():
            if isinstance(master, CodeMaster):
                master.select_(self._count(master))
            elif isinstance(master, WeightMaster) and self.step % self.refit == 0:
                master.adopt_(self._refitted(name, master))

    def finish_(self) -> dict[str, float]:
        """Put the small structures in the masters' place, drop the masters, and return by layer the share of
        its places that are not those of the start (NaN where a structure has no places).

        Exactly `nonzeros` entries of every row and block, also after a ramp that was cut short."""
        model = self.model
        moved = {name: master.moved() for name, master in self._masters.items()}
        done = {id(master): master.export() for master in self._distinct()}
        for name, host in hosts(model).items():
            host.weight = done[id(self._masters[name])]
        recipe = recipe_of(model)
        unstamp_(model)
        stamp_(model, recipe)
        self._model, self._masters, self._sizes = None, {}, {}
        return moved

    @property
    def frozen(self) -> bool:
        """Whether the step to come has its choices fixed."""
        if self.freeze in (0.0, 1.0) or self.steps is None:
            return self.freeze == 1.0
        return self.step >= self.steps - round(self.freeze * self.steps)

    def moved(self) -> dict[str, float]:
        """By layer, the share of the places in use that were not in use at the start."""
        _ = self.model
        return {name: master.moved() for name, master in self._masters.items()}

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The parameters that train, in two groups for an optimizer; what decays is matrices alone.

        Codes never decay: it would pull the unused ones into ties. Nor does their dictionary: its norm is put
        back into the codes, so that its decay is theirs. Nor do biases and norms.
        """
        model = self.model
        codes = [master for master in self._distinct() if isinstance(master, CodeMaster)]
        exempt = {id(p) for master in codes for p in master.parameters()}
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for parameter in model.parameters():
            if parameter.requires_grad:
                (plain if id(parameter) in exempt or parameter.dim() < 2 else decayed).append(parameter)
        rates = ((decayed, weight_decay), (plain, 0.0))
        return [{"params": parameters, "weight_decay": rate} for parameters, rate in rates]

    def _check(self) -> nn.Module:
        if self.steps is None and (0 < self.freeze < 1 or self.ramp):
            raise ValueError(
                f"freeze={self.freeze:g} and ramp={self.ramp:g} are shares of the steps, whose number is not "
                "known: start_(model, steps=...)"
            )
        return self.model

    def _distinct_items(self) -> Iterable[tuple[str, Master]]:
        return {id(master): (name, master) for name, master in self._masters.items()}.values()

    def _distinct(self) -> list[Master]:
        return [master for _, master in self._distinct_items()]

    def _count(self, master: CodeMaster) -> int:
        """Nonzeros of a row and block at this step."""
        if not self.ramp:
            return master.nonzeros
        assert self.steps is not None
        left = max(0.0, 1 - self.step / (self.ramp * self.steps))
        return master.nonzeros + math.floor(left * (master.atoms - master.nonzeros))

    @torch.no_grad()
    def _fold_(self) -> None:
        """Magnitudes of codes can be compared only where their atoms are of one length."""
        owners: dict[int, list[CodeMaster]] = {}
        for master in self._distinct():
            if isinstance(master, CodeMaster):
                owners.setdefault(id(master.dictionary), []).append(master)
        for masters in owners.values():  # a dictionary may serve several layers
            norms = masters[0].dictionary.norm(dim=-1)
            norms = torch.where(norms > 0, norms, 1.0)
            masters[0].dictionary.div_(norms[..., None])
            for master in masters:
                master.scale_(norms)

    def _refitted(self, name: str, master: WeightMaster) -> Structure:
        weight = master.full.detach()
        if isinstance(master.fitted, SparseCode):
            return coded_again(master.fitted, weight)
        assert self.method is not None
        return self.method.fit(weight, self._metrics.get(name, Metric()), self._sizes[id(master)])
