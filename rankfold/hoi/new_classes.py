"""Classes that a trained model has never been told of, added by their texts alone.

    W[new] = codes of T[new] in B        Wa[new] = codes of Ac[new] in B[idx]

All that was learned stays as it is: the basis, the weights of known classes, every adapter. Detections of a
new object need a detector that knows it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from rankfold.hoi.classes import ClassTable
from rankfold.hoi.config import HolaConfig
from rankfold.hoi.decomposition import TextDecomposition
from rankfold.hoi.model import HolaModel
from rankfold.hoi.text import TextFeatures

SAME = 1e-3  # entries of unit rows by which texts of a known class may differ: another machine's rounding


@torch.no_grad()
def with_classes(
    model: HolaModel, table: ClassTable, text: TextFeatures, *, nonzeros: int | None = None
) -> HolaModel:
    """A model of `table`, in the mode of `model`, of which it shares nothing.

    table     has every verb, object and interaction of the model's table, by name, in any order, and more
    text      features of `table` by the encoder of the model's own
    nonzeros  entries of each new row of W and Wa; None: all of them, by least squares

    With a table that is the model's own, its outputs are the same. Of a verb that gains a class the mean is
    over more classes than before.

    Raises ValueError naming what the table lacks, for texts of another width or encoder, and for a number of
    entries that the basis has not.
    """
    verbs = _places(model.table.verbs, table.verbs, "verbs")
    _places(model.table.objects, table.objects, "objects")
    known = _places(_pairs(model.table), _pairs(table), "interactions")
    text.check(table, model.config.projection_dim)
    old = model.language.decomposition
    _check_same(text.classes[known], old.target, "interaction")
    _check_same(text.actions[verbs], old.action_target, "action")

    config = copy.deepcopy(cast(HolaConfig, model.config))
    config.classes, config.num_guides = table.to_json(), [len(rows) for rows in text.guides]
    made = HolaModel(config, text)
    state = made.state_dict()
    for key, tensor in model.state_dict().items():
        if not key.startswith(("language.decomposition.", "tokens.guide")) and key not in BY_CLASS:
            state[key] = tensor
    made.load_state_dict(state)
    new = made.language.decomposition
    if isinstance(old, TextDecomposition):
        assert isinstance(new, TextDecomposition)
        new.basis.copy_(old.basis)
        new.weights.copy_(new.code(text.classes, nonzeros))
        new.action_weights.copy_(new.code(text.actions, _at_most(nonzeros, new), actions=True))
        new.weights[known], new.action_weights[verbs] = old.weights.cpu(), old.action_weights.cpu()
    else:  # a table, which new rows of texts join as they are
        for mine, theirs, ids in zip(new.parameters(), old.parameters(), (known, verbs), strict=False):
            mine[ids] = theirs.cpu()
    made.train(model.training)
    return cast(Any, made).to(model.pair_scale.device)


# What a table says, and is not learned.
BY_CLASS = ("language.objects", "language.verb_of", "language.object_of", "interaction_at")


def _pairs(table: ClassTable) -> list[tuple[str, str]]:
    return [(table.verbs[verb], table.objects[thing]) for verb, thing in table.interactions]


def _places(names: Sequence[Any], among: Sequence[Any], kind: str) -> Tensor:
    """(len(names),) int64: where each stands in `among`. ValueError naming the first that does not."""
    at = {name: place for place, name in enumerate(among)}
    if lacking := [name for name in names if name not in at]:
        raise ValueError(
            f"the table lacks {len(lacking)} of the model's {kind}, {lacking[0]!r} first: new classes are "
            "added to those of the model"
        )
    return torch.tensor([at[name] for name in names])


def _check_same(given: Tensor, held: Tensor, kind: str) -> None:
    gap = float((given - held.cpu()).abs().max())
    if gap > SAME:
        raise ValueError(
            f"the text features of known {kind}s differ from the model's by up to {gap:.2g}: they are of "
            "another encoder, or of other texts"
        )


def _at_most(nonzeros: int | None, decomposition: TextDecomposition) -> int | None:
    return None if nonzeros is None else min(nonzeros, len(decomposition.action_basis))
