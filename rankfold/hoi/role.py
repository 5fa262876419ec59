"""V-COCO's role average precision: who does what, and with what object, scenario 1 and 2.

A role is an action with one of its objects ("eat obj", "eat instr"): a verb of the class table. A detection
belongs to the person of its image whom its human box overlaps most, whatever that person does. It is left out
if nobody annotated what that person does. It is true if the person does it, human and object box overlap by
at least 0.5, and no surer detection found the same. Where the object is not annotated (hidden, or none)

    scenario 1    true only with an empty object box, all zeros      scenario 2    any object box will do

AP is the area under the interpolated precision ("all" of `rankfold.hoi.precision`); everyone who does the
action counts in the recall of each of its roles. These are the rules of the data set's own evaluator, with
two things settled here: corners are exclusive (it adds 1 pixel to every side), and a detection in an image
without a person is false.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rankfold.hoi.annotations import Annotations
from rankfold.hoi.boxes import iou
from rankfold.hoi.classes import ClassTable, plain
from rankfold.hoi.evaluation import Predicted
from rankfold.hoi.precision import average_precisions
from rankfold.report_format import DASH, percent

OVERLAP = 0.5  # at least, unlike HICO-DET's
SCENARIOS = (1, 2)


@dataclass(frozen=True, eq=False)
class Doers:
    """The people of one image and what they do.

    people   (p, 4) float32 boxes, whether they do anything or not
    unknown  (p,) bool: nobody annotated what this person does
    doer, roles (g,) int64: the person, and the role id, of everything that is done
    boxes_o  (g, 4) float32: the object, NaN where none is annotated
    """

    filename: str
    people: Tensor
    unknown: Tensor
    doer: Tensor
    roles: Tensor
    boxes_o: Tensor


@dataclass(frozen=True, eq=False)
class Roles:
    """Ground truth of a set; `names[i]` is what role id `i` is called."""

    names: tuple[str, ...]
    images: list[Doers] = field(repr=False)
    source: str

    def counts(self) -> Tensor:
        """(R,) int64: people who do the action of each role, whether its object is annotated or not."""
        every = [torch.zeros(0, dtype=torch.int64), *(one.roles for one in self.images)]
        return torch.cat(every).bincount(minlength=len(self.names))


@dataclass(frozen=True, eq=False)
class RoleScores:
    """`ap` (R,) float64 by role, NaN without ground truth; `mean` over the others, None if there are none."""

    names: tuple[str, ...]
    ap: Tensor
    truths: Tensor
    scenario: int
    mean: float | None

    def in_words(self) -> str:
        mean = DASH if self.mean is None else percent(self.mean, 2)
        return f"mean role AP, scenario {self.scenario}: {mean}"

    def to_json(self) -> dict[str, Any]:
        found = [None if math.isnan(value) else value for value in self.ap.tolist()]
        rows = zip(self.names, found, self.truths.tolist(), strict=True)
        return {
            "scenario": self.scenario,
            "mean": self.mean,
            "roles": {name: {"ap": value, "people": count} for name, value, count in rows},
        }


def from_pairs(annotations: Annotations) -> Roles:
    """Roles from annotated pairs: equal human boxes of an image are one person, a verb is a role.

    Pairs say nothing of people who do nothing, or do it without an object. So the scenarios agree on them,
    and recall is of fewer people than with the data set's own files (`rankfold.hoi.role_files`).
    """
    table, images = annotations.table, []
    for scene in annotations.scenes:
        people, doer = scene.boxes_h.unique(dim=0, return_inverse=True)
        unknown = torch.zeros(len(people), dtype=torch.bool)
        verbs = table.verb_of[scene.interactions]
        images.append(Doers(scene.filename, people, unknown, doer, verbs, scene.boxes_o))
    return Roles(table.verbs, images, annotations.source)


def evaluate_roles(
    predictions: Iterable[Predicted], roles: Roles, table: ClassTable, *, scenario: int = 1
) -> RoleScores:
    """Role AP of every verb of `table` and their mean. The object's class does not count, only its box.

    predictions  one per image, in any order, of interaction ids of `table`. An object box of zeros says that
                 there is no object
    roles        whose names hold every verb of `table`; roles the table does not have are left out

    Raises ValueError for another scenario, a verb that `roles` does not have, predictions that
    `Predicted.check` refuses, of an image twice or unknown, and annotated images without predictions.
    """
    if scenario not in SCENARIOS:
        raise ValueError(f"scenario={scenario!r} must be 1 or 2")
    at = {plain(name): i for i, name in enumerate(roles.names)}
    if missing := [verb for verb in table.verbs if plain(verb) not in at]:
        raise ValueError(f"{roles.source} has no role {missing[0]!r}; its roles are {', '.join(roles.names)}")
    wanted = torch.tensor([at[plain(verb)] for verb in table.verbs])  # role id of each verb id
    role_of = wanted[table.verb_of]
    place = {one.filename: i for i, one in enumerate(roles.images)}
    judged: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for one in predictions:
        if one.filename not in place:
            raise ValueError(f"predictions for {one.filename}, which {roles.source} does not annotate")
        index = place[one.filename]
        if index in judged:
            raise ValueError(f"{one.filename} is predicted twice")
        one.check(len(table))
        judged[index] = _judge(one, role_of[one.interactions], roles.images[index], scenario)
    absent = [one.filename for i, one in enumerate(roles.images) if len(one.people) and i not in judged]
    if absent:
        raise ValueError(
            f"no predictions for {len(absent)} of {len(place)} annotated images, the first is {absent[0]}"
        )
    nothing = (torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    parts = [nothing, *(judged[index] for index in sorted(judged))]  # ties: in the order of the annotations
    classes, scores, hits = (torch.cat(each) for each in zip(*parts, strict=True))
    truths = roles.counts()
    ap = average_precisions(classes, scores, hits, truths, "all")[wanted]
    known = [value for value in ap.tolist() if not math.isnan(value)]
    mean = math.fsum(known) / len(known) if known else None
    return RoleScores(table.verbs, ap, truths[wanted], scenario, mean)


def _judge(one: Predicted, role: Tensor, truth: Doers, scenario: int) -> tuple[Tensor, Tensor, Tensor]:
    """(role int64, score float32, true bool) of the detections of an image that are not left out."""
    hits = torch.zeros(len(one), dtype=torch.bool)
    if not len(one) or not len(truth.people):
        return role, one.scores.float(), hits
    near, person = iou(one.boxes_h.double(), truth.people.double()).max(1)  # the first of equals
    keep = ~truth.unknown[person]
    overlap = iou(one.boxes_o.double(), truth.boxes_o.double())
    absent = truth.boxes_o.isnan().any(1)
    if scenario == 2:
        overlap[:, absent] = 1.0
    else:
        empty = (one.boxes_o == 0).all(1)
        overlap[:, absent] = empty[:, None].double()
    mine = (person[:, None] == truth.doer) & (role[:, None] == truth.roles)
    overlap = torch.where(mine, overlap, -1.0)
    if overlap.shape[1]:
        best, entry = overlap.max(1)
        good = (keep & (near >= OVERLAP) & (best >= OVERLAP)).nonzero().flatten()
        taken: set[int] = set()
        for row in good[one.scores[good].argsort(descending=True, stable=True)].tolist():
            hits[row] = (found := int(entry[row])) not in taken
            taken.add(found)
    return role[keep], one.scores[keep].float(), hits[keep]
