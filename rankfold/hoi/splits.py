"""Zero-shot settings: which interactions have no example in training.

    UV     unseen verbs: every interaction of 20 verbs
    UO     unseen objects: every interaction of 12 objects, which also hides five whole verbs
    RF-UC  unseen compositions, rare first: 120 rare interactions; each verb and each object is seen elsewhere
    NF-UC  the same, and none of the 120 is rare

UV and UO are lists of names. RF-UC and NF-UC are lists of ids that your data brings, checked against the
counts that were published; `by_counts` builds settings like them for any data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from rankfold.hoi.classes import ClassTable

UNSEEN_VERBS = (
    "block dribble feed herd hose inspect install move park ride sail scratch sign squeeze stab stop_at "
    "swing tag toast wear"
).split()
UNSEEN_OBJECTS = (
    "dog elephant zebra frisbee skis baseball_bat skateboard tennis_racket pizza refrigerator clock "
    "toothbrush"
).split()
NAMES = ("none", "UV", "UO", "RF-UC", "NF-UC")
# HICO-DET (600 interactions, 117 verbs): unseen interactions, verbs, objects, and rare ones among the first.
PUBLISHED = {
    "UV": (84, 20, 0, 18),
    "UO": (100, 5, 12, 20),
    "RF-UC": (120, 0, 0, 120),
    "NF-UC": (120, 0, 0, 0),
}
_KEYS = ("unseen", "unseen_verbs", "unseen_objects", "rare_unseen")


@dataclass(frozen=True)
class Split:
    """A setting: the interaction ids (rising) that training may not see. ValueError for an id that `table`
    does not have, one that comes twice, and for a list that hides everything."""

    name: str
    unseen: tuple[int, ...]
    table: ClassTable

    def __post_init__(self) -> None:
        for i in self.unseen:
            if type(i) is not int or not 0 <= i < len(self.table):
                raise ValueError(
                    f"setting {self.name!r}: unseen id {i!r} is no interaction; ids are 0 … "
                    f"{len(self.table) - 1}"
                )
        if len(set(self.unseen)) < len(self.unseen):
            twice = next(i for i in self.unseen if self.unseen.count(i) > 1)
            raise ValueError(f"setting {self.name!r}: unseen id {twice} comes twice")
        if len(self.unseen) == len(self.table):
            raise ValueError(
                f"setting {self.name!r} hides all {len(self.table)} interactions: nothing is left to train on"
            )
        object.__setattr__(self, "unseen", tuple(sorted(self.unseen)))

    @cached_property
    def seen(self) -> tuple[int, ...]:
        """The other interaction ids, rising."""
        hidden = set(self.unseen)
        return tuple(i for i in range(len(self.table)) if i not in hidden)

    @cached_property
    def unseen_verbs(self) -> tuple[int, ...]:
        """Verb ids that lose every interaction they have."""
        return _lost(self, 0)

    @cached_property
    def unseen_objects(self) -> tuple[int, ...]:
        """Object ids that lose every interaction they have."""
        return _lost(self, 1)

    @cached_property
    def rare_unseen(self) -> tuple[int, ...]:
        """The unseen interaction ids that are rare."""
        return tuple(i for i in self.unseen if i in self.table.rare)

    def facts(self) -> dict[str, int]:
        """How many unseen interactions, verbs, objects and rare ones, and how many seen interactions."""
        return {**{key: len(getattr(self, key)) for key in _KEYS}, "seen": len(self.seen)}

    def to_json(self) -> dict[str, Any]:
        """Name and ids, for JSON; `from_json` reads them back."""
        return {"name": self.name, "unseen": list(self.unseen)}

    @classmethod
    def from_json(cls, body: Any, table: ClassTable, where: str = "the setting") -> Split:
        """What `to_json` gave. ValueError, beginning with `where`, for anything else."""
        if not isinstance(body, Mapping) or not isinstance(body.get("name"), str):
            raise ValueError(f"{where} must be a JSON object with 'name' and 'unseen'")
        return cls(body["name"], _ids(body, where), table)


def _lost(split: Split, place: int) -> tuple[int, ...]:
    kept = {split.table.interactions[i][place] for i in split.seen}
    return tuple(sorted({split.table.interactions[i][place] for i in split.unseen} - kept))


def split(table: ClassTable, name: str, ids: Iterable[int] | str | os.PathLike[str] | None = None) -> Split:
    """The setting `name` of NAMES, or one of your own under any other name.

    `ids` are interaction ids from 0, or a JSON file with a list of them; RF-UC, NF-UC and settings of your
    own need them. ValueError for an unknown name without ids; a verb or object that UV or UO names and
    `table` lacks; and ids of a published setting of HICO-DET whose counts are not the published ones.
    """
    if ids is not None:
        where = f"setting {name!r}"
        if isinstance(ids, str | os.PathLike):
            where = str(ids)
            try:
                ids = json.loads(Path(ids).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{where} cannot be read as a JSON list of interaction ids: {error}"
                ) from error
        made = Split(name, _ids(ids, where), table)
        _check_published(made)
        return made
    if name == "none":
        return Split(name, (), table)
    if name in ("UV", "UO"):
        wanted, have = (UNSEEN_VERBS, table.verbs) if name == "UV" else (UNSEEN_OBJECTS, table.objects)
        if missing := [word for word in wanted if word not in have]:
            raise ValueError(
                f"setting {name!r} is defined for HICO-DET: it hides {missing[0]!r}, which this table "
                f"lacks. Pass your own interaction ids"
            )
        hidden = {have.index(word) for word in wanted}
        place = 0 if name == "UV" else 1
        found = tuple(i for i, pair in enumerate(table.interactions) if pair[place] in hidden)
        return Split(name, found, table)
    if name in NAMES:
        raise ValueError(
            f"setting {name!r} is a list of 120 interaction ids that comes with the data: pass it, as a list "
            f"or a JSON file of ids from 0; `by_counts` makes a similar setting from training pairs"
        )
    raise ValueError(f"no setting {name!r}; there are {', '.join(NAMES)}, or pass the ids of your own")


def by_counts(table: ClassTable, counts: Tensor, name: str, number: int = 120) -> Split:
    """A setting like RF-UC or NF-UC for any data: `number` interactions, the rarest first (`name` "RF-UC") or
    the most frequent first ("NF-UC"), passing over those that would leave a verb or an object unseen.

    `counts` (N,): training pairs of each interaction. The setting is called "RF-UC by counts": its ids are
    not the published ones. ValueError for another name, or where fewer than `number` can be hidden.
    """
    if name not in ("RF-UC", "NF-UC"):
        raise ValueError(f"settings by counts are 'RF-UC' and 'NF-UC', not {name!r}")
    if counts.shape != (len(table),):
        raise ValueError(f"counts of shape {tuple(counts.shape)} for {len(table)} interactions")
    verbs = table.verb_of.bincount(minlength=len(table.verbs)).tolist()
    things = table.object_of.bincount(minlength=len(table.objects)).tolist()
    hidden: list[int] = []
    for i in counts.argsort(descending=name == "NF-UC", stable=True).tolist():
        verb, thing = table.interactions[i]
        if len(hidden) < number and verbs[verb] > 1 and things[thing] > 1:
            verbs[verb] -= 1
            things[thing] -= 1
            hidden.append(i)
    if len(hidden) < number:
        raise ValueError(
            f"only {len(hidden)} of {len(table)} interactions can be hidden with every verb and object still "
            f"seen, but {number} were asked for: lower the number"
        )
    return Split(f"{name} by counts", tuple(hidden), table)


def _ids(held: Any, where: str) -> tuple[int, ...]:
    if isinstance(held, Mapping):
        held = held.get("unseen")
    ids = list(held) if isinstance(held, Iterable) and not isinstance(held, str) else None
    if ids is None or not all(type(i) is int for i in ids):
        raise ValueError(f"{where}: the unseen ids must be a list of whole numbers, or stand under 'unseen'")
    return tuple(ids)


def _check_published(made: Split) -> None:
    """The counts of a published setting, where the table is HICO-DET's and knows its rare classes."""
    table, expected = made.table, PUBLISHED.get(made.name)
    if expected is None or (len(table), len(table.verbs), len(table.rare)) != (600, 117, 138):
        return
    for key, wanted in zip(_KEYS, expected, strict=True):
        if (found := made.facts()[key]) != wanted:
            raise ValueError(
                f"the ids given for {made.name!r} have {found} {key.replace('_', ' ')}; the published "
                f"setting has {wanted}. Are they interaction ids from 0, in HICO-DET's order? Another name "
                f"takes any ids"
            )
