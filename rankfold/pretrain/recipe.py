"""What a run trains: `dense`, a recipe that starts small, or a regime that becomes small, with its options.

The options of the command line are those of the recipe's own method or regime, by one table; what a recipe
does not have is refused by name, and nothing is ignored.
"""

from __future__ import annotations

import difflib
import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rankfold import recipes
from rankfold.factorize import factorize_
from rankfold.inputs import open_recipe
from rankfold.layers import select
from rankfold.ordered_dropout import OrderedDropout
from rankfold.recipe import Recipe
from rankfold.regime import Regime
from rankfold.report import Report
from rankfold.truncate import Truncate

DENSE = "dense"
# {command line: what the class calls it}, for each regime
_REGIMES: dict[str, tuple[type[Regime], dict[str, str]]] = {
    "maestro": (
        OrderedDropout,
        {"penalty": "penalty", "every": "shrink_every", "nested": "nested", "seed": "seed"},
    ),
    "trp": (Truncate, {"energy": "e", "penalty": "nuclear", "every": "every"}),
}


@dataclass(frozen=True)
class Training:
    """A recipe of pre-training. `recipe` before training, or `regime` during it, or neither: dense."""

    name: str
    recipe: Recipe | None = None
    regime: str | None = None
    options: Mapping[str, Any] | None = None
    targets: Sequence[str] | None = None
    skip: Sequence[str] = ()
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """What identifies it, and what the report and the model's config.json say."""
        body: dict[str, Any] = {"name": self.name}
        if self.recipe is not None:
            body = self.recipe.to_json()
        elif self.regime is not None:
            body["regime"] = dict(self.options or {})
        where = {"targets": list(self.targets or ()) or None, "skip": list(self.skip) or None}
        return body | {key: value for key, value in where.items() if value}

    def make(self) -> Regime | None:
        """The regime, not started. Raises ValueError for options out of range."""
        if self.regime is None:
            return None
        return _REGIMES[self.regime][0](**(self.options or {}))

    def start_(self, model: nn.Module, steps: int) -> tuple[Report | None, Regime | None]:
        """Make the model small, in place, or start the regime on it, before there is an optimizer. Raises
        ValueError where a layer does not take the options, which it names."""
        if self.recipe is not None:
            return factorize_(model, self.recipe, targets=self.targets, skip=self.skip, seed=self.seed), None
        regime = self.make()
        if regime is not None:
            names = [glob.escape(name) for name in select(model, self.targets, self.skip)]
            regime.start_(model, steps=steps, targets=names)  # type: ignore[attr-defined]
        return None, regime


def training(
    name: str, options: Mapping[str, Any], *, targets: Sequence[str] | None, skip: Sequence[str], seed: int
) -> Training:
    """A recipe of pre-training by its name, from a recipe's JSON file, or from a folder that this command
    wrote, with those of `options` that are not None.

    Raises ValueError for an unknown name, a recipe that compresses trained weights, and options that the
    recipe does not have.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if name == DENSE:
        if given or targets or skip:
            extra = next(iter(given), "targets" if targets else "skip")
            raise ValueError(f"recipe 'dense' factorizes nothing and has no --{extra}")
        return Training(DENSE)
    if name in _REGIMES:
        names = _REGIMES[name][1]
        unknown = [key for key in given if key not in names]
        if unknown:
            raise ValueError(_no_option(name, unknown[0], [key for key in names if key != "seed"]))
        said: dict[str, Any] = {names[key]: value for key, value in given.items()}
        if name == "maestro":
            if "penalty" not in said:
                raise ValueError(
                    "recipe 'maestro' needs --penalty, the weight of its group lasso: it depends on the loss "
                    "and the sizes of the model. 0 sorts the components and removes none; try 1e-5"
                )
            said["seed"] = seed
        made = Training(name, None, name, said, targets, tuple(skip), seed)
        made.make()
        return made
    known = trainable()
    if name not in recipes.available() and not Path(name).exists() and not name.endswith(".json"):
        close = difflib.get_close_matches(name, [DENSE, *_REGIMES, *known], n=2, cutoff=0.4)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"Unknown recipe {name!r}.{hint} To train from: {', '.join(names_of())}")
    recipe = open_recipe(name)
    if not _starts(recipe):
        raise ValueError(
            f"recipe {recipe.name!r} compresses weights that are trained; to train from the first step: "
            f"{', '.join(names_of())}"
        )
    fields = list(vars(recipe.method))
    if getattr(recipe.method, "sparsity", 0) is None:  # low rank alone; with a sparse term it is `sltrain`
        fields.remove("sparsity")
    for key in given:
        if key not in fields:
            raise ValueError(_no_option(name, key, [f for f in fields if f in options]))
    return Training(recipe.name, recipe(**given), None, None, targets, tuple(skip), seed)


def trainable() -> dict[str, Recipe]:
    """The recipes that start from the first step, third parties' included."""
    return {name: item for name, item in recipes.available().items() if _starts(item)}


def names_of() -> list[str]:
    return [DENSE, *sorted(trainable()), *_REGIMES]


def _starts(recipe: Recipe) -> bool:
    method = recipe.method
    return method.fresh or (hasattr(method, "init") and not method.adds)  # an adapter starts from a weight


def _no_option(name: str, option: str, known: Sequence[str]) -> str:
    return f"recipe {name!r} has no option --{option}; it has {', '.join(f'--{key}' for key in known)}"
