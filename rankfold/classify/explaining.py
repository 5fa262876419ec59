"""The page of `rankfold classify explain`: examples read, explained and written, whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankfold.atomic import writing_file
from rankfold.classify.explain import explanations
from rankfold.classify.page import explain_page
from rankfold.classify.predicting import answered, given_examples, open_classifier


def explain(
    folder: str,
    data: str | None = None,
    *,
    texts: Sequence[str] = (),
    out: str,
    limit: int = 50,
    text_column: str = "text",
    label_column: str | None = None,
    length: int | None = None,
    batch_size: int = 16,
    device: str | None = None,
) -> dict[str, Any]:
    """Write the page of the first `limit` texts to `out`; {"out", "texts", "heads"}. See `predict` for the
    arguments. Raises ValueError for those, and for a model that gives no weights of a pooler."""
    if Path(out).suffix not in (".html", ".htm"):
        raise ValueError(f"--out {out!r}: a file that ends in .html")
    if limit < 1:
        raise ValueError(f"--limit {limit}: at least 1")
    examples = given_examples(data, texts, text_column, label_column)
    examples = examples.take(range(min(limit, len(examples))))
    opened = open_classifier(folder, length=length, device=device)
    truth = answered(examples, opened.names)
    labels = None
    if truth is not None:
        if missing := [index for index in range(len(examples)) if index not in truth]:
            raise ValueError(f"{examples.at(missing[0])}: the label is empty")
        labels = [truth[index] for index in range(len(examples))]
    found = explanations(
        opened.model,
        opened.tokenizer,
        examples.texts,
        labels=labels,
        max_length=opened.length,
        batch_size=batch_size,
    )
    facts = {
        "model": folder,
        "pooler": getattr(opened.model.config, "pooler", "–"),
        "texts": f"{len(found)} of {examples.source}",
        "tokens read of a text, at most": opened.length,
    }
    page = explain_page(found, title=f"What {Path(folder).name} read", facts=facts)
    with writing_file(Path(out)) as beside:
        beside.write_text(page, encoding="utf-8")
    heads = max((len(item.weights) for item in found), default=0)
    return {"out": out, "texts": len(found), "heads": heads}
