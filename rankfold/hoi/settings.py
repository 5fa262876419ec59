"""What a training of HOLa is told, checked before anything is read; and JSON files that hold such options.

Every default is the paper's, as its public code has it; `rankfold.hoi.making` has those that fit drawn sets.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rankfold.hoi.penalties import SEEN, WEIGHTS


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The loss is the plain sum of its terms, each times its weight here; what has weight 0 is left out.

    recon … actreg     see `rankfold.hoi.penalties`
    alpha, gamma       of the focal loss
    seen_weight        of seen classes in actreg: 1/5, or 3/5, as a test decides in the public code that mixes
                       up two kinds of ids
    clamped            see `interaction_loss`
    last_image         sem reads the last image of a batch alone, as the public code; else all of them
    """

    interaction: float = 1.0
    recon: float = WEIGHTS["recon"]
    sparse: float = WEIGHTS["sparse"]
    unique: float = WEIGHTS["unique"]
    orth: float = WEIGHTS["orth"]
    act_recon: float = WEIGHTS["act_recon"]
    act_sparse: float = WEIGHTS["act_sparse"]
    act_orth: float = WEIGHTS["act_orth"]
    sem: float = WEIGHTS["sem"]
    actreg: float = WEIGHTS["actreg"]
    alpha: float = 0.5
    gamma: float = 0.2
    seen_weight: float = SEEN
    clamped: bool = True
    last_image: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf:
                raise ValueError(f"loss {field.name}={value}: a finite number of at least 0")
        if self.alpha > 1:
            raise ValueError(f"loss alpha={self.alpha}: a share, from 0 to 1")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def losses(upstream: bool, **given: float) -> Losses:
    """The weights that were given, and for the rest what is described, or with `upstream` what the public
    code does. Raises ValueError for a name that is no term."""
    known = [field.name for field in fields(Losses)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"
            raise ValueError(f"no term {name!r} in the loss{hint}")
    return Losses(**({"clamped": False, "last_image": True} if upstream else {}) | given)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is trained. A step is one of the optimizer: `accumulate` batches of `batch_size` images.

    drop      epochs after which the rate is a tenth; 0: never
    clip      norm that the gradients are clipped to; 0: not
    workers   processes that decode images; 0: this one
    """

    epochs: int = 12
    lr: float = 1e-3
    batch_size: int = 16
    accumulate: int = 1
    weight_decay: float = 1e-4
    clip: float = 0.1
    drop: int = 10
    seed: int = 66
    workers: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        lowest = {"epochs": 1, "batch_size": 1, "accumulate": 1, "drop": 0, "workers": 0}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"{flag(name)} {getattr(self, name)}: at least {low}")
        for name, open_ in (("lr", True), ("weight_decay", False), ("clip", False)):
            value = getattr(self, name)
            if not (0 < value < math.inf or (value == 0 and not open_)):
                raise ValueError(
                    f"{flag(name)} {value}: a finite number {'above' if open_ else 'of at least'} 0"
                )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed {self.seed}: from 0 to 2^32 - 1")

    def to_json(self) -> dict[str, Any]:
        """What identifies the training: all that changes its losses."""
        return {key: value for key, value in asdict(self).items() if key != "workers"}


def flag(name: str) -> str:
    """The option of the command line that sets `name`."""
    return "--" + name.replace("_", "-")


def read_settings(
    path: str | os.PathLike[str], known: Mapping[str, type | tuple[type, ...]]
) -> dict[str, Any]:
    """The options in a JSON file: {name: value}, of the kinds that `known` has.

    A key "about" may say what the file is for. Raises ValueError, naming the file, for what is not such an
    object, and for an option that is not known or is of another kind.
    """
    try:
        body = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"no settings {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ValueError(f"{path} must be a JSON object of options")
    body.pop("about", None)
    for name, value in body.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.6)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(known))}"
            raise ValueError(f"{path}: no option {name!r}{hint}")
        kinds = known[name]
        wrong_bool = isinstance(value, bool) and kinds is not bool
        if value is not None and (wrong_bool or not isinstance(value, kinds)):
            raise ValueError(f"{path}: {name!r} is {value!r}")
    return body
