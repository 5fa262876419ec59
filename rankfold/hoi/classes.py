"""The classes of a data set: verbs, objects, and which (verb, object) pairs are interactions.

Three kinds of ids, and every function says which it takes: `interaction` 0 … N-1, `verb` 0 … V-1, `object`
0 … O-1. HICO-DET has N = 600, V = 117, O = 80; V-COCO has 24 verbs with 236 pairs. Objects stand in the order
of the data set's own files (HICO-DET: by name), never in that of a detector.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfold.hoi.consnet import literals

PERSON = "person"
RARE_BELOW = 10  # training pairs: HICO-DET calls a class with fewer rare


@dataclass(frozen=True)
class ClassTable:
    """The names and pairs of a data set. `interactions[i]` is the (verb id, object id) of interaction `i`;
    `rare` holds interaction ids. ValueError for ids out of range, a pair or a name twice, or no "person"."""

    verbs: tuple[str, ...]
    objects: tuple[str, ...]
    interactions: tuple[tuple[int, int], ...]
    rare: frozenset[int] = field(default_factory=frozenset)
    name: str = ""

    def __post_init__(self) -> None:
        for kind, names in (("verbs", self.verbs), ("objects", self.objects)):
            twice = [name for name, count in Counter(names).items() if count > 1]
            if not names or twice:
                raise ValueError(f"the {kind} must be different names, at least one; twice: {twice}")
        if PERSON not in self.objects:
            raise ValueError(f"no object is called {PERSON!r}: whose interactions are they?")
        if not self.interactions:
            raise ValueError("a class table needs at least one (verb, object) pair")
        for i, (verb, thing) in enumerate(self.interactions):
            if not (0 <= verb < len(self.verbs) and 0 <= thing < len(self.objects)):
                raise ValueError(
                    f"interaction {i} is (verb {verb}, object {thing}), but there are {len(self.verbs)} "
                    f"verbs and {len(self.objects)} objects"
                )
        for (verb, thing), count in Counter(self.interactions).items():
            if count > 1:
                pair = f"({self.verbs[verb]}, {self.objects[thing]})"
                raise ValueError(f"{count} interactions are {pair}: each pair is one interaction")
        if outside := sorted(i for i in self.rare if not 0 <= i < len(self)):
            raise ValueError(f"rare interaction {outside[0]} is outside 0 … {len(self) - 1}")

    def __len__(self) -> int:
        return len(self.interactions)

    @cached_property
    def verb_of(self) -> Tensor:
        """(N,) int64: the verb id of each interaction id."""
        return torch.tensor([verb for verb, _ in self.interactions])

    @cached_property
    def object_of(self) -> Tensor:
        """(N,) int64: the object id of each interaction id."""
        return torch.tensor([thing for _, thing in self.interactions])

    @cached_property
    def indicator(self) -> Tensor:
        """(N, V) float32, 1 at the verb of each interaction: Y of the prediction."""
        return torch.nn.functional.one_hot(self.verb_of, len(self.verbs)).float()

    @cached_property
    def verb_counts(self) -> Tensor:
        """(V,) float32: how many interactions each verb has (0 for a verb without one)."""
        return self.indicator.sum(0)

    @cached_property
    def interaction_at(self) -> Tensor:
        """(O, V) int64: the interaction id of an (object, verb) pair, -1 where it is none."""
        at = torch.full((len(self.objects), len(self.verbs)), -1)
        at[self.object_of, self.verb_of] = torch.arange(len(self))
        return at

    @cached_property
    def valid(self) -> Tensor:
        """(O, V) bool: which (object, verb) pairs are interactions."""
        return self.interaction_at >= 0

    @property
    def human(self) -> int:
        """The object id of "person"."""
        return self.objects.index(PERSON)

    def name_of(self, interaction: int) -> tuple[str, str]:
        """Two pieces that read as a phrase: ("riding", "a bicycle"), or ("and", "a bicycle") for none."""
        verb, thing = self.interactions[interaction]
        return gerund(self.verbs[verb]), with_article(self.objects[thing])

    def words(self, interaction: int) -> str:
        """ "ride bicycle", as tables and errors print an interaction."""
        verb, thing = self.interactions[interaction]
        return f"{plain(self.verbs[verb])} {plain(self.objects[thing])}"

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of verbs, objects and pairs: files made for one table are refused by another. Which
        classes are rare and what the table is called do not count."""
        held = json.dumps([self.verbs, self.objects, self.interactions])
        return hashlib.sha256(held.encode()).hexdigest()

    def check_same(self, other: ClassTable, what: str = "the other table") -> None:
        """ValueError that names the first difference in verbs, objects or pairs from `other`."""
        for kind in ("verbs", "objects", "interactions"):
            mine, theirs = getattr(self, kind), getattr(other, kind)
            for place, (here, there) in enumerate(zip(mine, theirs, strict=False)):
                if here != there:
                    raise ValueError(f"{what} disagrees: {kind}[{place}] is {there!r}, expected {here!r}")
            if len(mine) != len(theirs):
                raise ValueError(f"{what} disagrees: it has {len(theirs)} {kind}, expected {len(mine)}")

    def to_json(self) -> dict[str, Any]:
        """Plain lists, for JSON; `from_json` reads them back."""
        return {
            "name": self.name,
            "verbs": list(self.verbs),
            "objects": list(self.objects),
            "interactions": [list(pair) for pair in self.interactions],
            "rare": sorted(self.rare),
        }

    @classmethod
    def from_json(cls, body: Any, where: str = "the class table") -> ClassTable:
        """What `to_json` gave. ValueError, beginning with `where`, for anything else."""
        expected = {"verbs": str, "objects": str, "interactions": list, "rare": int}
        if not isinstance(body, Mapping):
            raise ValueError(f"{where} is no JSON object with {', '.join(expected)}")
        for key, kind in expected.items():
            held = body.get(key, [] if key == "rare" else None)
            if not isinstance(held, list) or not all(type(item) is kind for item in held):
                raise ValueError(f"{where}: {key!r} must be a list of {kind.__name__}")
        pairs = body["interactions"]
        if not all(len(pair) == 2 and all(type(i) is int for i in pair) for pair in pairs):
            raise ValueError(f"{where}: 'interactions' must hold [verb, object] pairs of whole numbers")
        try:
            return cls(
                tuple(body["verbs"]),
                tuple(body["objects"]),
                tuple((verb, thing) for verb, thing in pairs),
                frozenset(body.get("rare", ())),
                str(body.get("name", "")),
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def from_hicodet(
    source: str | os.PathLike[str] | Mapping[str, Any],
    training: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    where: str = "HICO-DET annotations",
) -> ClassTable:
    """The table of a HICO-DET file (a path, or its content): `verbs`, `objects`, and `correspondence`, whose
    rows are [interaction, object, verb] in order.

    Rare are the interactions with fewer than 10 pairs in the file `training`; without one those in the list
    `rare` of `source`, if it has one. ValueError naming the file (`where`, for content) and the key that is
    missing or wrong.
    """
    where, body = content(source, where)
    rows = body.get("correspondence")
    good = isinstance(rows, list) and all(
        isinstance(row, list) and len(row) == 3 and all(type(i) is int for i in row) for row in rows
    )
    if not good or [row[0] for row in rows] != list(range(len(rows))):  # type: ignore[union-attr]
        raise ValueError(f"{where}: 'correspondence' must be rows [interaction, object, verb], 0, 1, 2, …")
    pairs = [[verb, thing] for _, thing, verb in rows]  # type: ignore[union-attr]
    rare = body.get("rare", [])
    if training is not None:
        place, other = content(training, "HICO-DET annotations")
        images = other.get("annotation")
        if not isinstance(images, list) or not all(isinstance(i, Mapping) and "hoi" in i for i in images):
            raise ValueError(f"{place}: 'annotation' must be a list of images with 'hoi'")
        counts = Counter(i for image in images for i in image["hoi"])
        rare = [i for i in range(len(pairs)) if counts[i] < RARE_BELOW]
    lists = {key: body.get(key) for key in ("verbs", "objects")}
    return ClassTable.from_json({"name": "HICO-DET", "interactions": pairs, "rare": rare, **lists}, where)


def from_vcoco(
    source: str | os.PathLike[str] | Mapping[str, Any], where: str = "V-COCO annotations"
) -> ClassTable:
    """The table of a V-COCO file: `classes`, `objects` (the first is "background"), and `action_to_object`,
    the objects of each action. Interactions go by action, then by object."""
    where, body = content(source, where)
    things, takes = body.get("objects"), body.get("action_to_object")
    if not isinstance(things, list) or things[:1] != ["background"]:
        raise ValueError(f"{where}: 'objects' must be a list that begins with \"background\"")
    good = isinstance(takes, list) and all(
        isinstance(row, list) and all(type(i) is int for i in row) for row in takes
    )
    if not good:
        raise ValueError(f"{where}: 'action_to_object' must hold a list of object numbers for each action")
    pairs = [[verb, thing - 1] for verb, row in enumerate(takes) for thing in sorted(row)]  # type: ignore[arg-type]
    names = {"verbs": body.get("classes"), "objects": things[1:]}
    return ClassTable.from_json({"name": "V-COCO", "interactions": pairs, **names}, where)


def from_consnet() -> ClassTable:
    """The table of HICO-DET with its 138 rare classes, from the lists of the installed package `consnet`,
    whose code is not run; objects by name, as in HICO-DET's own files. ValueError without the package."""
    held = literals()
    names = held["OBJ_IDX_TO_OBJ_NAME"]
    objects = sorted(names)
    pairs = zip(held["HOI_IDX_TO_ACT_IDX"], held["HOI_IDX_TO_OBJ_IDX"], strict=True)
    return ClassTable(
        tuple(held["ACT_IDX_TO_ACT_NAME"]),
        tuple(objects),
        tuple((verb, objects.index(names[thing])) for verb, thing in pairs),
        frozenset(held["RARE_HOI_IDX"]),
        "HICO-DET",
    )


def content(source: str | os.PathLike[str] | Mapping[str, Any], what: str) -> tuple[str, Mapping[str, Any]]:
    """(how errors name it, the JSON object) of a path, or of what was read from one."""
    if isinstance(source, Mapping):
        return what, source
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"{path} is no file; {what} were expected there")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ValueError(f"{path} holds a JSON {type(body).__name__}, not an object: no {what}")
    return str(path), body


# --- words -------------------------------------------------------------------------------------------------


def plain(name: str) -> str:
    """ "stand_on" as "stand on"; the roles of V-COCO's actions ("hit instr") stay."""
    return name.replace("_", " ")


def gerund(verb: str) -> str:
    """ "stand_on" as "standing on", "no_interaction" as "and"; V-COCO's roles (obj, instr) are left out."""
    first, *rest = re.sub(r" (obj|instr|agent)$", "", plain(verb)).split()
    if (first, *rest) == ("no", "interaction"):
        return "and"
    if first.endswith("ie"):
        stem = first[:-2] + "y"
    elif re.search(r"[^eoy]e$", first):
        stem = first[:-1]
    elif re.fullmatch(r"[^aeiou]*[aeiou][^aeiouwxy]|control", first):  # one short syllable, and an exception
        stem = first + first[-1]
    else:
        stem = first
    return " ".join([f"{stem}ing", *rest])


def with_article(thing: str) -> str:
    """ "wine_glass" as "a wine glass"; none before the plurals (skis, scissors)."""
    words = plain(thing)
    if re.search(r"[^su]s$", words):
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
