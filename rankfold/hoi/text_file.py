"""Two files: texts that a language model wrote about classes, and text features that were computed once.

Texts are JSON, by the names of a class table; every part, and every name in it, may be left out:

    {"format": 1, "source": "who wrote this",
     "classes": {"ride bicycle": "The person sits on the saddle …"},
     "actions": {"ride": ["legs astride", "hands on handlebars"]},
     "guides": {"bicycle": ["both hands at the height of the hips", "two wheels of one size"]}}

Features are one safetensors file with the hash of the texts and of the encoder's weights.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rankfold.atomic import writing_file
from rankfold.hoi.classes import ClassTable, content, plain
from rankfold.hoi.text import Descriptions, Encoder, TextFeatures, encode, prompts

FORMAT = 1
PARTS = ("classes", "actions", "guides")


def read_descriptions(source: str | os.PathLike[str] | Mapping[str, Any], table: ClassTable) -> Descriptions:
    """The texts of a file (a path, or its content) for a table.

    Names are those of the table, with spaces or underscores: "ride bicycle", "stand on", "wine glass". A text
    is a string or a list of strings, which are joined, but for guides, which are apart.

    Raises ValueError naming file, part and name: for another format, an unknown part or name (with the
    nearest one), a name twice, and a text that is empty or no text.
    """
    where, body = content(source, "descriptions of classes")
    if body.get("format") != FORMAT:
        raise ValueError(f"{where}: 'format' is {body.get('format')!r}; descriptions have format {FORMAT}")
    if unknown := sorted(set(body) - {"format", "source", *PARTS}):
        raise ValueError(f"{where}: unknown part {unknown[0]!r}; there are {', '.join(PARTS)}")
    names = {
        "classes": [table.words(i) for i in range(len(table))],
        "actions": [plain(verb) for verb in table.verbs],
        "guides": [plain(thing) for thing in table.objects],
    }
    classes, actions, guides = (_part(where, part, body.get(part, {}), names[part]) for part in PARTS)
    return Descriptions(
        {i: " ".join(texts) for i, texts in classes.items()},
        {i: "; ".join(texts) for i, texts in actions.items()},
        guides,
        str(body.get("source", "")),
    )


def _part(where: str, part: str, held: Any, names: list[str]) -> dict[int, tuple[str, ...]]:
    if not isinstance(held, Mapping):
        raise ValueError(f"{where}: {part!r} must be an object of texts by name")
    ids, found = {name: i for i, name in enumerate(names)}, {}
    for name, texts in held.items():
        if plain(name) not in ids:
            close = difflib.get_close_matches(plain(name), names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{where}: {part!r} has {name!r}, which the class table has not{hint}")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not texts or not all(_is_text(text) for text in texts):
            raise ValueError(f"{where}: {part}[{name!r}] must be a text, or a list of texts, none empty")
        if ids[plain(name)] in found:
            raise ValueError(f"{where}: {part!r} has {plain(name)!r} twice, with spaces and with underscores")
        found[ids[plain(name)]] = tuple(text.strip() for text in texts)
    return found


def _is_text(text: Any) -> bool:
    return isinstance(text, str) and bool(text.strip())


def save_features(features: TextFeatures, path: str | os.PathLike[str]) -> Path:
    """Write text features to `path`, whole or not at all."""
    path = Path(path)
    tensors = {
        "classes": features.classes,
        "actions": features.actions,
        "objects": features.objects,
        "guides": torch.cat([*features.guides, features.classes[:0]]),
    }
    body = {
        "format": FORMAT,
        "source": features.source,
        "hash": features.hash,
        "table": features.table,
        "guides": [len(guide) for guide in features.guides],
    }
    with writing_file(path) as beside:
        tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, beside, metadata={"rankfold": json.dumps(body)})
    return path


def load_features(
    path: str | os.PathLike[str],
    table: ClassTable | None = None,
    *,
    width: int | None = None,
    key: str | None = None,
) -> TextFeatures:
    """What `save_features` wrote.

    table  the classes it must be for
    width  the features that each text must have
    key    the `Prompts.key` it must have: the same texts by the same encoder

    Raises ValueError for a file that is missing, damaged or of another kind, and one that was made from
    something else: it is named, with both numbers.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is no file; text features were expected there")
    try:
        with safe_open(path, framework="pt") as handle:
            body = json.loads((handle.metadata() or {}).get("rankfold", "null"))
            if not isinstance(body, dict) or body.get("format") != FORMAT:
                raise ValueError(f"it does not hold text features of format {FORMAT}; encode them again")
            tensors = {name: handle.get_tensor(name) for name in ("classes", "actions", "objects", "guides")}
        found = _features(body, tensors)
        if table is not None:
            found.check(table)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or holds no text features ({error}); encode them again"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if width is not None and found.width != width:
        raise ValueError(
            f"{path} holds features of width {found.width}, expected {width}: they are of another encoder"
        )
    if key is not None and found.hash != key:
        raise ValueError(
            f"{path} was made from other texts or by another encoder ({found.source}): delete it, or name "
            "another file"
        )
    return found


def _features(body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TextFeatures:
    counts, guides = body.get("guides"), tensors["guides"]
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"its numbers of key points are {counts!r}")
    if sum(counts) != len(guides):
        raise ValueError(f"it lists {sum(counts)} key points and holds {len(guides)}")
    return TextFeatures(
        tensors["classes"],
        tensors["actions"],
        tensors["objects"],
        guides.split(counts),
        *(str(body.get(name, "")) for name in ("source", "hash", "table")),
    )


def features_of(
    table: ClassTable,
    encoder: Encoder,
    descriptions: Descriptions | None = None,
    *,
    cache: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> TextFeatures:
    """`encode`, once: from the file `cache` where there is one, else encoded and written to it.

    Raises ValueError for a file that was made from other texts or by another encoder: it is never used, and
    never overwritten.
    """
    if cache is not None and Path(cache).exists():
        key = prompts(table, descriptions).key(encoder.identity)
        return load_features(cache, table, key=key)
    features = encode(table, encoder, descriptions, progress=progress)
    if cache is not None:
        save_features(features, cache)
    return features
