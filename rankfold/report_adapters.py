"""What a report says of adapters that were put beside the weights: what was added, and how to go on.

The facts are the totals `params_trained` and `bytes_added`, which only such a run has (`report_facts.kind`).
"""

from __future__ import annotations

from rankfold import report_training as trainings
from rankfold.report import Report
from rankfold.report_facts import kind
from rankfold.report_format import count, known, percent, size


def trained(report: Report) -> str:
    params = report.totals.get("params_trained")
    return f"{count(params)} parameters{_share(params, report.totals.get('params_before'))}"


def added(report: Report) -> str:
    nbytes = report.totals.get("bytes_added")
    return f"{size(nbytes)}{_share(nbytes, report.totals.get('model_before'))}"


def places(report: Report) -> str:
    """How many layers have one: those of tied weights share theirs, and count once."""
    number = sum(not row.dense for row in report.layers)
    return f"{number} layer{'' if number == 1 else 's'}"


def lines(report: Report) -> list[tuple[str, str]]:
    """(label, words) of everything that is one line; none for a report of anything else."""
    if kind(report) != "adapter":
        return []
    return [
        ("Adapters", f"on {places(report)}; the weights beside them are frozen"),
        ("Trainable", trained(report)),
        ("Added", added(report)),
        (
            "Load",
            "from_pretrained, or rankfold.load_ for a plain module; then rankfold.freeze_(model), since a "
            "loaded model trains as a whole. A folder of rankfold.save_adapter, which holds the adapters "
            "alone: rankfold.load_adapter_(base, folder)",
        ),
        (
            "Merge",
            "rankfold.merge_(model): the adapters become part of the weights, and what was added is gone",
        ),
    ]


def section(report: Report) -> str:
    """The part of the page."""
    return trainings.drawn("Adapters", lines(report), None, None) if kind(report) == "adapter" else ""


def _share(part: object, whole: object) -> str:
    return f" ({percent(part / whole, 2)} of the model's)" if known(part) and known(whole) and whole else ""
