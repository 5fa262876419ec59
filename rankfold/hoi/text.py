"""Text features of a class table, computed once by a frozen encoder.

    T (N, D)      "a photo of a person riding a bicycle: <description>"      unit rows
    Ac (V, D)     a description of each action                               unit rows
    O (O+1, D)    "a photo of a bicycle", …, "a photo of nothing"            as the encoder gives them
    G_o (p_o, D)  key points on body and object, for each object             unit rows

Descriptions, key points and those of actions are texts of a language model that the user brings in a file
(`rankfold.hoi.text_file`); what it leaves out is filled in by templates. [HOLa: arXiv 2507.15542]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from rankfold.hoi.classes import ClassTable, gerund, with_article


class Encoder(Protocol):
    """What `encode` asks of an encoder; `rankfold.hoi.text_encoder.TextEncoder` is one."""

    name: str

    @property
    def identity(self) -> str: ...

    def __call__(self, texts: Sequence[str]) -> Tensor: ...


@dataclass(frozen=True)
class Descriptions:
    """Texts of a language model, by interaction id, verb id and object id; each may leave some out.

    actions  one text a verb, its points joined
    source   who wrote them
    """

    classes: Mapping[int, str] = field(default_factory=dict)
    actions: Mapping[int, str] = field(default_factory=dict)
    guides: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    source: str = ""


class Prompts(NamedTuple):
    """What is encoded: N, V and O+1 texts, and the key points of each of O objects."""

    classes: tuple[str, ...]
    actions: tuple[str, ...]
    objects: tuple[str, ...]
    guides: tuple[tuple[str, ...], ...]

    def key(self, identity: str) -> str:
        """SHA-256 (hex) of the texts and of an encoder's identity."""
        return hashlib.sha256(json.dumps([identity, *self]).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class TextFeatures:
    """See the module; float32.

    source  the encoder's name, and who wrote the descriptions
    hash    `Prompts.key` of what was encoded
    table   the class table's hash

    Raises ValueError where shapes do not fit each other, numbers are not finite, or rows have no unit norm.
    """

    classes: Tensor
    actions: Tensor
    objects: Tensor
    guides: tuple[Tensor, ...]
    source: str = ""
    hash: str = ""
    table: str = ""

    def __post_init__(self) -> None:
        named = {"classes": self.classes, "actions": self.actions, "objects": self.objects}
        named |= {f"guides[{i}]": guide for i, guide in enumerate(self.guides)}
        for name, tensor in named.items():
            if tensor.dim() != 2 or tensor.shape[1] != self.width:
                raise ValueError(
                    f"text features {name} have shape {tuple(tensor.shape)}, the classes "
                    f"{tuple(self.classes.shape)}: all have one width"
                )
            if not torch.isfinite(tensor).all():
                raise ValueError(f"text features {name} {tuple(tensor.shape)} hold NaN or infinite entries")
            off = (tensor.norm(dim=1) - 1).abs() if name != "objects" else tensor.new_zeros(0)
            if off.numel() and float(off.max()) > 1e-3:
                raise ValueError(
                    f"text features {name} have unit rows; row {int(off.argmax())} has norm "
                    f"{float(tensor[int(off.argmax())].norm()):.4g}"
                )
        if len(self.objects) != len(self.guides) + 1:
            raise ValueError(
                f"{len(self.objects)} object features go with guides of {len(self.objects) - 1} objects, as "
                f"the last is nothing; there are {len(self.guides)}"
            )

    @property
    def width(self) -> int:
        """D."""
        return self.classes.shape[-1]

    def check(self, table: ClassTable, width: int | None = None) -> None:
        """Raise ValueError with both numbers where these are not features of this table, or not `width`
        wide."""
        counts = (len(self.classes), len(self.actions), len(self.guides))
        expected = (len(table), len(table.verbs), len(table.objects))
        if counts != expected:
            raise ValueError(
                f"text features of {counts} interactions, verbs and objects; the class table has {expected}"
            )
        if self.table and self.table != table.hash:
            raise ValueError("text features of another class table of the same size: encode them again")
        if width is not None and self.width != width:
            raise ValueError(
                f"text features of width {self.width}, the model's is {width}: they are of another encoder"
            )


def prompts(table: ClassTable, descriptions: Descriptions | None = None) -> Prompts:
    """The texts of a table, by interaction, verb and object id."""
    told = descriptions or Descriptions()
    classes = []
    for interaction in range(len(table)):
        phrase = f"a photo of a person {' '.join(table.name_of(interaction))}"
        more = told.classes.get(interaction)
        classes.append(phrase if more is None else f"{phrase}: {more}")
    things = [with_article(name) for name in table.objects]
    return Prompts(
        tuple(classes),
        tuple(told.actions.get(verb, _action(name)) for verb, name in enumerate(table.verbs)),
        (*(f"a photo of {thing}" for thing in things), "a photo of nothing"),
        tuple(told.guides.get(i, _guides(thing)) for i, thing in enumerate(things)),
    )


def _action(verb: str) -> str:
    doing = gerund(verb)
    if doing == "and":  # what `gerund` makes of no interaction
        return "a photo of a person not interacting with anything"
    return f"a photo of a person {doing} something"


def _guides(thing: str) -> tuple[str, ...]:
    return (
        f"the body of a person near {thing}",
        f"the hands of a person on {thing}",
        f"{thing} beside a person",
    )


def encode(
    table: ClassTable,
    encoder: Encoder,
    descriptions: Descriptions | None = None,
    *,
    progress: Callable[[str], None] | None = None,
) -> TextFeatures:
    """Encode the prompts of a table.

    progress  told once what is encoded, before it takes its time

    Raises ValueError for an encoder that gives zeros or numbers that are not finite.
    """
    texts = prompts(table, descriptions)
    flat = [
        *texts.classes,
        *texts.actions,
        *texts.objects,
        *(text for group in texts.guides for text in group),
    ]
    if progress is not None:
        progress(f"encoding {len(set(flat))} texts with {encoder.name}")
    features = encoder(flat)
    counts = [len(texts.classes), len(texts.actions), len(texts.objects), *map(len, texts.guides)]
    classes, actions, objects, *guides = features.split(counts)
    if bool((features == 0).all(1).any()):
        text = flat[int((features == 0).all(1).nonzero()[0])]
        raise ValueError(f"encoder {encoder.name!r} gives zeros for {text!r}")
    wrote = descriptions.source if descriptions is not None else ""
    return TextFeatures(
        F.normalize(classes, dim=-1),
        F.normalize(actions, dim=-1),
        objects.clone(),
        tuple(F.normalize(guide, dim=-1) for guide in guides),
        source=f"{encoder.name}; descriptions: {wrote or 'given'}" if descriptions else encoder.name,
        hash=texts.key(encoder.identity),
        table=table.hash,
    )
