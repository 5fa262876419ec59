"""A structured model as what others open without rankfold: an ordinary checkpoint, or a LoRA of PEFT.

    dense    every structure as the matrix it stands for, adapters merged: built in float64, cast once
    peft     the adapters alone, exact (`rankfold.lora`), for the base as it was

MODEL is a folder of a structured model, or of adapters alone (`save_adapter`), which needs its base.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankfold.adapted import adapted, is_adapted, parts
from rankfold.adapter_file import load_adapter_
from rankfold.adapter_manifest import MANIFEST, read_manifest
from rankfold.adapters import freeze_
from rankfold.checkpoint import check_folder
from rankfold.classify.build import with_head
from rankfold.convert import convert_
from rankfold.hosts import hosts
from rankfold.journey import write
from rankfold.judge import Bars
from rankfold.loading import DTYPES, Opened, open_model
from rankfold.lora import save_as_lora
from rankfold.manifest import recipe_of
from rankfold.provenance import versions, weights_hash
from rankfold.report import FILE_NAME, Report
from rankfold.token_layer import check_dense

FORMS = ("dense", "peft")
HEADS = {"text": "AutoModelForSequenceClassification", "image": "AutoModelForImageClassification"}
RECORDS = (FILE_NAME, "adapt.json")  # what a folder of ours says of where it is from


@dataclass(frozen=True)
class Lora:
    """A LoRA folder that was written: how many layers and numbers, its bytes, and the base in its config."""

    folder: Path
    layers: int
    params: int
    nbytes: int
    base: str | None


def export_dense(
    model: str,
    out: str,
    *,
    base: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    check: bool = True,
    overwrite: bool = False,
    progress: Bars,
) -> tuple[Report, Path]:
    """Write MODEL to OUT as an ordinary checkpoint, with the report of its size.

    base  what the adapters of MODEL belong to, where MODEL is a folder of nothing else

    Raises ValueError for a model that is dense already or has a TokenWara, and as `open_with_adapters` does.
    """
    folder = check_folder(out, overwrite)
    opened = open_with_adapters(model, base, dtype, device)
    net = opened.model
    found = hosts(net)
    check_dense(net)
    if not found:
        raise ValueError(f"{model} holds no structure of rankfold: it is an ordinary checkpoint already")
    merged = sum(is_adapted(host.weight) for host in found.values())
    before, recipe = weights_hash(net), recipe_of(net)
    with progress() as tell:
        report = convert_(net, "dense", targets=list(found))
        report.recipe = {"name": "export", "to": "dense", "from": dict(recipe or {}), "merged": merged}
        report.model, report.weights_hash, report.versions = opened.name, before, versions()
        write(net, folder, report, opened.reader, None, check=check, overwrite=overwrite, tell=tell)
    return report, folder


def export_lora(
    model: str,
    out: str,
    *,
    base: str | None = None,
    keep: Sequence[str] = (),
    dtype: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
) -> Lora:
    """Write the adapters of MODEL to OUT as a LoRA of PEFT.

    base  hub id or folder of the base, for the config, and to open it where MODEL holds adapters alone; None:
          what MODEL says it was made from
    keep  globs of the parameters that trained beside the adapters (a head), which the LoRA is to hold too;
          none: those that MODEL itself names, as what `rankfold adapt` wrote does

    Raises ValueError where there is no adapter, for one that is no LoRA (`save_as_lora`), and as
    `open_with_adapters` does.
    """
    folder = check_folder(out, overwrite)
    opened = open_with_adapters(model, base, dtype, device)
    net = opened.model
    found, record = adapted(net), _record(Path(model))
    alone = (Path(model) / MANIFEST).is_file()
    if alone and keep:
        raise ValueError(f"{model} says itself what trained beside its adapters; leave out {list(keep)}")
    if not alone:  # a whole model loads with everything trainable
        freeze_(net, keep or _trained(record))
    name = base or record.get("model")
    save_as_lora(net, folder, base=name, overwrite=overwrite)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    terms = {id(term): term for host in found.values() for term in parts(host)[1]}
    return Lora(
        folder,
        len(found),
        sum(term.params for term in terms.values()),
        sum(path.stat().st_size for path in folder.iterdir()),
        config["base_model_name_or_path"],
    )


def open_with_adapters(model: str, base: str | None, dtype: str | None, device: str | None) -> Opened:
    """Open MODEL; a folder of adapters alone goes on its base. Raises ValueError where that base is not
    named, is another one, or cannot be opened."""
    if not (Path(model) / MANIFEST).is_file():
        return open_model(model, dtype=dtype, device=device)
    named = read_manifest(Path(model))["base"]["name"]
    name = base or _record(Path(model)).get("model") or named
    if not name:
        raise ValueError(f"{model} holds adapters alone and names no base; give --base, a hub id or a folder")
    opened = open_model(name, dtype=dtype, device=device)
    _head_(opened, name, _record(Path(model)), dtype)
    load_adapter_(opened.model, model)
    opened.name = model
    return opened


def _head_(opened: Opened, name: str, record: Mapping[str, Any], dtype: str | None) -> None:
    """Give the base the head that a classifier's adapters were trained with, whose numbers are in their
    file, and the dtype, which is float32."""
    classes, of = record.get("classes"), record.get("of")
    if not isinstance(classes, list) or of not in HEADS:
        return
    import transformers

    net = with_head(getattr(transformers, HEADS[of]), name, [str(item) for item in classes], new_head=True)
    place = next(opened.model.parameters()).device
    opened.model = net.to(device=place, dtype=DTYPES[dtype] if dtype else None).eval()


def _record(folder: Path) -> Mapping[str, Any]:
    """What a folder of ours says of where its model is from; empty where it says nothing, or is no folder."""
    for name in RECORDS:
        if (folder / name).is_file():
            try:
                body: Any = json.loads((folder / name).read_text(encoding="utf-8"))
            except (ValueError, RecursionError):
                continue
            if isinstance(body, Mapping) and isinstance(body.get("model"), str) and body["model"]:
                return body
    return {}


def _trained(record: Mapping[str, Any]) -> list[str]:
    """Globs of what trained beside the adapters: the head of a classifier, and what was asked for."""
    head, asked = (record.get(key) for key in ("trained", "recipe"))
    names = head.get("head") if isinstance(head, Mapping) else None
    globs = asked.get("keep") if isinstance(asked, Mapping) else None
    return [*(glob.escape(name) for name in names or ()), *(globs or ())]
