"""From a detector's outputs to detections: columns, scores, NMS, the 3 … 15 rule, and the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toy_hoi import PERSON, table

from rankfold.hoi.annotations import Scene
from rankfold.hoi.classes import ClassTable
from rankfold.hoi.detections import (
    COCO,
    COCO_IDS,
    Detections,
    Selection,
    columns_of,
    from_outputs,
    none_found,
    oracle,
    select,
)

SIZE = (200, 100)


def coco_table() -> ClassTable:
    """All 80 objects, by name as in HICO-DET, and one verb for each."""
    objects = sorted(name.replace(" ", "_") for name in COCO)
    return ClassTable(("use",), tuple(objects), tuple((0, i) for i in range(80)))


def outputs(labels: list[int], columns: int, scores: list[float] | None = None) -> tuple[Tensor, ...]:
    """(logits, boxes, queries) of queries that are sure of one column each, with boxes side by side."""
    n = len(labels)
    logits = torch.zeros(n, columns)
    for row, (label, score) in enumerate(zip(labels, scores or [0.9] * n, strict=True)):
        logits[row, label] = torch.log(torch.tensor(score / (1 - score) * (columns - 1)))
    x = (torch.arange(n) + 0.5) / max(n, 1)
    boxes = torch.stack(
        [x, torch.full((n,), 0.5), torch.full((n,), 0.5 / max(n, 1)), torch.full((n,), 0.8)], 1
    )
    return logits, boxes, torch.arange(n).float()[:, None].repeat(1, 8)


def many(labels: list[int], scores: list[float]) -> Detections:
    """Detections of boxes far apart; the query tells the place in the list."""
    x = torch.arange(len(labels)).float() * 20
    boxes = torch.stack([x, x * 0, x + 10, x * 0 + 10], 1)
    return Detections(
        boxes, torch.tensor(scores), torch.tensor(labels), torch.arange(len(labels)).float()[:, None]
    )


def test_coco_has_80_categories_of_90_ids() -> None:
    assert len(COCO) == len(set(COCO)) == len(COCO_IDS) == 80
    assert dict(zip(COCO, COCO_IDS, strict=True))["toothbrush"] == 90 and COCO_IDS[0] == 1
    assert dict(zip(COCO, COCO_IDS, strict=True))["dining table"] == 67


def test_92_columns_are_mapped_to_81() -> None:
    """Trap 22. Column i of a plain DETR is COCO's id i, the last is no object."""
    known = coco_table()
    columns = columns_of(92, known)
    assert columns.shape == (81,) and columns[-1] == 91
    queries = list(COCO_IDS)
    found = from_outputs(*outputs(queries, 92), SIZE, columns, known.human, Selection(most=80))  # type: ignore[misc]
    names = {
        int(query): known.objects[int(label)]
        for query, label in zip(found.queries[:, 0], found.labels, strict=True)
    }
    assert names == {place: name.replace(" ", "_") for place, name in enumerate(COCO)}
    assert torch.equal(columns_of(81, known), torch.arange(81)), "the table's own order"


@pytest.mark.parametrize("width", [80, 82, 91, 93, 2])
def test_an_unknown_width_is_refused(width: int) -> None:
    with pytest.raises(
        ValueError, match=f"has {width} columns and does not say what.*92.*81.*Pass their names"
    ):
        columns_of(width, coco_table())


def test_outputs_of_another_width_are_refused() -> None:
    logits, boxes, queries = outputs([1], 81)
    with pytest.raises(ValueError, match="logits have 81 columns, but the map is for 92"):
        from_outputs(logits, boxes, queries, SIZE, columns_of(92, coco_table()), 49)


def test_a_detector_that_names_its_columns() -> None:
    toy = table()  # bicycle, person, dog, cup
    names = {0: "N/A", 1: "Person", 2: "cup", 3: "DOG", 4: "horse"}
    assert columns_of(6, toy, names).tolist() == [-1, 1, 3, 2, 5]
    with pytest.raises(ValueError, match="knows no 'person'"):
        columns_of(
            6, ClassTable(toy.verbs, ("x", "person"), ((0, 0),)), {0: "personal", 4: "A person", 5: "person"}
        )
    assert columns_of(5, toy, {0: "LABEL_0", 1: "LABEL_1"}).tolist() == [0, 1, 2, 3, 4], (
        "names that say nothing"
    )


