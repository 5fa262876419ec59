"""mAP of interactions: hand cases, the slow twin, perfect detections, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hoi_slow_evaluator import twin
from torch import Tensor
from toy_hoi import table
from toy_hoi_pairs import FAR, H, T, annotations, boxes, predicted, random_set, scene

from rankfold.hoi import evaluation
from rankfold.hoi.annotations import Scene
from rankfold.hoi.evaluation import Predicted, evaluate
from rankfold.hoi.scores import harmonic_mean
from rankfold.hoi.splits import split


def ap(scenes: Sequence[Scene], predictions: Sequence[Predicted], points: str = "11") -> list[float]:
    """By both evaluators, which must agree."""
    truth = annotations(*scenes)
    found = evaluate(predictions, truth, points=points).ap.tolist()
    assert found == pytest.approx(twin(predictions, truth, points), abs=1e-12, nan_ok=True)
    return found


def test_hand_case_of_both_interpolations() -> None:
    """Four pairs; detections true, false, true: 6/11 + … = 5/11 by eleven points, 5/12 by all."""
    truth = [scene("a", *[((0, y, 10, y + 8), T, 0) for y in (0, 10, 20, 30)])]
    rows = [
        predicted("a", ((0, 0, 10, 8), T, 0, 0.9), (FAR, FAR, 0, 0.8), ((0, 10, 10, 18), T, 0, 0.7)),
    ]
    assert ap(truth, rows)[0] == pytest.approx(5 / 11)
    assert ap(truth, rows, "all")[0] == pytest.approx(5 / 12)


def test_of_duplicates_the_surest_is_true_however_well_it_fits() -> None:
    loose, other = (0, 0, 10, 15), scene("b", (FAR, FAR, 0))
    rows = [predicted("a", (H, T, 0, 0.5), (loose, T, 0, 0.9)), predicted("b", (FAR, FAR, 0, 0.7))]
    # true 0.9, true 0.7, false 0.5: were the exact fit the true one, there would be a false one in front.
    assert ap([scene("a", (H, T, 0)), other], rows, "all")[0] == 1
    rows = [predicted("a", (H, T, 0, 0.9), (loose, T, 0, 0.8)), predicted("b", (FAR, FAR, 0, 0.7))]
    assert ap([scene("a", (H, T, 0)), other], rows, "all")[0] == pytest.approx((1 + 2 / 3) / 2)


def test_an_overlap_of_exactly_one_half_is_a_miss() -> None:
    """Evaluation asks for more than 0.5; training, elsewhere, for at least 0.5."""
    half, more = (0, 0, 10, 10), (0, 0, 10, 10.001)
    truth = [scene("a", (H, T, 0))]
    assert ap(truth, [predicted("a", (half, T, 0, 0.9))])[0] == 0
    assert ap(truth, [predicted("a", (more, T, 0, 0.9))])[0] == 1
    assert ap(truth, [predicted("a", (H, (10, 10, 20, 20), 0, 0.9))])[0] == 0, "half of the object"


def test_both_boxes_and_the_interaction_must_fit() -> None:
    truth = [scene("a", (H, T, 0))]
    for human, thing, interaction in ((H, FAR, 0), (FAR, T, 0), (T, H, 0), (H, T, 1)):
        assert ap(truth, [predicted("a", (human, thing, interaction, 0.9))])[0] == 0
    other = [scene("a", (H, T, 0)), scene("b", (H, T, 1))]
    rows = [predicted("a", (H, T, 0, 0.9), (H, T, 1, 0.8)), predicted("b", (H, T, 1, 0.7))]
    assert ap(other, rows, "all")[:2] == [1, 0.5], "the wrong one of image a stands before the right one"


def test_a_detection_belongs_to_its_best_pair_only() -> None:
    """Two near ground truths; both detections fit the first best: the second stays without."""
    truth = [scene("a", ((0, 0, 10, 20), T, 0), ((0, 3, 10, 23), T, 0))]
    rows = [predicted("a", ((0, 0, 10, 20), T, 0, 0.9), ((0, 1, 10, 21), T, 0, 0.8))]
    assert ap(truth, rows, "all")[0] == 0.5


def test_missed_and_absent_classes() -> None:
    """A class that was never detected has 0 and counts; one without ground truth has none."""
    truth = annotations(scene("a", (H, T, 0), (H, T, 1)))
    found = evaluate([predicted("a", (H, T, 0, 0.9), (H, T, 5, 0.9))], truth)
    assert found.ap[:2].tolist() == [1, 0] and found.ap[2:].isnan().all()
    assert found.full == 0.5 and found.classes["full"] == 2 and found.missing == 8
    assert (found.truths[:2].tolist(), found.found[:2].tolist()) == ([1, 1], [1, 0])
    assert found.detections.tolist() == [1, 0, 0, 0, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("points", ["11", "all"])
def test_ties_are_settled_by_order(points: str) -> None:
    """Equal scores: the image annotated first, then the row given first, whatever order images come in."""
    truth = [scene("a", (H, T, 0)), scene("b", (H, T, 0))]
    good, bad = (H, T, 0, 0.5), (FAR, FAR, 0, 0.5)
    for late in (False, True):
        rows = [predicted("a", good), predicted("b", bad, good)]
        assert ap(truth, rows[::-1] if late else rows, points)[0] == pytest.approx(
            (1 + 2 / 3) / 2 if points == "all" else (6 + 5 * 2 / 3) / 11
        )
        rows = [predicted("a", good), predicted("b", good, bad)]
        assert ap(truth, rows[::-1] if late else rows, points)[0] == 1
        rows = [predicted("a", (H, T, 0, -0.0)), predicted("b", (FAR, FAR, 0, 0.0), (H, T, 0, 0.0))]
        found = ap(truth, rows[::-1] if late else rows, "all")[0]
        assert found == pytest.approx((1 + 2 / 3) / 2), "zeros of both signs are equal"


def test_agrees_with_the_slow_twin_on_500_random_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in small pieces: three sizes of what is joined and compared at a time."""
    values = []
    for seed in range(500):
        monkeypatch.setattr(evaluation, "_ROWS", (10, 40, 400_000)[seed % 3])
        monkeypatch.setattr(evaluation, "_MEETINGS", (1, 7, 1_000_000)[seed // 3 % 3])
        values += ap(*random_set(seed), ("11", "all")[seed // 2 % 2])
    known = [value for value in values if not math.isnan(value)]
    assert len(known) > 1500, "classes"
    assert sum(0 < value < 1 for value in known) > 1000, "the sets are not trivial"


@pytest.mark.parametrize("points", ["11", "all"])
def test_perfect_detections_give_one(points: str) -> None:
    for seed in range(20):
        scenes, _ = random_set(seed)
        # A pair annotated twice alike could be found once only.
        scenes = [unique(one) for one in scenes]
        rows = [Predicted(s.filename, s.boxes_h, s.boxes_o, s.interactions, s.boxes_h[:, 0]) for s in scenes]
        found = evaluate(rows, annotations(*scenes), points=points)
        assert found.full == 1
        assert (found.found == found.truths).all()


def unique(one: Scene) -> Scene:
    rows = torch.cat([one.boxes_h, one.boxes_o, one.interactions[:, None].float()], 1).unique(dim=0)
    return Scene(one.filename, one.size, rows[:, :4], rows[:, 4:8], rows[:, 8].long())


def changed(one: Predicted, rows: Tensor, scores: Tensor) -> Predicted:
    return Predicted(one.filename, one.boxes_h[rows], one.boxes_o[rows], one.interactions[rows], scores)


def test_only_the_order_of_scores_counts() -> None:
    """Any rising function of the scores, any order of rows and images: the same AP."""
    for seed in range(0, 20, 2):  # without ties
        scenes, predictions = random_set(seed)
        before = evaluate(predictions, annotations(*scenes)).ap
        draw = torch.Generator().manual_seed(seed)
        after = []
        for one in reversed(predictions):
            order = torch.randperm(len(one), generator=draw)
            after.append(changed(one, order, 10 * one.scores[order] ** 3 - 2))
        assert torch.equal(evaluate(after, annotations(*scenes)).ap.nan_to_num(-1), before.nan_to_num(-1))


@pytest.mark.parametrize("points", ["11", "all"])
def test_a_surer_true_detection_never_costs(points: str) -> None:
    """Raising the score of a detection on a ground truth, to above all others, lowers no AP."""
    truth = annotations(*(made := random_set(2))[0])
    before = evaluate(made[1], truth, points=points)
    raised = 0
    for at, one in enumerate(made[1]):
        same = next(s for s in made[0] if s.filename == one.filename)
        for row in range(len(one)):
            exact = (same.boxes_h == one.boxes_h[row]).all(1) & (same.boxes_o == one.boxes_o[row]).all(1)
            if not (exact & (same.interactions == one.interactions[row])).any():
                continue
            scores = one.scores.clone()
            scores[row] = 2
            rows = [*made[1]]
            rows[at] = changed(one, torch.arange(len(one)), scores)
            after = evaluate(rows, truth, points=points)
            assert (after.ap - before.ap).nan_to_num(0).min() > -1e-12
            raised += 1
    assert raised > 10


def test_groups_and_their_laws() -> None:
    scenes, predictions = random_set(4, images=60, classes=10)
    hidden = split(table(), "mine", ids=[0, 6, 9])
    found = evaluate(predictions, annotations(*scenes), hidden)
    means = (found.full, found.rare, found.non_rare, found.seen, found.unseen, found.harmonic)
    full, rare, common, seen, unseen, harmonic = (x if x is not None else math.nan for x in means)
    ap = found.ap.tolist()
    assert full == pytest.approx(sum(ap) / 10) and rare == pytest.approx((ap[2] + ap[6]) / 2)
    assert full == pytest.approx((2 * rare + 8 * common) / 10) == pytest.approx((3 * unseen + 7 * seen) / 10)
    assert harmonic == pytest.approx(2 * unseen * seen / (unseen + seen)) and 0 < unseen < 1
    assert [name for name, _, _ in found.rows()] == [
        *("full", "rare", "non-rare", "seen", "unseen", "harmonic mean")
    ]
    facts = found.to_json()
    assert facts["mAP"]["unseen"] == unseen and len(facts["ap"]) == 10 and facts["split"] == "mine"
    assert "unseen" in found.in_words()
    plain = evaluate(predictions, annotations(*scenes))
    assert plain.unseen is plain.seen is plain.harmonic is None and plain.detector == ""
    assert harmonic_mean(0, 0) == 0


def test_the_report_says_what_the_detector_saw() -> None:
    """A split that hides all interactions of an object: the detector may know it nevertheless."""
    truth, rows = annotations(scene("a", (H, T, 2))), [predicted("a")]
    hidden = split(table(), "mine", ids=[0, 1, 2])  # every bicycle
    notes = [evaluate(rows, truth, hidden, detector_saw=saw).detector for saw in (None, [1, 2], range(4))]
    assert notes[0].startswith("Not recorded") and "was not trained on the 1 unseen" in notes[1]
    assert "trained on 1 of the 1 unseen objects (bicycle): not comparable" in notes[2]
    verbs = split(table(), "mine", ids=[2])
    assert evaluate(rows, truth, verbs, detector_saw=range(4)).detector == "", "no object is unseen"


GOOD = (H, T, 0, 0.5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([predicted("a", GOOD), predicted("a", GOOD)], "a is predicted twice"),
        ([predicted("z", GOOD)], "predictions for z, which is not among the 2 annotated images"),
        ([predicted("b", GOOD)], "no predictions for 1 of 2 annotated images, the first is a"),
        ([predicted("a", (H, T, 10, 0.5))], r"a: predicted interaction 10 is not one of 0\.\.9"),
        ([predicted("a", (H, T, -1, 0.5))], "a: predicted interaction -1"),
        ([predicted("a", GOOD, (H, T, 0, math.nan))], r"a: scores\[1\] = nan is not finite"),
        ([predicted("a", ((0, 0, math.inf, 1), T, 0, 0.5))], r"a: boxes_h\[0\]"),
        (
            [Predicted("a", boxes([H]), boxes([T, T]), torch.tensor([0]), torch.ones(1))],
            r"a: .*boxes_o \(2, 4\)",
        ),
        ([Predicted("a", boxes([H]), boxes([T]), torch.ones(1), torch.ones(1))], "must be integers"),
    ],
)
def test_bad_predictions_name_the_image(rows: list[Predicted], message: str) -> None:
    truth = annotations(scene("a", (H, T, 0)), scene("b"))
    with pytest.raises(ValueError, match=message):
        evaluate(rows, truth)


def test_nothing_predicted_and_nothing_annotated() -> None:
    empty: Any = annotations(scene("a"))
    found = evaluate([predicted("a", GOOD)], empty)
    assert found.full is None and found.ap.isnan().all()
    assert found.in_words() == "mAP (11-point): –"
    assert evaluate([], annotations()).images == 0
    assert evaluate([predicted("a")], annotations(scene("a", (H, T, 0)))).full == 0
    with pytest.raises(ValueError, match="points='12'"):
        evaluate([], annotations(), points="12")
    with pytest.raises(ValueError, match="holds interaction 10, but"):
        other: Any = type("Other", (), {"unseen": (10,), "name": "UV"})
        evaluate([], annotations(), other)
    with pytest.raises(ValueError, match="name 1 images twice"):
        evaluate([], annotations(scene("a"), scene("a")))


def test_detections_in_an_image_without_ground_truth_are_false() -> None:
    truth = annotations(scene("a", (H, T, 0)), scene("b"))
    rows = [predicted("a", (H, T, 0, 0.5))]
    assert evaluate(rows, truth).full == 1, "b may be left out"
    assert evaluate([*rows, predicted("b", (H, T, 0, 0.9))], truth, points="all").full == 0.5
