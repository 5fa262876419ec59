"""How fast is the evaluator of interactions, and does a test set of HICO-DET's size fit?

    python benchmarks/hoi_evaluator.py --out hoi_evaluator.json
    python benchmarks/hoi_evaluator.py --images 9658 --rounds 0      # the size of HICO-DET's own test set

Made up: 600 classes of 80 objects, 7.5 verbs an object; images with 3 to 15 humans and as many objects, every
pair of which is predicted with every verb of its object (about 1,200 triplets an image), and 3.5 pairs of
ground truth an image, with boxes near some of the detected ones.

First the ratio to the slow twin of the tests, plain Python by the rule as one reads it, on `--small` images,
in turns, with the process's own clock: its median, and the lowest and highest of the rounds. The APs must
agree. Then time and memory on `--images` images, whose predictions come one by one, as from a file.
"""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import setting
import torch
from torch import Tensor

from rankfold.hoi.annotations import Annotations, Scene
from rankfold.hoi.classes import ClassTable
from rankfold.hoi.evaluation import Predicted, evaluate

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from hoi_slow_evaluator import twin

OBJECTS, VERBS, CLASSES, SIZE = 80, 117, 600, (640, 480)


def table() -> ClassTable:
    """600 pairs: 7 or 8 verbs an object."""
    draw = torch.Generator().manual_seed(0)
    pairs = []
    for thing in range(OBJECTS):
        some = torch.randperm(VERBS, generator=draw)[: 7 + thing % 2].sort().values
        pairs += [(verb, thing) for verb in some.tolist()]
    names = ("person", *(f"object {i}" for i in range(1, OBJECTS)))
    return ClassTable(tuple(f"verb {i}" for i in range(VERBS)), names, tuple(pairs))


def boxes(n: int, draw: torch.Generator) -> Tensor:
    sides = torch.tensor(SIZE)
    low = torch.rand(n, 2, generator=draw) * sides * 0.7
    return torch.cat([low, low + 20 + torch.rand(n, 2, generator=draw) * (sides * 0.3 - 20)], 1)


def image(index: int, classes: ClassTable) -> tuple[Scene, Predicted]:
    draw = torch.Generator().manual_seed(index)
    humans, things = (int(x) for x in torch.randint(3, 16, (2,), generator=draw))
    kinds = torch.randint(OBJECTS, (3,), generator=draw)
    labels = torch.cat(
        [torch.zeros(humans, dtype=torch.int64), kinds[torch.randint(3, (things,), generator=draw)]]
    )
    detected = boxes(len(labels), draw)
    pairs = torch.cartesian_prod(torch.arange(humans), torch.arange(len(labels)))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    possible = classes.valid[labels[pairs[:, 1]]].nonzero()  # (pair, verb)
    which = pairs[possible[:, 0]]
    ids = classes.interaction_at[labels[which[:, 1]], possible[:, 1]]
    scores = torch.rand(len(ids), generator=draw)
    true = torch.randint(len(ids), (int(torch.randint(1, 7, (1,), generator=draw)),), generator=draw)
    scores[true] += 0.5
    near = [detected[which[true, side]] + torch.randn(len(true), 4, generator=draw) * 6 for side in (0, 1)]
    name = f"{index:06d}.png"
    truth = Scene(name, SIZE, near[0], near[1], ids[true])
    return truth, Predicted(name, detected[which[:, 0]], detected[which[:, 1]], ids, scores)


def resident() -> float:
    """The largest resident memory of this process until now, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare(classes: ClassTable, images: int, rounds: int) -> dict[str, Any]:
    made = [image(i, classes) for i in range(images)]
    truth, rows = Annotations(classes, [a for a, _ in made], "made up"), [b for _, b in made]
    taken: dict[str, list[float]] = {"evaluate": [], "twin": []}
    for _ in range(rounds):
        found: list[list[float]] = []
        for name, way in (
            ("evaluate", lambda: evaluate(rows, truth).ap.tolist()),
            ("twin", lambda: twin(rows, truth)),
        ):
            start = time.process_time()
            found.append(way())
            taken[name].append(time.process_time() - start)
        worst = max(
            0.0 if math.isnan(a) and math.isnan(b) else abs(a - b) for a, b in zip(*found, strict=True)
        )
        if not worst < 1e-12:
            raise SystemExit(f"evaluator and twin differ by {worst}")
    ratios = [slow / fast for slow, fast in zip(taken["twin"], taken["evaluate"], strict=True)]
    return {
        "images": images,
        "triplets": sum(map(len, rows)),
        "evaluate seconds": statistics.median(taken["evaluate"]),
        "twin seconds": statistics.median(taken["twin"]),
        "ratio": statistics.median(ratios),
        "ratios": [min(ratios), max(ratios)],
    }


def at_scale(classes: ClassTable, images: int) -> dict[str, Any]:
    truth = Annotations(classes, [image(i, classes)[0] for i in range(images)], "made up")
    counted = making = 0.0

    def stream() -> Iterator[Predicted]:
        nonlocal counted, making
        for i in range(images):
            start = time.process_time()
            one = image(i, classes)[1]
            making += time.process_time() - start
            counted += len(one)
            yield one

    before, start = resident(), time.process_time()
    found = evaluate(stream(), truth)
    return {
        "images": images,
        "triplets": int(counted),
        "pairs of ground truth": int(found.truths.sum()),
        "evaluate seconds": time.process_time() - start - making,
        "memory MB": (resident() - before) / 1e6,
        "mAP": found.full,
    }


def main() -> None:
    chosen = setting.arguments(
        __doc__,
        images={"type": int, "default": 966, "help": "images of the second part (default 966)"},
        small={"type": int, "default": 100, "help": "images of the first part (default 100)"},
        rounds={"type": int, "default": 5, "help": "rounds of the first part; 0 leaves it out (default 5)"},
    )
    classes = table()
    facts: dict[str, Any] = {}
    parts = []
    if chosen.rounds:
        facts["twin"] = compare(classes, chosen.small, chosen.rounds)
        low, high = facts["twin"].pop("ratios")
        parts.append(rows(facts["twin"]) + f"\n\nRatio of single rounds: {low:.1f} to {high:.1f}.")
        facts["twin"]["ratios"] = [low, high]
    facts["scale"] = at_scale(classes, chosen.images)
    parts.append(rows(facts["scale"]))
    setting.finish("Evaluator of interactions", facts, "\n\n".join(parts), chosen)


def rows(facts: dict[str, Any]) -> str:
    return setting.table(list(facts), [list(facts.values())])


if __name__ == "__main__":
    main()
