"""Labelled images for a classifier: read, looked at, given to the model's own processor; a head for their
classes."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch

from rankfold.adapt.classes import Asked, classes_for
from rankfold.adapt.classifier import Task
from rankfold.adapt.pictures import Images, check_images, read_images, said
from rankfold.adapt.pixels import PIXELS, Pixels, Reading, channels_of, processor_of
from rankfold.classify.build import source, with_head
from rankfold.classify.examples import numbers, warnings_of
from rankfold.classify.training import sets_of
from rankfold.metrics import Progress


def open_images(model: str, asked: Asked, reading: Reading, seed: int, tell: Progress) -> Task:
    """Raises ValueError for what cannot be, before anything is trained: of the data by the name of the
    image."""
    import transformers

    import rankfold.hf  # noqa: F401  folders that rankfold wrote load, whether or not autoload is on

    for spec in asked.specs:
        check_images(spec)
    config = transformers.AutoConfig.from_pretrained(source(model))
    channels = channels_of(model, config)
    processor = processor_of(model, config, reading)
    one = partial(read_images, tell=tell, image_column=reading.column, label_column=asked.label_column)
    sets, names = sets_of(asked.data, asked.validation, asked.test, asked.held, one, asked.per_class)
    classes = classes_for(model, config, sets["train"], names, asked.new_head)
    for item in sets.values():
        numbers(item, classes.names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = with_head(
            transformers.AutoModelForImageClassification, model, classes.names, new_head=classes.new_head
        )
    pixels: dict[str, Any] = {}
    doubts = warnings_of(sets["train"], {part: item for part, item in sets.items() if part != "train"})
    for part, item in sets.items():
        assert isinstance(item, Images)
        pixels[part] = Pixels(item, processor, channels, reading.augment)
        doubts += [words for words in item.warnings if words not in doubts]
    _check_model(model, net, pixels["train"])
    told = processor.to_dict()
    return Task(
        model=net,
        reader=processor,
        names=classes.names,
        sets=sets,
        inputs=pixels,
        identity={"processor": copy.deepcopy(told), "augment": list(reading.augment)},
        settings={"augment": list(reading.augment), "processor": told},
        warnings=doubts + classes.warnings,
    )


def _check_model(name: str, net: Any, pixels: Pixels) -> None:
    """Raise ValueError where the model does not take what its processor makes."""
    made = pixels.batch([0])
    height, width = made[PIXELS].shape[-2:]
    try:
        with torch.no_grad():
            net.eval()(**made)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name!r} does not take the images that its processor makes, {height} x {width} "
            f"({said(error)}); say --image-size"
        ) from error
