"""Where the time of a whole compression goes: load, read, calibrate, decompose, write, verify.

Runs the command line's own job, `rankfold compress smollm2 OUT --recipe svd_llm --budget 0.8`, without the
evaluation, into a temporary folder. Calibration (forward passes and their Grams) should be the bill, and
linear algebra small beside it.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import setting

from rankfold.journey import compress
from rankfold.metrics import Progress

STEPS = ("load", "read", "calibrate", "decompose", "write", "verify")


@contextlib.contextmanager
def quietly() -> Iterator[Progress]:
    yield setting.said


def main() -> None:
    chosen = setting.arguments(
        __doc__,
        recipe={"default": "svd_llm", "help": "recipe (default svd_llm)"},
        budget={"type": float, "default": 0.8, "help": "bytes kept of the selected layers (default 0.8)"},
    )
    calib = f"wikipedia:train:{chosen.sequences}x{setting.LENGTH}"
    with tempfile.TemporaryDirectory() as folder:
        report, _ = compress(
            setting.MODEL,
            str(Path(folder) / "out"),
            recipe=chosen.recipe,
            budget=chosen.budget,
            unit="nbytes",
            calib=calib,
            targets=None,
            skip=(),
            metrics_file=None,
            batch_size=4,
            seed=0,
            dtype=None,
            device="cpu",
            data=None,
            evaluate=False,
            check=True,
            overwrite=False,
            progress=quietly,
        )
    seconds = {step: report.timings[step] for step in STEPS if step in report.timings}
    total, calibrate = sum(seconds.values()), seconds["calibrate"]
    rows = [
        [step, f"{took / total:.1%}", f"{took / calibrate:.1%}", f"{took:.0f}"]
        for step, took in seconds.items()
    ]
    text = setting.table(["step", "of the whole", "of calibration", "seconds here"], rows)
    facts = {"recipe": chosen.recipe, "budget": chosen.budget, "calibration": calib, "seconds": seconds}
    setting.finish(f"Whole model, {chosen.recipe} at {chosen.budget}, {calib}", facts, text, chosen)


if __name__ == "__main__":
    main()
