"""What a classifier says about texts, in their order; and how well, where they have labels.

Texts are read in batches of like length. A text without a word in it gets no label: `label` is None, and
`reason` says why. Labels of the data that the classifier does not know are refused before it runs.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankfold.atomic import writing_file
from rankfold.classify.encode import encode, logits_of
from rankfold.classify.examples import Examples, check_spec, numbers, read
from rankfold.classify.scores import confusion, scores
from rankfold.judge import Bars

EMPTY, NO_TOKEN = "the text is empty", "the tokenizer finds no word in the text"
RECORDS = ("classify.json", "adapt.json")  # of `classify train`, and of `adapt`
_PART = 4096  # texts that are encoded and sorted by length at a time


@dataclass
class Classifier:
    """A model that was trained to classify, its tokenizer, its classes in order, the tokens that it reads."""

    model: nn.Module
    tokenizer: Any
    names: list[str]
    length: int


def open_classifier(folder: str, *, length: int | None = None, device: str | None = None) -> Classifier:
    """Open a folder or hub id. Raises ValueError where there is none, where it has no classifier in it (its
    head would be random) or no tokenizer, or reads fewer than `length` tokens; without `length` as many as in
    its training, or else 512."""
    import transformers

    import rankfold.hf
    import rankfold.models  # noqa: F401  both register what they know
    from rankfold.classify.build import check_fits, source

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    where = source(folder)
    try:
        found: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
            where, dtype="auto", output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"no classifier at {folder!r}: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error
    model, loaded = found
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(
            f"{folder!r} is no classifier: it lacks {', '.join(missing[:3])}; train one from it with "
            f"`rankfold classify train DATA OUT --model {folder}`"
        )
    if model.config.problem_type not in (None, "single_label_classification") or model.config.num_labels < 2:
        raise ValueError(
            f"{folder!r} gives a text no single class ({model.config.problem_type or 'one number'})"
        )
    if length is None:
        config = getattr(model.config, "encoder", None) or model.config
        most = min(getattr(config, "max_position_embeddings", None) or 512, 512)
        length = _trained_length(Path(folder)) or most
    assert length is not None
    check_fits(folder, model.config, length)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    return Classifier(model.to(place).eval(), tokenizer, names, length)


def _trained_length(folder: Path) -> int | None:
    """The tokens that texts were cut at in training, where the folder says it."""
    for name in RECORDS:
        try:
            return int(json.loads((folder / name).read_text(encoding="utf-8"))["settings"]["length"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def rows_of(
    opened: Classifier, texts: Sequence[str], *, batch_size: int = 32, tell: Any = None
) -> Iterator[dict[str, Any]]:
    """{"label", "probability", "probabilities"} of each text in order; without a word in it, label and
    probability None, probabilities {} and a "reason"."""
    for start in range(0, len(texts), _PART):
        part = list(texts[start : start + _PART])
        found = encode(opened.tokenizer, part, opened.length)
        bare = opened.tokenizer.num_special_tokens_to_add()
        reasons = [
            EMPTY if not text.strip() else NO_TOKEN if len(ids) <= bare else None
            for text, ids in zip(part, found.ids, strict=True)
        ]
        good = [at for at, reason in enumerate(reasons) if reason is None]
        shares: dict[int, list[float]] = {}
        if good:
            kept = replace(found, ids=[found.ids[at] for at in good])
            logits = logits_of(opened.model, kept, batch_size)
            shares = dict(zip(good, logits.double().softmax(-1).tolist(), strict=True))
        for at, reason in enumerate(reasons):
            if reason is not None:
                yield {"label": None, "probability": None, "probabilities": {}, "reason": reason}
                continue
            best = max(range(len(opened.names)), key=shares[at].__getitem__)
            yield {
                "label": opened.names[best],
                "probability": shares[at][best],
                "probabilities": dict(zip(opened.names, shares[at], strict=True)),
            }
        if tell is not None:
            tell("predict", start + len(part), len(texts))


def predict(
    folder: str,
    data: str | None = None,
    *,
    progress: Bars,
    texts: Sequence[str] = (),
    out: str | None = None,
    text_column: str = "text",
    label_column: str | None = None,
    length: int | None = None,
    batch_size: int = 32,
    device: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Classify `texts`, or the examples that `data` names: {"predictions": rows, "metrics": or None,
    "unlabelled": how many got no label}.

    label_column  None: "label" where there is one; a name: it must be there; "": no labels are read
    out           a .jsonl or .csv file for the rows, written whole or not at all
    length        tokens that a text is cut at; None: as in the training

    Each row has the text, and `true` where the data says it. Raises ValueError for bad arguments, a folder
    that is no classifier, bad data, and labels that the classifier does not know.
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: at least 1")
    if out is not None and Path(out).suffix not in (".jsonl", ".csv"):
        raise ValueError(f"--out {out!r}: a file that ends in .jsonl or .csv")
    examples = given_examples(data, texts, text_column, label_column)
    opened = open_classifier(folder, length=length, device=device)
    truth = answered(examples, opened.names) or {}
    with progress() as tell:
        rows = list(rows_of(opened, examples.texts, batch_size=batch_size, tell=tell))
    for index, row in enumerate(rows):
        row["text"] = examples.texts[index]
        if examples.labels is not None:
            row["true"] = opened.names[truth[index]] if index in truth else None
    metrics = None
    scored = [index for index in truth if rows[index]["label"] is not None]
    if scored:
        place = {name: number for number, name in enumerate(opened.names)}
        said = [place[rows[index]["label"]] for index in scored]
        metrics = scores(confusion([truth[index] for index in scored], said, len(place)), opened.names)
    left = sum(row["label"] is None for row in rows)
    if left:
        say(f"{left} of {len(rows)} texts have no word in them and got no label")
    if out is not None:
        write_rows(Path(out), rows, opened.names)
    return {"model": folder, "data": data, "predictions": rows, "metrics": metrics, "unlabelled": left}


def given_examples(
    data: str | None, texts: Sequence[str], text_column: str, label_column: str | None
) -> Examples:
    """The texts that are given, or the examples that `data` names; empty texts are let through. Raises
    ValueError for neither or both."""
    if (data is None) == (not texts):
        raise ValueError("which texts: DATA, or --text")
    if data is None:
        return Examples(list(texts), None, list(range(1, len(texts) + 1)), "--text")
    check_spec(data)
    wanted = None if label_column is None else bool(label_column)
    return read(
        data, text_column=text_column, label_column=label_column or "label", labels=wanted, empty=True
    )


def answered(examples: Examples, names: list[str]) -> dict[int, int] | None:
    """{index: class number} of the examples that have a label (an empty one is none); None where the data
    has no labels. Raises ValueError for a label that is no class, with its line."""
    if examples.labels is None:
        return None
    kept = [index for index, label in enumerate(examples.labels) if label]
    return dict(zip(kept, numbers(examples.take(kept), names), strict=True)) if kept else {}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """One line a text, in order. JSONL: the rows as they are. CSV: text, true (where known), label,
    probability, reason, and a column `p(class)` for each class."""
    with writing_file(path) as beside:
        if path.suffix == ".jsonl":
            with beside.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            return
        known = ["true"] if rows and "true" in rows[0] else []
        with beside.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            columns = ["text", *known, "label", "probability", "reason"]
            table.writerow([*columns, *(f"p({name})" for name in names)])
            for row in rows:
                shares = [row["probabilities"].get(name, "") for name in names]
                table.writerow([row.get(column, "") for column in columns] + shares)
