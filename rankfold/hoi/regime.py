"""HOLa as a regime: what is hidden while it trains, what its decomposition pays, and the end of both.

regime = HolaRegime(split.unseen)
regime.start_(model)
for batch in batches:
    regime.before_step()
    loss, parts = regime.loss(model, batch)      # the penalty is one part of it
    loss.backward(); optimizer.step(); optimizer.zero_grad()
    regime.after_step()
regime.finish_()                                 # every class is there again
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from rankfold.hoi.losses import parameter_terms, total
from rankfold.hoi.settings import Losses
from rankfold.regime import Regime

_INPUTS = ("pixel_values", "boxes", "scores", "labels", "queries", "counts")


class HolaRegime(Regime):
    """unseen  INTERACTION ids that have no example: no prior, no logit of a step sees them
    losses  weights of the terms
    rare    interaction ids that actreg treats like unseen ones (the setting RF-UC has those)

    The penalty is what depends on parameters alone. sem and actreg need the model's outputs: they are in
    `loss`, with all the rest.
    """

    def __init__(
        self, unseen: Collection[int] = (), losses: Losses | None = None, *, rare: Collection[int] = ()
    ) -> None:
        super().__init__()
        self.unseen, self.rare = tuple(unseen), tuple(rare)
        self.losses = losses or Losses()

    def start_(self, model: Any, steps: int | None = None) -> None:
        """Begin with a `HolaModel`. Raises ValueError for ids that it does not have."""
        model.hide_(self.unseen)
        self.schedule(steps)
        self._model = model

    def before_step(self) -> None:
        self.model.hide_(self.unseen)  # type: ignore[operator]

    def penalty(self) -> Tensor:
        parts = parameter_terms(self.model, self.losses)
        return torch.stack(list(parts.values())).sum() if parts else super().penalty()

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The whole loss of a batch and its terms; `model` is the one in training, or a wrapper of it."""
        output = model(**{name: batch[name] for name in _INPUTS})
        return total(self.model, output, dict(batch), self.losses, unseen=self.unseen, rare=self.rare)

    def finish_(self) -> Mapping[str, Any]:
        """Show the model every class again (trap 19). Returns ‖W B - T‖² of the texts, by the name of their
        decomposition; nothing where they are not decomposed."""
        model: Any = self.model
        model.hide_(())
        self._model = None
        held = model.language.decomposition
        return {"language.decomposition": held.residual()} if hasattr(held, "residual") else {}