def test_an_object_that_the_detector_does_not_know_is_never_found() -> None:
    columns = torch.tensor([-1, 1, 3, 2, 5])
    found = from_outputs(torch.zeros(4, 6), torch.rand(4, 4), torch.zeros(4, 8), SIZE, columns, PERSON)
    assert 0 not in found.labels


def test_scores_and_boxes_by_hand() -> None:
    """Softmax over the objects that count and "no object"; a column that no object has takes no part."""
    logits = torch.tensor([[9.0, 0, 1, 2, 3]])
    columns = torch.tensor([1, 2, 3, 4])  # column 0 is nobody's
    found = from_outputs(logits, torch.tensor([[0.5, 0.5, 0.5, 0.2]]), torch.ones(1, 8), SIZE, columns, 0)
    e = torch.tensor([0.0, 1, 2, 3]).exp()
    torch.testing.assert_close(found.scores, (e[2] / e.sum()).reshape(1))
    assert found.labels.tolist() == [2]
    torch.testing.assert_close(found.boxes, torch.tensor([[50.0, 40, 150, 60]]))


def test_boxes_are_cut_at_the_border_and_dropped_when_nothing_is_left() -> None:
    logits, _, queries = outputs([0, 1], 5)
    boxes = torch.tensor([[0.0, 0.5, 0.5, 2.0], [0.5, 0.5, 0.0, 0.1]])
    found = from_outputs(logits, boxes, queries, SIZE, torch.arange(5), PERSON)
    assert found.boxes.tolist() == [[0, 0, 50, 100]] and found.labels.tolist() == [0]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_outputs_that_are_no_numbers_are_refused(place: int) -> None:
    held = list(outputs([0, 1], 5))
    held[place][1, 0] = float("nan")
    with pytest.raises(ValueError, match="no number"):
        from_outputs(*held, SIZE, torch.arange(5), PERSON)  # type: ignore[misc]
    logits, boxes, queries = outputs([0, 1], 5)
    with pytest.raises(ValueError, match=r"boxes \(1, 4\) and queries \(2, 8\)"):
        from_outputs(logits, boxes[:1], queries, SIZE, torch.arange(5), PERSON)


@pytest.mark.parametrize(
    ("passing", "failing", "kept"),
    [(5, 4, 5), (15, 3, 15), (18, 0, 15), (1, 5, 3), (0, 5, 3), (0, 2, 2), (3, 3, 3), (2, 0, 2), (0, 0, 0)],
)
@pytest.mark.parametrize("human", [True, False])
def test_three_to_fifteen_of_each(passing: int, failing: int, kept: int, human: bool) -> None:
    """The rule holds for humans and for the rest apart; too few are filled up by the best-scored."""
    scores = [0.2 + 0.01 * i for i in range(passing)] + [0.19 - 0.01 * i for i in range(failing)]
    labels = [PERSON if human else 0] * len(scores)
    rest = 0 if human else PERSON
    found = select(many([rest, *labels], [0.5, *scores]), PERSON, Selection())
    mine = found.take(found.labels == labels[0]) if labels else found.take(found.labels != rest)
    assert len(mine) == kept and len(found) == kept + 1
    assert mine.scores.tolist() == torch.tensor(scores).sort(descending=True).values[:kept].tolist()


def test_humans_come_first_then_others_each_by_score() -> None:
    found = select(many([0, 1, 2, 1, 3, 1], [0.9, 0.3, 0.95, 0.8, 0.3, 0.31]), PERSON, Selection())
    assert found.queries[:, 0].tolist() == [3, 5, 1, 2, 0, 4]
    assert found.labels.tolist() == [1, 1, 1, 2, 0, 3]


