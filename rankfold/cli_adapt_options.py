"""The options of `rankfold adapt --recipe`, and what belongs to it alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

Recipe = Annotated[
    str | None,
    typer.Option(
        help="how to fine-tune: lora, wara, wara_adaptive, wara_feature, wara_tiny, waveft, pissa; full; "
        "probe (a head alone)"
    ),
]
Rank = Annotated[int | None, typer.Option(help="of the adapter, of each band in wara; default 8")]
Alpha = Annotated[float | None, typer.Option(help="alpha / rank scales the adapter; default: the rank")]
Wavelet = Annotated[str | None, typer.Option(help="wara: db1 (default), db2, sym4, …")]
Levels = Annotated[int | None, typer.Option(help="wara: levels of the transform; default 1")]
Init = Annotated[str | None, typer.Option(help="lora, wara: kaiming (default) or gaussian")]
Coefficients = Annotated[
    int | None, typer.Option(help="waveft: wavelet coefficients of each layer that train; default 2592")
]
Scale = Annotated[float | None, typer.Option(help="waveft: factor of the update; default 25")]
Core = Annotated[str | None, typer.Option(help="wara_tiny: full (default) or diagonal")]
Keep = Annotated[
    list[str] | None,
    typer.Option("--keep-trainable", help="glob of parameters that train beside the adapters, repeatable"),
]
Epochs = Annotated[
    int | None,
    typer.Option(help="over labelled examples, or conversations; default 3. See --tokens for texts"),
]
Steps = Annotated[int | None, typer.Option(help="language: steps of the optimizer, instead of --tokens")]
Patience = Annotated[
    int | None, typer.Option(help="labelled: epochs without a better one, then it ends; default 3, 0: never")
]
PerClass = Annotated[
    int | None, typer.Option(help="labelled: examples of each class to train on, the same at every seed")
]
NewHead = Annotated[
    bool, typer.Option("--new-head", help="labelled: draw the head anew, whatever classes MODEL has one for")
]
ImageColumn = Annotated[str | None, typer.Option(help="images: column of their paths; default image")]
ImageSize = Annotated[
    int | None, typer.Option(help="images: pixels of a side; default: what MODEL's own processor says")
]
Mean = Annotated[
    str | None, typer.Option(help="images: 0.5, or 0.485,0.456,0.406; default: MODEL's own processor")
]
Std = Annotated[str | None, typer.Option(help="images: as --mean")]
Augment = Annotated[
    str | None, typer.Option(help="images: what varies in training: flip, crop, or flip,crop; default none")
]
Workers = Annotated[
    int | None, typer.Option(help="images: processes that decode beside the one that trains; default 0")
]
TextColumn = Annotated[str | None, typer.Option(help="labelled: column of the texts; default text")]
LabelColumn = Annotated[str | None, typer.Option(help="labelled: column of the labels; default label")]
Merge = Annotated[bool, typer.Option("--merge", help="write the model with the adapters merged into it")]
AdapterOnly = Annotated[
    bool, typer.Option("--adapter-only", help="write the adapter alone, which opens on the same base")
]
AsLora = Annotated[bool, typer.Option("--as-lora", help="write a LoRA folder of PEFT")]

# Of --recipe alone, and of --heal alone, by their names in the command.
METHOD = ("rank", "alpha", "wavelet", "levels", "init", "coefficients", "scale", "core")
LABELLED = ("patience", "text_column", "label_column", "per_class", "new_head")
IMAGES = ("image_column", "image_size", "mean", "std", "augment", "workers")
RECIPE = (
    *("recipe", *METHOD, "targets", "skip", "keep_trainable", "epochs", "steps"),
    *(*LABELLED, *IMAGES, "merge", "adapter_only", "as_lora"),
)
HEAL = {"heal": None, "lm": 0.0, "embeddings": False}


def check_alone(params: Mapping[str, Any]) -> None:
    """Raise ValueError for options of the one beside the other."""
    if params["heal"] is not None:
        extra = next((name for name in RECIPE if params[name] not in (None, False, [], ())), None)
        if extra is not None:
            raise ValueError(
                f"--{extra.replace('_', '-')}: of --recipe; --heal trains what MODEL has already"
            )
        return
    extra = next((name for name, unset in HEAL.items() if params[name] != unset), None)
    if extra is not None:
        raise ValueError(f"--{extra}: of --heal ORIGINAL, which there is not")


def of_recipe(params: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `rankfold.adapt.adapt` among the parameters of the command."""
    lists = {name: params[name] or () for name in ("data", "validation", "test", "skip", "keep_trainable")}
    same = (
        *("recipe", "held_out", "lr", "warmup", "clip", "dtype", "seed", "device", "merge", "adapter_only"),
        *("as_lora", "resume", "restart", "keep_run", "overwrite", "epochs", "steps", "tokens"),
        *("length", "batch_size", "accumulate", "validation_tokens", "eval_every", "save_every"),
        *(*LABELLED, *IMAGES),
    )
    return {
        **lists,
        **{name: params[name] for name in same},
        "targets": params["targets"] or None,
        "new_head": params["new_head"] or None,  # a flag: what is not said is not asked for
        "options": {name: params[name] for name in METHOD},
        "check": params["verify"],
    }
