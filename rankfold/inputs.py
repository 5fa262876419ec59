"""What the command line is given, opened: recipes by name or file, and batches of text by SPEC."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rankfold import data as texts
from rankfold import recipes
from rankfold.batches import Batch
from rankfold.data_labelled import is_labelled, labelled_batches
from rankfold.loading import Opened
from rankfold.recipe import Recipe
from rankfold.report import FILE_NAME

CALIB, TEST = "wikipedia:train:64x512", "wikipedia:test:12x512"


def open_recipe(name: str) -> Recipe:
    """A recipe by name, from a recipe's JSON file, or from the report in a compressed folder (to repeat its
    run)."""
    path = Path(name)
    if path.is_dir():
        path = path / FILE_NAME
    if path.suffix == ".json":
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"no recipe at {path}: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        return Recipe.from_json(body.get("recipe", body) if isinstance(body, dict) else body)
    return recipes.get(name)


def read_batches(
    opened: Opened, spec: str, batch_size: int, seed: int, labelled: bool, spread: str = "random"
) -> tuple[list[Batch], dict[str, Any]]:
    """Batches for a model from a SPEC, and the facts of the data. A causal model, and any model calibrated on
    plain text, gets windows of tokens; a classifier that is to be scored or needs labels gets labelled,
    padded examples."""
    if opened.tokenizer is None:
        raise ValueError(
            f"{opened.name} has no tokenizer beside it, so text cannot be read for it; use the Python API"
        )
    parsed = texts.Spec.parse(spec)
    calibrating = spread == "random"
    split = "train" if calibrating else "test"
    if not opened.causal and is_labelled(parsed):
        draw = seed if calibrating else None
        return labelled_batches(parsed, opened.tokenizer, split=split, batch_size=batch_size, seed=draw)
    if labelled:
        raise ValueError(
            f"this recipe needs labels, and {spec!r} has none; calibrate on labelled data, e.g. --calib "
            f"movie:train"
        )
    longest = getattr(opened.model.config, "max_position_embeddings", None) or 512
    length = parsed.length or 512
    if length > longest:
        raise ValueError(
            f"{spec!r} asks for {length} tokens a sequence, the model reads at most {longest}; write "
            f"…:Nx{longest}"
        )
    windows = texts.token_windows(
        parsed, opened.tokenizer, sequences=64, length=length, split=split, seed=seed, spread=spread
    )
    ids = windows.input_ids
    return [{"input_ids": part} for part in ids.split(batch_size)], windows.facts()
