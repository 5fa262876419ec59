"""The options of `rankfold classify`, which train and compare share; and those of a model, gathered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any

import typer

from rankfold.cli_options import rank_of

SPEC = (
    "movie, tweets, spam, sentiment, brown_genres (and :train, :test); a .csv, .tsv or .jsonl; a hub data set"
)
Examples = Annotated[str, typer.Argument(metavar="DATA", help=SPEC)]
Folder = Annotated[
    str, typer.Argument(help="a folder that `classify train` or `compress` wrote, or a hub id")
]
TextColumn = Annotated[str, typer.Option(help="column or field of the texts")]
LabelColumn = Annotated[str, typer.Option(help="column or field of the labels, strings or integers")]
Texts = Annotated[list[str] | None, typer.Option("--text", help="a text, instead of DATA; repeatable")]
Validation = Annotated[str | None, typer.Option(help="examples that choose the epoch; see --held-out")]
HeldOut = Annotated[
    float | None,
    typer.Option(help="share of DATA that chooses the epoch, default 0.1; 0: none, the last epoch is kept"),
]
Epochs = Annotated[int | None, typer.Option(help="default: 12 from random weights, 3 for a pretrained model")]
Rate = Annotated[
    float | None, typer.Option(help="largest rate; default 2e-3, or 5e-5 for a pretrained model")
]
BatchSize = Annotated[int | None, typer.Option(help="texts in a step; default 32")]
Length = Annotated[
    int | None, typer.Option(help="tokens that a text is cut at; default 256, or 128 for a pretrained model")
]
Patience = Annotated[
    int | None, typer.Option(help="epochs without a better one, then training ends; default 3, 0: never")
]
Best = Annotated[str | None, typer.Option(help="which epoch is kept: accuracy (default) or loss")]
Pooler = Annotated[
    str | None,
    typer.Option(help="mean, additive, self_attentive, multihead or lama; default: lama in lama, else mean"),
]
Heads = Annotated[int | None, typer.Option(help="heads of the pooler")]
RankPerHead = Annotated[int | None, typer.Option(help="lama: rank of a head's affinity; default 1")]
Context = Annotated[str | None, typer.Option(help="lama: learned (default), or mean, of each text")]
Temperature = Annotated[float | None, typer.Option(help="lama: of the softmax over words; default 1")]
Rank = Annotated[
    str | None, typer.Option(help="lrt: an integer, or a share of break-even such as 0.25 (default)")
]
K = Annotated[int | None, typer.Option("--k", help="linformer: positions that are left; default 32")]
Sharing = Annotated[
    str | None, typer.Option(help="linformer: none, headwise (default), kv or layerwise share E and F")
]
Vocabulary = Annotated[int | None, typer.Option(help="entries of the wordpiece vocabulary; default 8000")]
Vectors = Annotated[
    str | None,
    typer.Option(
        help="lama, gru: word vectors, a .txt, .vec or .gz file; or a model such as minilm: its table"
    ),
]
Width = Annotated[int | None, typer.Option(help="features of a state (of each direction in lama and gru)")]
Layers = Annotated[int | None, typer.Option(help="layers of the encoder")]
Embedding = Annotated[int | None, typer.Option(help="lama, gru: size of a word vector; default 200")]
Dropout = Annotated[float | None, typer.Option(help="of everything that is trained from random weights")]
WordDropout = Annotated[float | None, typer.Option(help="lama, gru: share of words left out in training")]


def options(params: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a model among the parameters of a command, as `Choice` takes them. Raises ValueError for
    a rank that is no number."""
    from rankfold.classify.settings import Choice

    found = {field.name: params[field.name] for field in fields(Choice) if field.name != "model"}
    return found | {"rank": rank_of(found["rank"])}


def settings(params: Mapping[str, Any]) -> dict[str, Any]:
    """How it is trained, among the parameters of a command."""
    return {name: params[name] for name in ("epochs", "lr", "batch_size", "length", "patience", "best")}


def listed(text: str, option: str) -> list[str]:
    """The items of a comma-separated list. Raises ValueError for an empty one."""
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise ValueError(f"{option} {text!r}: items separated by commas, such as a,b")
    return items
