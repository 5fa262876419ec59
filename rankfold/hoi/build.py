"""The model that is trained: an image encoder, text features, and the options of `HolaConfig`.

    vision   "small": an encoder of random weights, for drawn scenes; or a folder or hub id of a CLIP model
    text     features from a file, or an encoder that makes them: that of the same CLIP, or "minilm"

Text features and image features must be of one width, which is checked before any weights are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from rankfold.hoi.classes import ClassTable
from rankfold.hoi.config import HolaConfig
from rankfold.hoi.folder import TEXT
from rankfold.hoi.model import HolaModel
from rankfold.hoi.text import TextFeatures, prompts
from rankfold.hoi.text_encoder import TextEncoder
from rankfold.hoi.text_file import features_of, load_features, read_descriptions
from rankfold.pretrain.model import override

SMALL = "small"
# Ours: enough for drawn scenes, seconds an epoch on one core.
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 8,
}
_GIVEN = (
    "vision",
    "projection_dim",
    "classes",
    "num_guides",
    "query_width",
    "upstream",
)  # by data and choice
_FEATURES = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What model, and its texts. `settings`: KEY=VALUE of `HolaConfig`, such as rank=24 or form=frozen.

    descriptions  a JSON file of texts about classes (see `rankfold.hoi.text_file`), for an encoder to read
    upstream      the public code's behaviour where it departs from its description (see `HolaConfig`)

    Raises ValueError for unknown settings and values, and descriptions beside features that are made already.
    """

    vision: str = SMALL
    text: str | None = None
    descriptions: str | None = None
    upstream: bool = False
    settings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _ = self.options
        if self.descriptions is not None and self.text is not None and self.text.endswith(_FEATURES):
            raise ValueError(
                f"--descriptions: the features in {self.text} are made already; name an encoder with --text"
            )

    @property
    def options(self) -> dict[str, Any]:
        """Of `HolaConfig`, those that a choice has a say in."""
        for item in self.settings:
            if item.partition("=")[0] in _GIVEN:
                raise ValueError(f"--set {item}: decided by the data, the encoders, or an option of its own")
        made = override(HolaConfig(upstream=self.upstream), self.settings)
        names = [field.name for field in fields(HolaConfig) if field.name in HolaConfig.__annotations__]
        return {name: getattr(made, name) for name in names if name not in _GIVEN} | {
            "upstream": self.upstream
        }

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "settings": list(self.settings)}


def open_text(
    choice: Choice, data: str | Path, table: ClassTable, device: str
) -> tuple[str, Callable[[Path, Callable[[str], None]], TextFeatures]]:
    """The hash of the text features of a choice for these classes, and what gives them, called with a file to
    keep them in and a function to be told in words; all that it reads is open already.

    data  the data folder: a name that ends with .safetensors is looked for there too, and without a choice
          its text.safetensors is taken

    Raises ValueError for a file that is damaged, of other classes, or not there, and for an unknown encoder.
    """
    name, beside = choice.text, Path(data) / TEXT
    if name is None and choice.descriptions is None and beside.is_file():
        name = TEXT
    if name is not None and name.endswith(_FEATURES):
        inside = Path(data) / name
        made = load_features(inside if inside.is_file() and not Path(name).is_file() else name, table)
        check_width(made, None, choice)
        return made.hash, lambda cache, say: made
    told = None if choice.descriptions is None else read_descriptions(choice.descriptions, table)
    encoder = TextEncoder.open(name or ("minilm" if choice.vision == SMALL else choice.vision), device)
    key = prompts(table, told).key(encoder.identity)
    return key, lambda cache, say: features_of(table, encoder, told, cache=cache, progress=say)


def check_vision(choice: Choice) -> int | None:
    """Features that the image encoder gives, from its configuration alone; None: as many as the texts have.
    Raises ValueError where there is no such encoder."""
    if choice.vision == SMALL:
        return None
    from transformers import CLIPConfig, CLIPVisionConfig

    try:
        body, _ = CLIPConfig.get_config_dict(choice.vision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no image encoder {choice.vision!r}: not {SMALL!r}, not the folder of a CLIP model, and the hub "
            f"has none or could not be asked ({str(error).splitlines()[0]})"
        ) from error
    kinds = {CLIPConfig.model_type: CLIPConfig, CLIPVisionConfig.model_type: CLIPVisionConfig}
    if body.get("model_type") not in kinds:
        raise ValueError(
            f"--vision {choice.vision}: a model of kind {body.get('model_type')!r}; this needs one of "
            f"{', '.join(kinds)}"
        )
    return int(kinds[body["model_type"]].from_dict(body).projection_dim)


def check_width(text: TextFeatures, width: int | None, choice: Choice) -> None:
    """Raise ValueError, with both numbers, where texts and images have features of different widths, and
    where the rank is more than they allow."""
    if width is not None and text.width != width:
        raise ValueError(
            f"the text features ({text.source}) have width {text.width}, image features of {choice.vision} "
            f"{width}: both must come from one model"
        )
    rank, most = choice.options["rank"], min(text.classes.shape)
    if choice.options["form"] == "decomposed" and rank > most:
        raise ValueError(f"--set rank={rank}: {len(text.classes)} classes of width {text.width} allow {most}")


def build(choice: Choice, text: TextFeatures, table: ClassTable, *, query_width: int, seed: int) -> HolaModel:
    """The untrained model in float32. The same seed gives the same weights; torch's global random state is
    left as it was."""
    options = {**choice.options, "query_width": query_width}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if choice.vision != SMALL:
            return HolaModel.from_clip(choice.vision, table, text, **options).float()
        config = HolaConfig(
            vision={**_SIZES, "projection_dim": text.width},
            projection_dim=text.width,
            classes=table.to_json(),
            **options,
        )
        return HolaModel(config, text)


def setting_items(given: dict[str, Any] | Sequence[str]) -> tuple[str, ...]:
    """KEY=VALUE of settings that a JSON file may give as an object."""
    if isinstance(given, dict):
        return tuple(f"{key}={json.dumps(value)}" for key, value in given.items())
    return tuple(given)
