"""What annotated pairs were taken for: of the right boxes, which interaction came first.

For an annotated pair all triplets count whose boxes overlap its boxes by more than 0.5. If the surest of them
has an interaction that is annotated for these boxes, the pair was taken for what it is; else for that one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rankfold.hoi.annotations import Annotations
from rankfold.hoi.boxes import pair_iou
from rankfold.hoi.evaluation import OVERLAP, Predicted

NOTHING = -1  # no triplet has the boxes of the pair


def confusions(predictions: Iterable[Predicted], annotations: Annotations) -> Counter[tuple[int, int]]:
    """{(annotated interaction id, the id it was taken for, or NOTHING): annotated pairs}.

    The sum is the number of annotated pairs in the images that are predicted; predictions for images that are
    not annotated do not count. Raises ValueError as `Predicted.check`."""
    scenes = {scene.filename: scene for scene in annotations.scenes}
    found: Counter[tuple[int, int]] = Counter()
    for one in predictions:
        scene = scenes.get(one.filename)
        if scene is None or not len(scene):
            continue
        ids = scene.interactions.tolist()
        if not len(one):
            found.update((i, NOTHING) for i in ids)
            continue
        one.check(len(annotations.table))
        mine = (one.boxes_h.double(), one.boxes_o.double())
        theirs = (scene.boxes_h.double(), scene.boxes_o.double())
        near = pair_iou(*theirs, *mine) > OVERLAP  # (g, m)
        alike = pair_iou(*theirs, *theirs) > OVERLAP  # (g, g)
        surest = one.scores.double().expand_as(near).masked_fill(~near, -float("inf")).argmax(1)
        taken = one.interactions[surest].tolist()
        for row, i in enumerate(ids):
            right = {ids[j] for j in alike[row].nonzero().flatten().tolist()}
            if not near[row].any():
                found[i, NOTHING] += 1
            else:
                found[i, i if taken[row] in right else taken[row]] += 1
    return found
