"""The classes that a classifier learns, and whether the head that its checkpoint has is one for them.

the checkpoint's classes         those of the data
the same names, in any order     its head stays, and its order
as many, without names           its head stays, in the order of the data
none in common, or no head       a new head
some in common                   refused: a name is written otherwise, or a new head is asked for
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rankfold.classify.examples import Examples

_UNNAMED = re.compile(r"LABEL_\d+")  # what transformers calls classes that nobody named


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The labelled data of a run.

    data, validation, test  names of examples; None: no such
    held        share of `data` for validation, where there is no `validation`
    per_class   examples of each class to train on; None: all
    new_head    draw a head anew, whatever the checkpoint has
    """

    data: str
    validation: str | None = None
    test: str | None = None
    held: float = 0.1
    label_column: str = "label"
    per_class: int | None = None
    new_head: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.held < 1:
            raise ValueError(f"--held-out {self.held:g}: the share for validation, at least 0 and below 1")
        if self.per_class is not None and self.per_class < 1:
            raise ValueError(f"--per-class {self.per_class}: at least 1")

    @property
    def specs(self) -> list[str]:
        return [spec for spec in (self.data, self.validation, self.test) if spec is not None]


@dataclass(frozen=True)
class Classes:
    """Names in the order of the logits; `new_head`: the head of the checkpoint is not for them."""

    names: list[str]
    new_head: bool
    warnings: list[str]


def classes_for(model: str, config: Any, train: Examples, names: Sequence[str], new_head: bool) -> Classes:
    """The classes of a run, from those of the data and what the configuration of the model says. Raises
    ValueError where some are the model's and some are not."""
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if "Classification" not in architecture:
        return Classes(list(names), False, [])
    own = [config.id2label[number] for number in range(len(config.id2label))]
    if new_head:
        return Classes(list(names), True, [])
    if all(_UNNAMED.fullmatch(name) for name in own):
        if len(own) != len(names):
            return Classes(list(names), True, [])
        said = f"the {len(own)} classes of {model!r} have no names and are taken to be, in order: "
        return Classes(list(names), False, [said + ", ".join(names)])
    if set(own) == set(names):
        return Classes(own, False, [])
    if not set(own) & set(names):
        return Classes(
            list(names), True, [f"the head of {model!r}, for {len(own)} other classes, is replaced"]
        )
    extra = [name for name in names if name not in own]
    if extra:
        assert train.labels is not None
        near = difflib.get_close_matches(extra[0], own, n=1)
        hint = f" (nearest: {near[0]!r})" if near else ""
        what = f"{train.at(train.labels.index(extra[0]))}: class {extra[0]!r} is none of {model!r}{hint}"
    else:
        lacking = next(name for name in own if name not in names)
        what = f"'{train.source}' has no example of class {lacking!r}, which {model!r} knows"
    raise ValueError(
        f"{what}; {len(set(own) & set(names))} classes are in both, of {len(own)} in the model and "
        f"{len(names)} in the data. Name them alike, or draw a head for those of the data with --new-head"
    )
