"""What one run did: the only facts object.

A `Report` holds one row a layer, the totals, what the run was asked and what it reached. Text, JSON, the
HTML page and the model card are renderings of it and add no fact of their own. It is mutable because the
evaluation, the timings and the provenance become known after the factorization.

The JSON is strict (no bare NaN): a number that is not finite is written as the string "NaN", "Infinity" or
"-Infinity" and read back as the float.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankfold.atomic import writing_file

if TYPE_CHECKING:
    from rich.console import Console, Group

FORMAT = 1
FILE_NAME = "rankfold_report.json"

_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
# What from_json accepts, by the annotation of the field. bool is an int in Python and never one of these.
_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "int | None": (int, type(None)),
    "dict[str, Any]": (dict,),
    "dict[str, Any] | None": (dict, type(None)),
    "list[str]": (list,),
    "list[float]": (list, tuple),
    "tuple[int, ...]": (list, tuple),
}


@dataclass(kw_only=True)
class LayerRow:
    """One selected layer, before and after.

    Bytes are those of the matrix only (the bias is not factorized); `macs_*` are multiply-adds per input
    row; `error` is the squared error in the metric's unit and `relative_error` = sqrt(error / energy), both
    measured after the cast to the stored dtype; `loss_share` is this layer's part of the summed error.
    `spectrum` samples the `full_rank` normalised singular values of the whitened matrix at even indices.
    """

    name: str
    type: str
    host: str
    shape: tuple[int, ...]
    structure: str
    bytes_before: int
    bytes_after: int
    block: int | None = None
    size: Any = None  # None = left dense; a rank, or whatever the method's menu holds
    spec: dict[str, Any] | None = None
    params_before: int = 0
    params_after: int = 0
    macs_before: int = 0
    macs_after: int = 0
    error: float = 0.0
    relative_error: float = 0.0
    loss_share: float = 0.0
    note: str = ""
    spectrum: list[float] = field(default_factory=list)
    full_rank: int = 0

    def __post_init__(self) -> None:
        self.shape = tuple(self.shape)
        # Four digits are more than a plot shows, and keep the file of a 500-layer model below a megabyte.
        self.spectrum = [float(f"{value:.4g}") for value in self.spectrum]

    @property
    def kept(self) -> float:
        """Fraction of this layer's bytes that is kept."""
        return self.bytes_after / self.bytes_before if self.bytes_before else 1.0

    @property
    def dense(self) -> bool:
        return self.size is None


@dataclass(kw_only=True)
class SkippedRow:
    """A parameter of two or more dimensions that was not selected, and why."""

    name: str
    shape: tuple[int, ...]
    bytes: int
    reason: str

    def __post_init__(self) -> None:
        self.shape = tuple(self.shape)


