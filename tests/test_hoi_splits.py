"""The zero-shot settings: the published counts, what they hide, and lists that cannot be one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_hoi import needs_consnet, table

from rankfold.hoi.classes import ClassTable, from_consnet
from rankfold.hoi.consnet import literals
from rankfold.hoi.splits import NAMES, PUBLISHED, UNSEEN_OBJECTS, UNSEEN_VERBS, Split, by_counts, split


def counts(made: Split) -> tuple[int, ...]:
    facts = made.facts()
    return tuple(facts[key] for key in ("unseen", "unseen_verbs", "unseen_objects", "rare_unseen"))


def compositions(hico: ClassTable, rare: bool) -> list[int]:
    """120 ids that are all rare (or none of them), and leave every verb and object with a seen one."""
    score = torch.tensor([float((i in hico.rare) != rare) for i in range(600)])
    return list(by_counts(hico, score, "RF-UC").unseen)


def check_partition(made: Split) -> None:
    """Trap 27."""
    assert sorted([*made.unseen, *made.seen]) == list(range(len(made.table)))
    assert list(made.unseen) == sorted(set(made.unseen)) and list(made.seen) == sorted(made.seen)


@needs_consnet
@pytest.mark.parametrize(("name", "expected"), [("UV", (84, 20, 0, 18)), ("UO", (100, 5, 12, 20))])
def test_unseen_verbs_and_objects_as_published(name: str, expected: tuple[int, ...]) -> None:
    hico = from_consnet()
    made = split(hico, name)
    assert counts(made) == expected == PUBLISHED[name]
    check_partition(made)
    hidden = [hico.verbs[v] for v in made.unseen_verbs]
    if name == "UV":
        assert hidden == UNSEEN_VERBS
    else:
        assert hidden == ["break", "brush_with", "flip", "move", "slide"]
        assert {hico.objects[o] for o in made.unseen_objects} == set(UNSEEN_OBJECTS)
        assert made.unseen == tuple(sorted(literals()["UO_HOI_IDX"])), "the names and the list of ids agree"


@needs_consnet
def test_the_other_published_compositions_hide_whole_verbs() -> None:
    """Why uc0 … uc4 are no setting here, and may be passed by their ids all the same."""
    hico = from_consnet()
    for number, ids in literals()["UC_HOI_IDX"].items():
        made = split(hico, f"uc{number}", ids)
        unseen, verbs, objects, rare = counts(made)
        assert (unseen, objects) == (120, 0) and verbs in (9, 10) and 25 <= rare <= 37
        check_partition(made)


@needs_consnet
@pytest.mark.parametrize(("name", "rare"), [("RF-UC", True), ("NF-UC", False)])
def test_compositions_come_by_their_ids_and_are_checked(name: str, rare: bool, tmp_path: Path) -> None:
    hico = from_consnet()
    ids = compositions(hico, rare)
    path = tmp_path / "ids.json"
    for held in (ids[::-1], {"unseen": ids}):
        path.write_text(json.dumps(held))
        made = split(hico, name, path)
        assert counts(made) == PUBLISHED[name] == (120, 0, 0, 120 if rare else 0)
        assert made.unseen == tuple(sorted(ids))
        check_partition(made)
    with pytest.raises(ValueError, match="119 unseen; the published setting has 120"):
        split(hico, name, ids[1:])
    wrong, other = compositions(hico, not rare), 0 if rare else 120
    with pytest.raises(
        ValueError, match=f"have {other} rare unseen; the published setting has {120 - other}"
    ):
        split(hico, name, wrong)
    assert counts(split(hico, "mine", wrong))[0] == 120
    with pytest.raises(ValueError, match="comes with the data: pass it"):
        split(hico, name)


@needs_consnet
def test_ids_that_hide_a_verb_are_not_the_published_ones() -> None:
    hico = from_consnet()
    ids = compositions(hico, False)
    verb = next(
        v for v in range(117) if hico.verb_counts[v] == 1 and int(hico.verb_of.eq(v).nonzero()) not in ids
    )
    with pytest.raises(ValueError, match="have 1 unseen verbs; the published setting has 0"):
        split(hico, "NF-UC", [*ids[1:], int(hico.verb_of.eq(verb).nonzero())])


def test_none_hides_nothing() -> None:
    made = split(table(), "none")
    assert made.unseen == () and made.facts() == {
        "unseen": 0,
        "unseen_verbs": 0,
        "unseen_objects": 0,
        "rare_unseen": 0,
        "seen": 10,
    }


def test_facts_by_hand() -> None:
    """ride bicycle (the only riding), hold person and hug person (all of "person"), and hug dog."""
    made = split(table(), "mine", [5, 0, 3, 4])
    assert made.unseen == (0, 3, 4, 5) and made.seen == (1, 2, 6, 7, 8, 9)
    assert made.unseen_verbs == (0, 2) and made.unseen_objects == (1,)
    assert made.rare_unseen == ()
    assert split(table(), "mine", [2, 0]).rare_unseen == (2,)
    assert Split.from_json(json.loads(json.dumps(made.to_json())), table()) == made


@pytest.mark.parametrize(
    ("name", "ids", "message"),
    [
        ("mine", range(10), "hides all 10 interactions"),
        ("mine", [0, 10], "unseen id 10 is no interaction; ids are 0 … 9"),
        ("mine", [-1], "unseen id -1"),
        ("mine", [1, 1], "unseen id 1 comes twice"),
        ("mine", [1.0], "list of whole numbers"),
        ("mine", [True], "list of whole numbers"),
        ("mine", {"seen": [1]}, "list of whole numbers"),
        ("UX", None, "no setting 'UX'; there are none, UV, UO, RF-UC, NF-UC"),
        ("UV", None, "it hides 'block', which this table lacks"),
        ("UO", None, "it hides 'elephant'"),
        ("RF-UC", None, "pass it, as a list"),
    ],
)
def test_bad_settings_are_refused(name: str, ids: Iterable[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(table(), name, ids)


@pytest.mark.parametrize("text", ["", "{", "3", '"abc"', '{"unseen": "abc"}', "[[1]]"])
def test_bad_files_of_ids_are_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "ids.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"ids\.json"):
        split(table(), "mine", path)
    with pytest.raises(ValueError, match=r"absent\.json cannot be read"):
        split(table(), "mine", str(tmp_path / "absent.json"))


@pytest.mark.parametrize("body", [None, [], {"unseen": [1]}, {"name": "x"}, {"name": "x", "unseen": ["1"]}])
def test_bad_json_is_refused(body: Any) -> None:
    with pytest.raises(ValueError, match="a file"):
        Split.from_json(body, table(), "a file")


def test_settings_by_counts_leave_every_verb_and_object_seen() -> None:
    toy = table()
    pairs = torch.tensor([5, 9, 1, 7, 2, 8, 3, 6, 4, 10])
    rare = by_counts(toy, pairs, "RF-UC", 3)
    assert (rare.name, rare.unseen) == ("RF-UC by counts", (2, 4, 7)), "not 6, 8, 0: the last of their verbs"
    assert rare.unseen_verbs == rare.unseen_objects == ()
    frequent = by_counts(toy, pairs, "NF-UC", 3)
    assert frequent.unseen == (1, 5, 7), "9 and, after 5, 3 are the last of their verbs"
    assert frequent.unseen_verbs == frequent.unseen_objects == ()
    check_partition(frequent)
    with pytest.raises(ValueError, match=r"only . of 10 interactions can be hidden.*9 were asked for"):
        by_counts(toy, pairs, "RF-UC", 9)
    with pytest.raises(ValueError, match="not 'UV'"):
        by_counts(toy, pairs, "UV", 1)
    with pytest.raises(ValueError, match=r"shape \(9,\) for 10"):
        by_counts(toy, pairs[1:], "RF-UC", 1)


def test_every_name_is_documented() -> None:
    import rankfold.hoi.splits as module

    assert set(PUBLISHED) | {"none"} == set(NAMES)
    assert all(name in (module.__doc__ or "") for name in PUBLISHED)
