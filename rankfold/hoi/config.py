"""What a HOLa model is made of, as plain numbers and names: `HolaConfig`.

    HolaConfig(...)                  the method as it is described
    HolaConfig(..., upstream=True)   the public code of the method, where it departs from that

`upstream` only chooses the options of `DEPARTURES` that were not given; each can also be set by itself.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import CLIPVisionConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from rankfold.hoi.classes import ClassTable
from rankfold.hoi.decomposition import TRAINS
from rankfold.hoi.language import FORMS
from rankfold.methods.class_pca import INITS
from rankfold.models.reading import check_rates, check_sizes

# option -> (described, the public code)
DEPARTURES: dict[str, tuple[Any, Any]] = {
    "init": ("reconstructing", "upstream"),
    "count": ("seen", "all"),
    "scale_init": (1.0, 1e-9),
    "spatial_eps": (1e-4, 1e-10),
    "dead": (False, True),
}
CHOICES: dict[str, tuple[str, ...]] = {
    "init": INITS,
    "count": ("seen", "all"),
    "trains": TRAINS,
    "form": FORMS,
}


class HolaConfig(PreTrainedConfig):
    """Sizes and options of a `HolaModel`.

    vision               config of CLIP's image encoder, or its dict
    projection_dim       D: features of a class text, and of an image after the encoder's projection
    classes              a `ClassTable`, as its `to_json` gives it
    query_width          features of a query of the detector
    rank                 r of the class texts' T ≈ W B
    action_from          first row of B that actions use; "third": floor(r / 3), the last two thirds
    trains               "w": only W sees the task's loss, and B what reconstructs T; "b", "both"
    form                 of the class texts: "decomposed"; "free", a table that is trained; "frozen"
    bottleneck, heads, ffn, context_hidden   of every adapter
    num_guides           key texts of each object, one number an object; None: there are none
    tokens               each pair has a token in the image encoder, which is compared with class texts as the
                         pair's union box is; False: only regions are
    dropout              of region features
    roi_size             samples of a region along each side
    roi_sampling         points averaged in a sample along each side; 0: as many as its cells
    logit_scale          start of both scales, which no exp is applied to: doubling it doubles a logit
    prior_train, prior_test   exponent of a pair's detection scores

    attend_classes       classes attend to classes and pairs to pairs in their adapters. By default each is a
                         sequence of its own, of length 1, as in the public code
    isolate_pairs        image tokens do not see pair tokens, nor one pair token another: what is predicted of
                         a pair does not depend on which others there are
    seen_columns         in training the mean over the classes of a verb leaves hidden classes out

    These are None until `upstream` or its absence chooses them, described first, then the public code's:

    init         "reconstructing" W = T B⁺, or "upstream": components of a centred PCA, which do not multiply
                 to T; "pca" is T's own truncated PCA
    count        "seen": a verb's similarities are divided by how many of its classes were summed; "all": by
                 all of its classes, hidden ones too
    scale_init   1, or 1e-9: of the adapters in the image encoder, whose first gradients are then that small
    spatial_eps  1e-4, or 1e-10: added before the logarithm, whose smallest value is -9 or -23
    dead         False, or True: parameters that are made and never used, as 20 % of the public code's are

    Raises ValueError for sizes and rates out of range, and for unknown names.
    """

    model_type = "rankfold_hola"
    sub_configs_defaults = {"vision": SubConfigSpec(CLIPVisionConfig)}  # noqa: RUF012  transformers reads a dict

    vision: Any = None
    projection_dim: int = 512
    classes: Any = None
    query_width: int = 256
    rank: int = 71
    action_from: Any = "third"
    trains: str = "w"
    form: str = "decomposed"
    bottleneck: int = 64
    heads: int = 2
    ffn: int = 128
    context_hidden: int = 128
    num_guides: Any = None
    tokens: bool = True
    dropout: float = 0.2
    roi_size: int = 7
    roi_sampling: int = 0
    logit_scale: float = math.log(1 / 0.07)
    prior_train: float = 1.0
    prior_test: float = 2.8
    attend_classes: bool = False
    isolate_pairs: bool = False
    seen_columns: bool = True
    upstream: bool = False
    init: str | None = None
    count: str | None = None
    scale_init: float | None = None
    spatial_eps: float | None = None
    dead: bool | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        for name, (described, public) in DEPARTURES.items():
            if getattr(self, name) is None:
                setattr(self, name, public if self.upstream else described)
        self.num_guides = None if self.num_guides is None else [int(n) for n in self.num_guides]
        if isinstance(self.classes, ClassTable):
            self.classes = self.classes.to_json()
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        check_sizes(
            projection_dim=self.projection_dim,
            query_width=self.query_width,
            rank=self.rank,
            bottleneck=self.bottleneck,
            heads=self.heads,
            ffn=self.ffn,
            context_hidden=self.context_hidden,
            roi_size=self.roi_size,
        )
        check_rates(dropout=self.dropout)
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}")
        if self.roi_sampling < 0:
            raise ValueError(f"roi_sampling={self.roi_sampling} is a number of points, or 0 for all cells")
        if not self.first_action < self.rank:
            raise ValueError(
                f"action_from={self.action_from!r} leaves actions no row of a basis of {self.rank}; give "
                f"a number from 0 to {self.rank - 1}"
            )

    @property
    def first_action(self) -> int:
        """The first row of B that actions use: floor(r / 3) unless told."""
        if self.action_from == "third":
            return self.rank // 3
        row = self.action_from
        if not isinstance(row, int) or isinstance(row, bool) or row < 0:
            raise ValueError(f"action_from={row!r} is neither 'third' nor a row of the basis")
        return row

    def table(self) -> ClassTable:
        """The classes. Raises ValueError where the config has none."""
        if self.classes is None:
            raise ValueError("this config has no classes: give classes=table.to_json()")
        return ClassTable.from_json(self.classes)


__all__ = ["CHOICES", "DEPARTURES", "HolaConfig"]