@dataclass(kw_only=True)
class Report:
    """One run of `factorize_`. Field by field the JSON of `to_json`, plus `"format": 1` there.

    `budget` is the fraction of `unit` *kept* that was asked of the selected layers, `reached` what was
    reached. `totals` holds `selected_before/after` and `model_before/after` in bytes, `params_*` and
    `macs_*`. `evaluation` is None or {"data", "dense", "compressed", "generation"}, `training`
    what `rankfold pretrain` did, or None; `healing` what `rankfold adapt --heal` did, or None.
    """

    recipe: dict[str, Any]
    budget: float
    reached: float
    layers: list[LayerRow]
    skipped: list[SkippedRow] = field(default_factory=list)
    totals: dict[str, Any] = field(default_factory=dict)
    allocation: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, Any] = field(default_factory=dict)  # seconds
    versions: dict[str, Any] = field(default_factory=dict)
    unit: str = "nbytes"
    seed: int | None = None
    data: dict[str, Any] | None = None
    weights_hash: str = ""
    dtype: str = ""
    model: str = ""
    warnings: list[str] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    healing: dict[str, Any] | None = None

    # JSON

    def to_json(self) -> dict[str, Any]:
        """A plain dict that `json.dumps(..., allow_nan=False)` accepts; `from_json` is the inverse."""
        body = {f.name: getattr(self, f.name) for f in fields(self)}
        body["layers"] = [vars(row) for row in self.layers]
        body["skipped"] = [vars(row) for row in self.skipped]
        return {"format": FORMAT, **encode(body, "report")}

    @classmethod
    def from_json(cls, data: Any) -> Report:
        """The report that `to_json` wrote. ValueError for another format, or for a field that is missing,
        unknown or of the wrong type."""
        if not isinstance(data, Mapping) or "format" not in data:
            raise ValueError("This is not a rankfold report: it has no 'format' entry")
        version = data["format"]
        if version != FORMAT or isinstance(version, bool):
            remedy = (
                "Upgrade with: pip install -U rankfold"
                if isinstance(version, int) and version > FORMAT
                else "Write the report again with this version"
            )
            raise ValueError(
                f"The report has format {version!r} and this rankfold reads format {FORMAT}. {remedy}"
            )
        body = {key: value for key, value in data.items() if key != "format"}
        for key, row in (("layers", LayerRow), ("skipped", SkippedRow)):
            rows = body.get(key, [])
            if not isinstance(rows, list):
                raise ValueError(f"report: '{key}' must be a list, not {type(rows).__name__}")
            body[key] = [_read(row, item, f"report: {key}[{i}]") for i, item in enumerate(rows)]
        return _read(cls, body, "report")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write JSON to `path`, or to `path`/rankfold_report.json for a folder. Returns the file. The old
        file survives an interruption."""
        target = _file(path)
        text = json.dumps(self.to_json(), allow_nan=False, indent=1)
        with writing_file(target) as beside:
            beside.write_text(text + "\n", encoding="utf-8")
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read what `save` wrote. FileNotFoundError, or ValueError naming the file."""
        source = _file(path)
        if not source.is_file():
            raise FileNotFoundError(f"No report at {source}. A folder written by rankfold holds {FILE_NAME}")
        try:
            return cls.from_json(json.loads(source.read_text(encoding="utf-8")))
        except (
            ValueError,
            RecursionError,
        ) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            raise ValueError(f"{source}: {error}") from error

    # Renderings: each in its own module, imported when asked for

    def to_text(self, width: int | None = None, layers: bool = True) -> str:
        """Plain text, `width` columns (100 by default); `layers=False` leaves the per-layer table out."""
        from rankfold import report_text

        return report_text.plain(report_text.render(self, layers=layers), width)

    def print(self, console: Console | None = None, layers: bool = True) -> None:
        """Print to a rich console (standard output by default)."""
        from rankfold import report_text

        report_text.show(report_text.render(self, layers=layers), console)

    def to_html(self) -> str:
        """One self-contained page: no script, font, image or style is loaded from elsewhere."""
        from rankfold import report_html

        return report_html.page(self)

    def differences(self, other: Report) -> dict[str, Any]:
        """What differs between this report (before) and another (after), as plain JSON-able data."""
        from rankfold import report_facts

        return report_facts.differences(self, other)

    def diff(self, other: Report) -> Group:
        """The same as a rich renderable: `console.print(a.diff(b))`."""
        from rankfold import report_text

        return report_text.render_diff(self, other)


def _file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path


def encode(value: Any, where: str) -> Any:
    """`value` as strict JSON; TypeError naming `where` for what has no such form."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): encode(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise TypeError(f"{where} is a {type(value).__name__}, which has no JSON form")


def _decode(value: Any) -> Any:
    """Undo the words for numbers that are not finite, but never in somebody's text or in a file's name."""
    if isinstance(value, dict):
        return {key: item if key in ("generation", "data") else _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return _WORDS.get(value, value) if isinstance(value, str) else value


_NUMERIC = (
    "totals",
    "allocation",
    "timings",
    "evaluation",
    "training",
    "healing",
    "spectrum",
)  # containers that may hold such words


def _read(cls: type[Any], data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} must be an object, not {type(data).__name__}")
    known = {f.name: str(f.type) for f in fields(cls)}
    if unknown := sorted(set(data) - set(known)):
        raise ValueError(f"{where} has unknown fields {unknown}; known are {sorted(known)}")
    values = {}
    for name, value in data.items():
        kind = known[name]
        if kind == "float" or name in _NUMERIC:
            value = _decode(value)
        allowed = _KINDS.get(kind)
        if allowed and (isinstance(value, bool) or not isinstance(value, allowed)):
            raise ValueError(f"{where}: '{name}' must be {kind}, not {value!r:.60}")
        item = {"list[str]": (str,), "list[float]": (int, float), "tuple[int, ...]": (int,)}.get(kind)
        if item and (bad := [x for x in value if isinstance(x, bool) or not isinstance(x, item)]):
            raise ValueError(f"{where}: '{name}' must be {kind}, but holds {bad[0]!r:.60}")
        values[name] = value
    try:
        return cls(**values)
    except TypeError as error:  # a required field is missing: Python's message names it
        raise ValueError(f"{where}: {str(error).split('__init__() ')[-1]}") from error
