"""The folder of a run in progress: what it trains, its tokens, its checkpoints.

    OUT.run/ run.json     what the run is: recipe, text, configuration, seeds, steps; and when it was started
             tokenizer/   data/     written once, whole
             checkpoint-N/          of the Trainer; one without the file `complete` was cut short

A second call with the same identity goes on from the last complete checkpoint. With any other it is refused,
and says what differs: half a run on one text and half on another is neither.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankfold.atomic import sync, writing_file

RUN, COMPLETE = "run.json", "complete"


class Run:
    """The folder of one run. `folder`: its path; `identity`: what it trains, as JSON."""

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self.folder = out.with_name(f"{out.name}.run")
        self.identity = json.loads(json.dumps(identity))
        self.sessions: list[int] = []

    def open(self, *, restart: bool = False, resume: bool = False) -> None:
        """Make the folder, or find it. Raises ValueError where it holds another run that has got somewhere
        (with the differences), and with `resume` where there is none."""
        file = self.folder / RUN
        if restart and file.is_file():
            self.remove()
        if not file.is_file():
            if resume:
                raise ValueError(f"--resume: there is no run in {self.folder}")
            if self.folder.exists() and any(self.folder.iterdir()):
                raise ValueError(
                    f"{self.folder} exists and is no run of ours; move it away, or choose another OUT"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write()
            return
        try:
            body = json.loads(file.read_text(encoding="utf-8"))
            was, self.sessions = body["identity"], list(body["sessions"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error}); --restart begins anew") from error
        found = differences(was, self.identity)
        if found and self.checkpoint() is None:  # nothing is lost that was trained
            self.remove()
            self.sessions = []
            return self.open()
        if found:
            said = "; ".join(f"{key}: {_short(old)} -> {_short(new)}" for key, (old, new) in found.items())
            raise ValueError(
                f"{self.folder} holds a run that differs from this one ({said}). Repeat its command to go on "
                "with it, choose another OUT, or throw it away with --restart"
            )

    def note(self, step: int) -> None:
        """Write down that a session begins after `step` steps."""
        self.sessions.append(step)
        self._write()

    def _write(self) -> None:
        with writing_file(self.folder / RUN) as beside:
            body = {"identity": self.identity, "sessions": self.sessions}
            beside.write_text(json.dumps(body, indent=1), encoding="utf-8")

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    def checkpoint(self) -> Path | None:
        """The last complete checkpoint; those that were cut short are deleted."""
        good: list[tuple[int, Path]] = []
        for path in self.folder.glob("checkpoint-*"):
            if (path / COMPLETE).is_file():
                good.append((step_of(path), path))
            else:
                shutil.rmtree(path, ignore_errors=True)
        return max(good)[1] if good else None

    def remove(self) -> None:
        """Delete the folder: the run is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def seal(checkpoint: Path) -> None:
    """Say that a checkpoint is complete, when all of it is on disk."""
    for path in checkpoint.rglob("*"):
        if path.is_file():
            sync(path)
    with writing_file(checkpoint / COMPLETE) as beside:
        beside.write_text("")
    sync(checkpoint)


def differences(old: Any, new: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    """{dotted key: (old, new)} of what differs between two JSON objects."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in dict.fromkeys([*old, *new]):
            found |= differences(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
        return found
    return {} if old == new else {where: (old, new)}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
