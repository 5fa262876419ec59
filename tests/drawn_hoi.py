"""A drawn set of the toy's ten classes on disk, and the smallest training on it; seconds."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toy_hoi import table, texts

from rankfold.hoi.folder import TEXT
from rankfold.hoi.synthetic import Options, write
from rankfold.hoi.text_file import save_features
from rankfold.hoi.verb_geometry import verb_features

UNSEEN = [3, 5]  # both classes of the verb "hug"
SETTINGS = ("rank=6", "bottleneck=8", "ffn=8", "context_hidden=8")
FAST: dict[str, Any] = {"epochs": 2, "batch_size": 3, "drop": 1, "device": "cpu", "seed": 0}


def drawn(folder: Path, images: int = 7, test_images: int = 4, **options: Any) -> Path:
    """The set, its texts of width 16, settings.json that fit it, and unseen.json."""
    text = texts()
    code = verb_features(text.classes, text.actions, table())
    write(folder, table(), code, images, test_images, options=Options(size=(64, 48), **options))
    save_features(text, folder / TEXT)
    given = {name: value for name, value in FAST.items() if name != "device"}
    sizes = {name: int(value) for name, _, value in (item.partition("=") for item in SETTINGS)}
    body = {"set": sizes, **given}
    (folder / "settings.json").write_text(json.dumps(body))
    (folder / "unseen.json").write_text(json.dumps(UNSEEN))
    return folder


@contextmanager
def quiet() -> Any:
    yield lambda *_: None


def run(data: Path, out: Path, **more: Any) -> tuple[dict[str, Any], Path]:
    """`train` on a drawn set, with "hug" unseen."""
    from rankfold.hoi.build import Choice
    from rankfold.hoi.train import train

    choice = Choice(settings=(*SETTINGS, *more.pop("set", ())), **more.pop("choice", {}))
    given = {"setting": "no hug", "unseen": str(data / "unseen.json"), **FAST, "say": lambda _: None}
    return train(str(data), str(out), choice=choice, progress=quiet, **{**given, **more})
