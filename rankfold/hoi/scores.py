"""What an evaluation found: AP of every interaction, and its means over the groups that papers report.

    full = all    rare, non-rare    unseen = the split's list    seen = the rest
    harmonic mean of unseen u and seen s = 2us / (u + s)

A class without ground truth in these annotations has no AP (NaN) and is in no mean; the counts say how many
have one. HICO-DET's own test set has all 600.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rankfold.report_format import DASH, percent

if TYPE_CHECKING:
    from rankfold.hoi.classes import ClassTable
    from rankfold.hoi.splits import Split

GROUPS = ("full", "rare", "non_rare", "seen", "unseen")


@dataclass(frozen=True, eq=False)
class Scores:
    """Results of one evaluation. Means are fractions of 1, None where the group is empty or not defined.

    ap          (N,) float64 by interaction id, NaN where there is no ground truth
    truths      (N,) int64: ground-truth pairs        found  (N,) int64: those that were found
    detections  (N,) int64: predicted triplets
    classes     {group: interactions with ground truth in it}
    detector    whether the detector knew the objects of unseen interactions; "" where no object is unseen
    """

    ap: Tensor
    truths: Tensor
    found: Tensor
    detections: Tensor
    images: int
    points: str
    split: str
    full: float | None
    rare: float | None
    non_rare: float | None
    seen: float | None
    unseen: float | None
    harmonic: float | None
    classes: dict[str, int]
    detector: str = ""

    @property
    def missing(self) -> int:
        """Interactions without ground truth here."""
        return int((self.truths == 0).sum())

    def rows(self) -> list[tuple[str, float | None, int | None]]:
        """(heading, mean AP, number of interactions) of every group that is defined, in reporting order."""
        rows: list[tuple[str, float | None, int | None]] = [
            (name.replace("_", "-"), getattr(self, name), self.classes[name])
            for name in GROUPS
            if getattr(self, name) is not None
        ]
        return [*rows, ("harmonic mean", self.harmonic, None)] if self.harmonic is not None else rows

    def in_words(self) -> str:
        """One line, for a log or a terminal: `full 33.20 %, unseen 27.91 %, …`."""
        means = ", ".join(f"{name} {percent(value, 2)}" for name, value, _ in self.rows())
        return f"mAP ({self.points}-point): {means or DASH}"

    def to_json(self) -> dict[str, Any]:
        """Every field as plain JSON; a missing AP is null."""
        means = {name: getattr(self, name) for name in (*GROUPS, "harmonic")}
        return {
            "points": self.points,
            "split": self.split,
            "mAP": means,
            "classes": dict(self.classes),
            "images": self.images,
            "detector": self.detector,
            "ap": [None if math.isnan(value) else value for value in self.ap.tolist()],
            "truths": self.truths.tolist(),
            "found": self.found.tolist(),
            "detections": self.detections.tolist(),
        }


def summarise(
    ap: Tensor,
    truths: Tensor,
    found: Tensor,
    detections: Tensor,
    *,
    images: int,
    points: str,
    table: ClassTable,
    split: Split | None,
    detector_saw: Collection[int] | None,
) -> Scores:
    """Means of AP by group. `split=None`, and one that hides nothing, has neither seen nor unseen."""
    everything = range(len(ap))
    rare = frozenset(table.rare)
    unseen = frozenset(split.unseen if split else ())
    members: dict[str, Iterable[int]] = {
        "full": everything,
        "rare": rare,
        "non_rare": [i for i in everything if i not in rare] if rare else (),
        "seen": [i for i in everything if i not in unseen] if unseen else (),
        "unseen": unseen,
    }
    values = ap.tolist()
    known = {name: [values[i] for i in sorted(ids) if truths[i] > 0] for name, ids in members.items()}
    means = {name: math.fsum(of) / len(of) if of else None for name, of in known.items()}
    u, s = means["unseen"], means["seen"]
    return Scores(
        ap=ap,
        truths=truths,
        found=found,
        detections=detections,
        images=images,
        points=points,
        split=split.name if split else "none",
        **means,
        harmonic=None if u is None or s is None else harmonic_mean(u, s),
        classes={name: len(of) for name, of in known.items()},
        detector=fairness(split, table, detector_saw) if split else "",
    )


def harmonic_mean(a: float, b: float) -> float:
    """2ab / (a + b) of two numbers that are not negative; 0 where both are."""
    return 2 * a * b / (a + b) if a + b else 0.0


def fairness(split: Split, table: ClassTable, detector_saw: Collection[int] | None) -> str:
    """Whether the detector was trained on the objects that the split hides; "" where it hides none.

    detector_saw  object ids the detector knows, None where nobody said. One-stage methods never saw the
                  unseen objects, two-stage ones usually have a detector that did: they do not compare.
    """
    hidden = sorted(split.unseen_objects)
    if not hidden:
        return ""
    names = ", ".join(table.objects[i] for i in hidden)
    if detector_saw is None:
        return f"Not recorded: whether the detector was trained on the unseen objects ({names})."
    saw = [i for i in hidden if i in set(detector_saw)]
    if not saw:
        return f"The detector was not trained on the {len(hidden)} unseen objects ({names})."
    return (
        f"The detector was trained on {len(saw)} of the {len(hidden)} unseen objects "
        f"({', '.join(table.objects[i] for i in saw)}): not comparable with a method that never saw them."
    )
