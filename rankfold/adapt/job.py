"""What all adaptations share: the request, the quality before, the memory, and how a run ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankfold.adapt.choice import Choice
from rankfold.adapt.output import write_facts, write_form
from rankfold.adapt.page import page
from rankfold.atomic import writing_file
from rankfold.footprint import bytes_on_disk
from rankfold.judge import Bars
from rankfold.metrics import Progress
from rankfold.pretrain.memory import peak
from rankfold.pretrain.run import Run
from rankfold.provenance import versions

BEFORE = "before.json"


@dataclass(frozen=True, kw_only=True)
class Job:
    """MODEL, OUT, and how the one becomes the other."""

    model: str
    folder: Path
    choice: Choice
    form: str
    dtype: str
    device: str
    seed: int
    progress: Bars
    say: Callable[[str], None]
    restart: bool = False
    resume: bool = False
    keep_run: bool = False
    check: bool = True
    overwrite: bool = False


def before(run: Run, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` finds on the untrained model, once a run."""
    file = run.folder / BEFORE
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    found = measure()
    with writing_file(file) as beside:
        beside.write_text(json.dumps(found), encoding="utf-8")
    return found


def memory_of(watch: Any) -> dict[str, Any]:
    """Bytes that a step holds beside activations, and the peak of the process or device."""
    return {"training": dict(watch.memory), "peak": peak()}


def finish(job: Job, run: Run, model: Any, tokenizer: Any, facts: dict[str, Any], tell: Progress) -> None:
    """Write OUT with its facts (completed in place) and remove the run."""
    tell("write", 0, 1)
    written = write_form(
        model.eval(),
        job.folder,
        job.form,
        tokenizer=tokenizer,
        check=job.check,
        overwrite=job.overwrite,
    )
    facts |= {
        "model": job.model,
        "recipe": job.choice.to_json(),
        "written": {**written, "bytes": bytes_on_disk(job.folder)["payload"]},
        "versions": versions(),
    }
    write_facts(job.folder, facts, page(facts))
    tell("write", 1, 1)
    if not job.keep_run:
        run.remove()