def test_nms_goes_by_object_and_before_the_counting() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10]] * 5)
    labels, scores = torch.tensor([1, 1, 1, 0, 0]), torch.tensor([0.3, 0.9, 0.8, 0.7, 0.1])
    found = select(Detections(boxes, scores, labels, torch.zeros(5, 2)), PERSON, Selection())
    assert found.labels.tolist() == [1, 0] and found.scores.tolist() == pytest.approx([0.9, 0.7])


def test_an_image_without_a_person_and_one_with_a_single_detection() -> None:
    alone = from_outputs(*outputs([0, 2], 5), SIZE, torch.arange(5), PERSON)  # type: ignore[misc]
    assert len(alone) == 2 and PERSON not in alone.labels
    single = from_outputs(*outputs([PERSON], 5), SIZE, torch.arange(5), PERSON)  # type: ignore[misc]
    assert single.labels.tolist() == [PERSON]
    assert len(select(none_found(8), PERSON, Selection())) == 0
    assert len(from_outputs(*outputs([], 5), SIZE, torch.arange(5), PERSON)) == 0  # type: ignore[misc]


@pytest.mark.parametrize(
    "fields", [{"score": 1.1}, {"nms": -0.1}, {"least": 4, "most": 3}, {"least": -1}, {"least": 0, "most": 0}]
)
def test_bad_selections_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must lie in|least"):
        Selection(**fields)


# --- detections of the annotations -------------------------------------------------------------------------


def scene(name: str = "a.png") -> Scene:
    humans = torch.tensor([[10.0, 10, 40, 90], [10, 10, 40, 90], [100, 10, 130, 90]])
    others = torch.tensor([[50.0, 50, 70, 70], [100, 10, 130, 90], [150, 20, 190, 60]])
    return Scene(name, SIZE, humans, others, torch.tensor([0, 3, 7]))  # ride bicycle, hug person, hold cup


def test_the_oracle_finds_every_box_once() -> None:
    found = oracle(scene(), table())
    assert found.labels.tolist() == [1, 1, 0, 3] and found.scores.tolist() == [1] * 4
    assert sorted(map(tuple, found.boxes.tolist()))[0] == (10, 10, 40, 90)
    assert found.queries.shape == (4, 256)
    found.check(table(), "here")
    extra = (torch.tensor([[1.0, 1, 5, 5]]), torch.tensor([2]))
    assert 2 in oracle(scene(), table(), extra=extra).labels
    empty = Scene("b.png", SIZE, torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert len(oracle(empty, table(), width=8)) == 0 and oracle(empty, table(), width=8).queries.shape == (
        0,
        8,
    )


def test_the_oracle_is_the_same_for_the_same_scene_and_seed() -> None:
    def numbers(name: str, seed: int) -> list[float]:
        found = oracle(scene(name), table(), 0.05, seed, width=4)
        return torch.cat([found.boxes.flatten(), found.scores, found.queries.flatten()]).tolist()

    assert numbers("a", 1) == numbers("a", 1)
    assert numbers("a", 1) != numbers("a", 2) and numbers("a", 1) != numbers("b", 1)


def test_the_oracle_moves_boxes_as_told_and_its_queries_tell_the_object() -> None:
    exact, moved = oracle(scene(), table()), oracle(scene(), table(), 0.05)
    shift = (moved.boxes[moved.labels == 0] - exact.boxes[exact.labels == 0]).abs() / 20
    assert 0 < shift.max() < 0.3 and 0.6 <= moved.scores.min() < moved.scores.max() <= 1
    wild = [oracle(scene(str(i)), table(), 3.0, i).check(table(), "wild") for i in range(20)]
    assert all((one.boxes >= 0).all() and (one.boxes[:, 2] <= SIZE[0]).all() for one in wild)
    gram = (
        torch.nn.functional.normalize(exact.queries, dim=1)
        @ torch.nn.functional.normalize(moved.queries, dim=1).mT
    )
    same = exact.labels[:, None] == moved.labels[None, :]
    assert gram[same].min() > 0.9 and gram[~same].abs().max() < 0.4
