"""OUT/report.html: the lines of an adaptation, its loss curve, and the confusion matrix of a classifier.

One file that loads nothing; names and texts in it come from elsewhere, so every string is escaped.
"""

from __future__ import annotations

from typing import Any

from rankfold.adapt.lines import lines, title
from rankfold.classify.scores import MOST
from rankfold.report_format import percent
from rankfold.report_plots import escape
from rankfold.report_style import CSS
from rankfold.report_training import drawn


def page(facts: dict[str, Any]) -> str:
    """The whole document."""
    name = escape(title(facts))
    went = facts["training"]
    unit = facts.get("of", "token")  # a text, an image
    curves = drawn("Training", lines(facts), went["train"], went["validation"], unit=unit)
    warned = "".join(f"<li>{escape(words)}</li>" for words in facts["warnings"])
    notes = f'<div class="warnings" role="note"><strong>Warnings</strong><ul>{warned}</ul></div>'
    classes = _classes(facts) if facts["task"] == "classification" else ""
    version = escape(f"rankfold {facts['versions'].get('rankfold', '')}".strip())
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<header>\n<h1>{name}</h1>\n</header>\n"
        f"{notes if warned else ''}\n{curves}\n{classes}\n<footer>Written by {version}. 1 MB = 10⁶ bytes."
        "</footer>\n</body>\n</html>\n"
    )


def _classes(facts: dict[str, Any]) -> str:
    """Scores by class, and the confusion matrix, of the set that was judged last: the test."""
    name, row = next(reversed(facts["metrics"].items()), ("", None))
    if row is None:
        return ""
    found = row["after"]
    rows = "".join(
        f'<tr><th scope="row">{escape(label)}</th>'
        + "".join(f"<td>{percent(one[key])}</td>" for key in ("precision", "recall", "f1"))
        + f"<td>{one['n']:,}</td></tr>"
        for label, one in found["classes"].items()
    )
    table = (
        '<div class="scroll"><table><thead><tr><th>class</th><th>precision</th><th>recall</th><th>F1</th>'
        f"<th>examples</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )
    labels = list(found["classes"])
    matrix = ""
    if len(labels) <= MOST:
        heads = "".join(f'<th scope="col">{escape(label)}</th>' for label in labels)
        body = "".join(
            f'<tr><th scope="row">{escape(label)}</th>{"".join(f"<td>{n:,}</td>" for n in counts)}</tr>'
            for label, counts in zip(labels, found["confusion"], strict=True)
        )
        matrix = (
            '<div class="scroll"><table><caption>Rows: what is true. Columns: what was predicted.</caption>'
            f"<thead><tr><th></th>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
        )
    return f"<section>\n<h2>Classes, {escape(name)}</h2>\n{table}\n{matrix}\n</section>"
