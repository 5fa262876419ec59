"""Labelled texts for a classifier: read, checked, tokenized; the model with a head for their classes."""

from __future__ import annotations

from functools import partial

from rankfold.adapt.classes import Asked, classes_for
from rankfold.adapt.classifier import Task
from rankfold.classify.build import build, source, words
from rankfold.classify.encode import encode
from rankfold.classify.examples import check_spec, read, warnings_of
from rankfold.classify.settings import Choice
from rankfold.classify.training import check_pretrained, check_tokens, sets_of
from rankfold.metrics import Progress


def open_texts(model: str, asked: Asked, text_column: str, length: int, seed: int, tell: Progress) -> Task:
    """Raises ValueError for what cannot be."""
    from transformers import AutoConfig

    for spec in asked.specs:
        check_spec(spec)
    kind = Choice(model=model)
    if kind.scratch:
        raise ValueError(
            f"{model!r} is trained from random weights, by rankfold classify train; adapt takes a model that "
            "is trained already: minilm, a folder, a hub id"
        )
    check_pretrained(model, length)
    reading = partial(read, text_column=text_column, label_column=asked.label_column)
    sets, names = sets_of(asked.data, asked.validation, asked.test, asked.held, reading, asked.per_class)
    classes = classes_for(
        model, AutoConfig.from_pretrained(source(model)), sets["train"], names, asked.new_head
    )
    known = words(kind, sets["train"].texts, length)
    encoded = {part: encode(known.tokenizer, item.texts, length) for part, item in sets.items()}
    said = warnings_of(sets["train"], {part: item for part, item in sets.items() if part != "train"})
    said += [*check_tokens(sets, encoded), *classes.warnings]
    net = build(kind, known, classes.names, seed=seed, length=length, new_head=classes.new_head)
    return Task(
        model=net,
        reader=known.tokenizer,
        names=classes.names,
        sets=sets,
        inputs=encoded,
        facts={part: {"cut": item.cut} for part, item in encoded.items()},
        warnings=said,
    )
