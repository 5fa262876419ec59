"""V-COCO's role AP: hand cases of both scenarios, the slow twin, and the data set's own files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hoi_slow_evaluator import role_twin
from toy_hoi import table
from toy_hoi_pairs import FAR, H, T, annotations, boxes, predicted, random_set, scene

from rankfold.hoi.evaluation import Predicted
from rankfold.hoi.role import Doers, Roles, RoleScores, evaluate_roles, from_pairs
from rankfold.hoi.role_files import read_roles

EMPTY = (0, 0, 0, 0)
NONE = (math.nan,) * 4
RIDE, HOLD = 0, 1  # verb ids of the table; its interactions 0 and 1 are of a bicycle


def doers(name: str, people: list[Any], *rows: tuple[int, int, Any], unknown: tuple[int, ...] = ()) -> Doers:
    """One image from rows (person, role, object box)."""
    marks = torch.tensor([i in unknown for i in range(len(people))], dtype=torch.bool)
    doer, roles = (torch.tensor([row[i] for row in rows], dtype=torch.int64) for i in (0, 1))
    return Doers(name, boxes(people), marks, doer, roles, boxes([row[2] for row in rows]))


def scores(images: list[Doers], rows: list[Predicted], scenario: int) -> RoleScores:
    """By both evaluators, which must agree."""
    truth = Roles(table().verbs, images, "toy")
    found = evaluate_roles(rows, truth, table(), scenario=scenario)
    slow = role_twin(rows, truth, table(), scenario)
    assert found.ap.tolist() == pytest.approx(slow, abs=1e-12, nan_ok=True)
    return found


def ride(images: list[Doers], rows: list[Predicted], scenario: int = 1) -> float:
    return float(scores(images, rows, scenario).ap[RIDE])


def test_a_missing_object_tells_the_scenarios_apart() -> None:
    image = [doers("a", [H], (0, RIDE, NONE))]
    with_box, without = predicted("a", (H, T, 0, 0.9)), predicted("a", (H, EMPTY, 0, 0.9))
    assert (ride(image, [with_box], 1), ride(image, [without], 1)) == (0, 1)
    assert (ride(image, [with_box], 2), ride(image, [without], 2)) == (1, 1)


@pytest.mark.parametrize("scenario", [1, 2])
def test_an_annotated_object_must_be_found(scenario: int) -> None:
    """An overlap of exactly one half is enough here, of the person and of the object."""
    image = [doers("a", [H], (0, RIDE, T))]
    for human, thing, value in (
        (H, T, 1),
        ((0, 0, 10, 10), T, 1),
        (H, (10, 10, 20, 20), 1),
        ((0, 0, 10, 9.9), T, 0),
        (H, (10, 10, 19.9, 20), 0),
        (H, EMPTY, 0),
    ):
        assert ride(image, [predicted("a", (human, thing, 0, 0.9))], scenario) == value, (human, thing)


def test_a_detection_goes_to_the_person_it_overlaps_most_whatever_they_do() -> None:
    """The neighbour rides: a box nearer to the other is wrong, though it overlaps the rider by over half."""
    near = (0, 4, 10, 24)
    image = [doers("a", [H, near], (1, RIDE, T))]
    assert ride(image, [predicted("a", ((0, 1, 10, 21), T, 0, 0.9))]) == 0
    assert ride(image, [predicted("a", ((0, 3, 10, 23), T, 0, 0.9))]) == 1


def test_what_unknown_people_do_counts_neither_way() -> None:
    rows = [predicted("a", (FAR, T, 0, 0.9), (H, T, 0, 0.8))]
    assert ride([doers("a", [H, FAR], (0, RIDE, T), unknown=(1,))], rows) == 1
    assert ride([doers("a", [H, FAR], (0, RIDE, T))], rows) == 0.5


def test_duplicates_actions_and_recall() -> None:
    image = [doers("a", [H, FAR], (0, RIDE, T), (1, RIDE, NONE)), doers("b", [])]
    rows = [predicted("a", (H, T, 0, 0.9), (H, T, 0, 0.8), (H, T, 1, 0.7)), predicted("b", (H, T, 0, 0.6))]
    found = scores(image, rows, 1)
    assert found.ap[RIDE] == 0.5, "the second rider counts in the recall, without an object too"
    assert found.ap[HOLD].isnan() and found.mean == 0.5
    assert found.to_json()["roles"]["ride"] == {"ap": 0.5, "people": 2}
    assert found.to_json()["roles"]["hold"] == {"ap": None, "people": 0}
    assert found.in_words() == "mean role AP, scenario 1: 50.00 %"


def test_perfect_pairs_give_one_and_the_scenarios_agree_on_pairs() -> None:
    truth = from_pairs(annotations(scene("a", (H, T, 0), (H, T, 1), (FAR, T, 0)), scene("b")))
    rows = [predicted("a", (H, T, 0, 0.9), (H, T, 1, 0.8), (FAR, T, 0, 0.7))]
    for scenario in (1, 2):
        found = evaluate_roles(rows, truth, table(), scenario=scenario)
        assert found.mean == 1 and found.truths.tolist() == [2, 1, 0, 0, 0, 0]


def test_agrees_with_the_slow_twin_on_random_sets() -> None:
    """Missing objects, empty boxes, unknown people, ties."""
    partial = 0
    for seed in range(60):
        draw = torch.Generator().manual_seed(seed)
        truth, rows = random_set(seed)
        images = []
        for one in from_pairs(annotations(*truth)).images:
            entry = one.doer * 10 + one.roles  # a person does a thing once
            first = torch.tensor([int((entry == e).nonzero()[0]) for e in entry.unique()], dtype=torch.int64)
            objects = one.boxes_o[first]
            objects[torch.rand(len(first), generator=draw) < 0.3] = math.nan
            unknown = torch.rand(len(one.people), generator=draw) < 0.2
            done = ~unknown[one.doer[first]]
            images.append(
                Doers(
                    one.filename,
                    one.people,
                    unknown,
                    one.doer[first][done],
                    one.roles[first][done],
                    objects[done],
                )
            )
        for one in rows:
            one.boxes_o[torch.rand(len(one), generator=draw) < 0.2] = 0
        found = scores(images, rows, seed % 2 + 1)
        partial += int(((found.ap > 0) & (found.ap < 1)).sum())
    assert partial > 40


def files() -> tuple[list[Any], dict[str, Any]]:
    """Two images: rider (annotation 1) and bicycle (2), someone V-COCO does not know (3), a rider without a
    bicycle (4), and a person without an area (5)."""
    made = [(1, 7, 1, [0, 0, 10, 20]), (2, 7, 2, [10, 10, 20, 10]), (3, 7, 1, [40, 40, 20, 20])]
    made += [(4, 8, 1, [-5, 0, 15, 20]), (5, 8, 1, [3, 3, 1, 0])]
    coco = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 64} for i in (7, 8)],
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "bicycle"}],
        "annotations": [
            {"id": i, "image_id": image, "category_id": kind, "bbox": box, "area": box[2] * box[3]}
            for i, image, kind, box in made
        ],
    }
    people = {"image_id": [7, 8], "ann_id": [1, 4]}
    ride = {
        "action_name": "ride",
        "role_name": ["agent", "instr"],
        "label": [1, 1],
        "role_object_id": [1, 4, 2, 0],
    }
    run = {"action_name": "run", "role_name": ["agent"], "label": [1, 0], "role_object_id": [1, 4]}
    return [ride | people, run | people], coco


def test_own_files(tmp_path: Path) -> None:
    actions, coco = files()
    (tmp_path / "vcoco.json").write_text(json.dumps(actions))
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    roles = read_roles(tmp_path / "vcoco.json", tmp_path / "coco.json")
    assert roles.names == ("ride instr",), "running has no object"
    first, second = roles.images
    assert first.filename == "7.jpg" and first.people.tolist() == [[0, 0, 10, 20], [40, 40, 60, 60]]
    assert first.unknown.tolist() == [False, True]
    assert (first.doer.tolist(), first.roles.tolist(), first.boxes_o.tolist()) == (
        [0],
        [0],
        [[10, 10, 30, 20]],
    )
    assert second.people.tolist() == [[0, 0, 10, 20]], "cut at the border"
    assert second.boxes_o.isnan().all() and roles.counts().tolist() == [2]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda a, c: a[0].pop("label"), "action 0 must hold"),
        (
            lambda a, c: a[0]["role_object_id"].pop(),
            "'ride' has 2 people and 2 roles, but .* 3 role_object_id",
        ),
        (lambda a, c: a[0]["role_object_id"].__setitem__(2, 99), "object 99 of 'ride instr' has no box"),
        (lambda a, c: c.pop("categories"), "'categories' must be a list"),
        (lambda a, c: c["annotations"][0].update(image_id=5), "annotation 1 is of image 5"),
        (lambda a, c: a[1]["image_id"].__setitem__(0, 99), "has no image 99"),
        (lambda a, c: a.clear(), "is no list of actions"),
    ],
)
def test_damaged_files(damage: Any, message: str) -> None:
    actions, coco = files()
    damage(actions, coco)
    with pytest.raises(ValueError, match=message):
        read_roles(actions, coco)


def test_what_is_refused() -> None:
    truth, known = Roles(table().verbs, [doers("a", [H], (0, RIDE, T))], "toy"), table()
    row = predicted("a", (H, T, 0, 0.9))
    for rows, message in (
        ([predicted("z")], "predictions for z, which toy does not annotate"),
        ([row, row], "a is predicted twice"),
        ([], "no predictions for 1 of 1 annotated images, the first is a"),
        ([predicted("a", (H, T, 10, 0.9))], "predicted interaction 10"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_roles(rows, truth, known)
    with pytest.raises(ValueError, match="scenario=3 must be 1 or 2"):
        evaluate_roles([row], truth, known, scenario=3)
    with pytest.raises(ValueError, match="toy has no role 'hold'; its roles are ride"):
        evaluate_roles([row], Roles(("ride",), truth.images, "toy"), known)
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        read_roles("missing.json", files()[1])
