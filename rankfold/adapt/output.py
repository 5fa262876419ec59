"""What is left of an adaptation: the model with its adapters, merged, or the adapters alone.

    model    an ordinary folder: base, adapters, head        merged   the same without adapters
    adapter  what trained, and the hash of its base          lora     a LoRA folder of PEFT

What cannot be written in the form asked for is refused before anything trains.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from rankfold.adapted import adapted, parts
from rankfold.adapter_file import save_adapter
from rankfold.adapters import merge_
from rankfold.atomic import writing_file
from rankfold.checkpoint import PAGE, save, verify
from rankfold.lora import save_as_lora
from rankfold.report import encode
from rankfold.structures import Dense

FACTS = "adapt.json"
FORMS = {"merge": "merged", "adapter_only": "adapter", "as_lora": "lora"}


def form_of(recipe: str, adapts: bool, **flags: bool) -> str:
    """The form that the flags of the command line ask for: --merge, --adapter-only, --as-lora, or none.
    Raises ValueError for two of them, and for any without an adapter (`adapts`)."""
    given = [name for name in FORMS if flags[name]]
    shown = [f"--{name.replace('_', '-')}" for name in given]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(shown)}: one form to write; leave out all but one")
    if given and not adapts:
        raise ValueError(
            f"recipe {recipe!r} makes no adapter, so OUT is an ordinary model as it is; leave out {shown[0]}"
        )
    return FORMS[given[0]] if given else "model"


def check_form(model: nn.Module, form: str) -> None:
    """Raise ValueError where the adapters on `model` could not be written in this form; nothing is
    changed."""
    if form == "lora":
        with tempfile.TemporaryDirectory() as folder:
            save_as_lora(model, Path(folder) / "lora")
    if form == "merged" and not all(isinstance(parts(host)[0], Dense) for host in adapted(model).values()):
        try:
            merge_(model).undo()
        except ValueError as error:
            raise ValueError(
                f"--merge: {error.args[0].partition('; merge_')[0]}; leave out --merge, and the adapters "
                "stay beside it"
            ) from error


def write_form(
    model: Any, folder: Path, form: str, *, tokenizer: Any, check: bool, overwrite: bool
) -> dict[str, Any]:
    """Write `model` in this form and return facts about it."""
    if form == "adapter":
        save_adapter(model, folder, overwrite=overwrite)
        return {"form": form}
    if form == "lora":
        save_as_lora(model, folder, overwrite=overwrite)
        return {"form": form}
    errors = merge_(model).errors if form == "merged" else {}
    save(model, folder, tokenizer=tokenizer, overwrite=overwrite)
    if check:
        verify(model, folder)
    return {"form": form} | ({"merge_error": max(errors.values())} if errors else {})


def write_facts(folder: Path, facts: dict[str, Any], page: str) -> None:
    """adapt.json, and the page of the same facts."""
    text = json.dumps(encode(facts, FACTS), indent=1, allow_nan=False)
    for name, body in ((FACTS, text), (PAGE, page)):
        with writing_file(folder / name) as beside:
            beside.write_text(body, encoding="utf-8")
