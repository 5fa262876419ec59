"""What trains: an adapter by its recipe, everything ("full"), or a head alone ("probe").

The options of the command line are those of the recipe's own method; what it does not have is refused by
name, and nothing is ignored.
"""

from __future__ import annotations

import difflib
import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from rankfold import recipes
from rankfold.adapted import adapted, is_adapted, parts
from rankfold.adapters import freeze_, trainable
from rankfold.factorize import factorize_
from rankfold.footprint import params
from rankfold.hosts import hosts
from rankfold.inputs import open_recipe
from rankfold.layers import why_not
from rankfold.recipe import Recipe
from rankfold.report import Report

FULL, PROBE = "full", "probe"
OPTIONS = ("rank", "alpha", "wavelet", "levels", "init", "coefficients", "scale", "core")
RATES = {"adapter": 5e-4, FULL: 5e-5, PROBE: 2e-3}  # ours; an adapter takes ten times the rate of the weights


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A way to fine-tune. `recipe`: of an adapter, or None for "full" and "probe".

    targets, skip  globs of layers that get an adapter (see `rankfold.layers.select`)
    keep           globs of parameters that train beside it, as they are
    """

    name: str
    recipe: Recipe | None = None
    targets: tuple[str, ...] | None = None
    skip: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        body = {"name": self.name} if self.recipe is None else self.recipe.to_json()
        where = {"targets": self.targets, "skip": self.skip, "keep": self.keep}
        return body | {key: list(value) for key, value in where.items() if value}

    @property
    def rate(self) -> float:
        """The learning rate where none is given."""
        return RATES["adapter" if self.recipe else self.name]

    def put_(self, model: nn.Module, head: Sequence[str] = ()) -> Report | None:
        """Make `model` trainable in this way, in place; `head` are parameters that train in any case.

        Returns the report of the adapters. Raises ValueError where a layer does not take the options, where a
        glob matches nothing, and where a head is asked for that there is not.
        """
        if self.recipe is None and any(is_adapted(host.weight) for host in hosts(model).values()):
            raise ValueError(
                f"the model has adapters, and recipe {self.name!r} knows none: merge them into the weights "
                "first (rankfold.adapters.merge_)"
            )
        if self.name == FULL:
            model.requires_grad_(True)
            return None
        if self.recipe is None:
            if not head:
                raise ValueError(
                    f"recipe 'probe' trains the head of a classifier, and {type(model).__name__} has none "
                    "apart from its layers; use an adapter's recipe"
                )
            parameters = dict(model.named_parameters())
            for pattern in self.keep:
                if not any(fnmatchcase(name, pattern) for name in parameters):
                    close = difflib.get_close_matches(pattern, parameters, n=2, cutoff=0.3)
                    raise ValueError(f"No parameter matches {pattern!r}. Nearest: {close}")
            wanted = [*map(glob.escape, head), *self.keep]
            for name, parameter in parameters.items():
                parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in wanted))
            return None
        modules = dict.fromkeys(name.rpartition(".")[0] for name in head)
        inner = [name for name in modules if name and why_not(model.get_submodule(name)) is None]
        for name in inner:
            pattern = next((p for p in self.targets or () if fnmatchcase(name, p)), None)
            if pattern is not None:
                raise ValueError(
                    f"--targets {pattern!r} names {name!r}, the head, which trains as a whole; name the "
                    "layers below it"
                )
        skip = [*self.skip, *map(glob.escape, inner)]
        report = factorize_(model, self.recipe, targets=self.targets, skip=skip, seed=self.seed)
        freeze_(model, [*map(glob.escape, head), *self.keep])
        return report


def choice(
    name: str | None,
    options: Mapping[str, Any],
    *,
    targets: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    keep: Sequence[str] = (),
    seed: int = 0,
) -> Choice:
    """The choice by its recipe's name (or JSON file), with those of `options` that are not None. Raises
    ValueError for an unknown recipe, one that compresses, and an option that it does not have."""
    if name is None:
        raise ValueError(
            "what to adapt: --heal ORIGINAL, the model that MODEL was compressed from; or --recipe, one of "
            f"{', '.join(names())}"
        )
    given = {key: value for key, value in options.items() if value is not None}
    where = {"targets": targets, "skip": skip, "keep-trainable": keep}
    if name in (FULL, PROBE):
        takes = ("keep-trainable",) if name == PROBE else ()
        extra = next((k for k in (*given, *(k for k, v in where.items() if v)) if k not in takes), None)
        if extra is not None:
            what = "trains everything" if name == FULL else "trains the head alone"
            raise ValueError(f"recipe {name!r} {what} and has no --{extra}")
        return Choice(name=name, keep=tuple(keep), seed=seed)
    if name not in recipes.available() and not name.endswith(".json"):
        close = difflib.get_close_matches(name, names(), n=2, cutoff=0.4)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"Unknown recipe {name!r}.{hint} To adapt with: {', '.join(names())}")
    recipe = open_recipe(name)
    if not recipe.method.adds:
        raise ValueError(
            f"recipe {recipe.name!r} is no adapter: it compresses, or trains from the first step. To adapt "
            f"with: {', '.join(names())}"
        )
    known = [key for key in OPTIONS if key in vars(recipe.method)]
    for key in given:
        if key not in known:
            raise ValueError(
                f"recipe {name!r} has no option --{key}; it has {', '.join(f'--{item}' for item in known)}"
            )
    if recipe.metric.needs_data:
        raise ValueError(
            f"recipe {Path(name).name!r} calibrates its adapters on data; use factorize_ and the Trainer "
            "(docs/adapters.md)"
        )
    return Choice(
        name=recipe.name,
        recipe=recipe(**given),
        targets=tuple(targets) if targets else None,
        skip=tuple(skip),
        keep=tuple(keep),
        seed=seed,
    )


def names() -> list[str]:
    """What --recipe takes: adapters, third parties' included, and the two without."""
    return [*sorted(key for key, item in recipes.available().items() if item.method.adds), FULL, PROBE]


def head_of(model: Any) -> list[str]:
    """The parameters of a classifier's head: outside of its base model, or drawn at random since its
    checkpoint has none for them."""
    base = model.base_model
    inside = {id(p) for p in base.parameters()}
    held = {id(p) for host in hosts(model).values() for p in host.parameters()}
    marked = any(_loaded(p) for p in base.parameters())
    return [
        name
        for name, p in model.named_parameters()
        if id(p) not in inside or (marked and id(p) not in held and not _loaded(p))
    ]


def trained_facts(model: nn.Module, before: int, report: Report | None) -> dict[str, Any]:
    """What trains, counted: `before` are the parameters that the model had."""
    numbers = {name: p.numel() for name, p in trainable(model).items()}
    in_adapters = 0
    added = 0
    if report is not None:
        structures = {id(host.weight): host for host in adapted(model).values()}
        terms = [term for host in structures.values() for term in parts(host)[1]]
        in_adapters = sum(p.numel() for term in terms for p in term.parameters())
        added = sum(term.nbytes for term in terms)
    total = sum(numbers.values())
    return {
        "parameters": total,
        "adapters": in_adapters,
        "others": total - in_adapters,
        "layers": 0 if report is None else sum(not row.dense for row in report.layers),
        "model_parameters": before,
        "share": total / before,
        "bytes_added": added,
        "total_after": params(model),
    }


def _loaded(parameter: Any) -> bool:
    return bool(getattr(parameter, "_is_hf_initialized", False))
