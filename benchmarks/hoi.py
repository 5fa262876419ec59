"""What decomposing the text features is worth to unseen classes: HOLa beside what it is built from.

    python benchmarks/hoi.py --keep FOLDER           # trains what is missing; a run that was stopped goes on
    python benchmarks/hoi.py --keep FOLDER --table   # prints what is there, trains nothing

Scenes are drawn (`rankfold hoi synthetic`), with the 600 classes of HICO-DET and text features of MiniLM:
the geometry of a pair is a linear code of its verb's text, so that what is seen says something of what is
not. The interactions of `--setting` are hidden while training. For each seed the scenes, the weights that
the model starts from and the order of the images are drawn anew, the same for every variant. 11-point mAP
of the test scenes, after the last epoch; nothing was chosen by it.

frozen and free have the texts as they are, and as a table that trains. `sem` is the only regulariser that
they can have. The detections are the annotated boxes with a little noise: no detector, no photo, no CLIP.
"""

from __future__ import annotations

import json
import statistics
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import setting
from poolers import difference, spread

from rankfold.hoi.build import Choice
from rankfold.hoi.classes import ClassTable, from_consnet
from rankfold.hoi.facts import read_facts
from rankfold.hoi.folder import TEXT
from rankfold.hoi.penalties import WEIGHTS
from rankfold.hoi.synthetic import write
from rankfold.hoi.text_encoder import TextEncoder
from rankfold.hoi.text_file import features_of, save_features
from rankfold.hoi.train import train
from rankfold.hoi.verb_geometry import verb_features

NONE = dict.fromkeys(WEIGHTS, 0.0)
SEM = {**NONE, "sem": WEIGHTS["sem"]}
Variant = tuple[tuple[str, ...], dict[str, float]]
BASE = "frozen"
MAIN: dict[str, Variant] = {
    "frozen": (("form=frozen",), NONE),
    "frozen, sem": (("form=frozen",), SEM),
    "free": (("form=free",), NONE),
    "free, sem": (("form=free",), SEM),
    "decomposed": ((), NONE),
    "decomposed, all regularisers": ((), {}),
}
PARTS: dict[str, Variant] = {
    "sem alone": ((), SEM),
    "without sem": ((), {"sem": 0.0}),
    "without actreg": ((), {"actreg": 0.0}),
    "without sparse, unique, orth": (
        (),
        {name: 0.0 for name in WEIGHTS if name.split("_")[-1] in ("sparse", "unique", "orth")},
    ),
    "without recon": ((), {"recon": 0.0, "act_recon": 0.0}),
    "rank 8": (("rank=8",), {}),
    "rank 24": (("rank=24",), {}),
    "rank 200": (("rank=200",), {}),
    "without pair tokens": (("tokens=false",), {}),
    "classes attend": (("attend_classes=true",), {}),
    "init upstream": (("init=upstream",), {}),
}
VARIANTS = MAIN | PARTS
SCORES = ("unseen", "seen", "harmonic", "full")


@contextmanager
def progress() -> Any:
    yield setting.said


def drawn(keep: Path, table: ClassTable, seed: int, chosen: Any) -> Path:
    """The data folder of a seed, made if it is not there."""
    folder = keep / f"data-{seed}"
    if not (folder / TEXT).is_file():
        text = features_of(table, TextEncoder.open("minilm"), cache=keep / TEXT)
        features = verb_features(text.classes, text.actions, table)
        write(folder, table, features, chosen.images, chosen.test_images, seed=seed, overwrite=True)
        save_features(text, folder / TEXT)
    return folder


def facts(keep: Path, name: str, seed: int, chosen: Any) -> dict[str, Any] | None:
    """What the run of a variant found, run now unless it is there or not to be. Raises ValueError for a run
    of other options."""
    out = keep / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    settings, weights = VARIANTS[name]
    wanted = {"epochs": chosen.epochs, "batch_size": chosen.batch, "lr": chosen.lr, "seed": seed}
    if (out / "hoi.json").is_file():
        found = read_facts(out)
        had = {key: found["settings"][key] for key in wanted}
        sizes = [found["data"][part]["images"] for part in ("train", "test")]
        if had != wanted or sizes != [chosen.images, chosen.test_images]:
            raise ValueError(f"{out} was run with {had} on {sizes} images, not {wanted}: name another --keep")
        return found
    if chosen.table:
        return None
    data = drawn(keep, from_consnet(), seed, chosen)
    found, _ = train(
        str(data),
        str(out),
        progress=progress,
        say=lambda words: print(f"{name}, seed {seed}: {words}", flush=True),
        setting=chosen.setting,
        choice=Choice(settings=settings),
        weights=weights,
        drop=chosen.epochs - 1,
        **wanted,
    )
    return found


def table(found: dict[str, dict[int, dict[str, Any]]]) -> str:
    """A line for each variant: means over its seeds, and the paired difference of unseen mAP to BASE."""
    scores = {
        name: {
            score: {seed: 100 * row["metrics"]["test"]["mAP"][score] for seed, row in rows.items()}
            for score in SCORES
        }
        for name, rows in found.items()
    }
    lines = []
    for name, rows in found.items():
        base = scores.get(BASE)
        lines.append(
            [
                name,
                len(rows),
                *(spread(list(scores[name][score].values())) for score in SCORES),
                "" if name == BASE or base is None else difference(scores[name]["unseen"], base["unseen"]),
                f"{next(iter(rows.values()))['model']['trained']:,}",
                f"{statistics.mean(row['training']['seconds'] for row in rows.values()):.0f}",
            ]
        )
    heads = ["text features", "seeds", *(f"{score} mAP" for score in SCORES), f"unseen minus {BASE}"]
    return setting.table([*heads, "trained parameters", "seconds"], lines)


def main() -> None:
    chosen = setting.arguments(
        __doc__,
        keep={"type": Path, "required": True, "help": "folder for scenes and models"},
        variants={"nargs": "+", "choices": list(VARIANTS), "default": list(MAIN)},
        seeds={"type": int, "nargs": "+", "default": [0, 1, 2, 3, 4]},
        setting={"default": "UV", "help": "what is hidden: UV (default) or UO"},
        images={"type": int, "default": 1000},
        test_images={"type": int, "default": 500},
        epochs={"type": int, "default": 3, "help": "the rate falls to a tenth in the last (default 3)"},
        batch={"type": int, "default": 8},
        lr={"type": float, "default": 1e-3},
        table={"action": "store_true", "help": "train nothing: print what --keep has"},
    )
    chosen.keep.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for seed in chosen.seeds:
        for name in chosen.variants:
            row = facts(chosen.keep, name, seed, chosen)
            if row is not None:
                found.setdefault(name, {})[seed] = row
    ordered = {name: found[name] for name in chosen.variants if name in found}
    results = {
        name: {seed: row["metrics"]["test"]["mAP"] for seed, row in rows.items()}
        for name, rows in ordered.items()
    }
    title = f"HOLa on drawn scenes, {chosen.setting} hidden"
    setting.finish(title, {"results": json.loads(json.dumps(results))}, table(ordered), chosen)


if __name__ == "__main__":
    main()
