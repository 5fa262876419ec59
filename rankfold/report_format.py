"""How a report's numbers and names are written.

Decimal units (1 MB = 10^6 bytes), a dash for what is missing, the word for what is not finite, and no
character that could disturb a terminal or a page.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable
from typing import Any, TypeGuard

DASH = "–"


def known(value: Any) -> TypeGuard[int | float]:
    """Whether this is a number (which may still be NaN or infinite)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _special(value: Any) -> str | None:
    if not known(value):
        return DASH
    if math.isnan(value):
        return "NaN"
    return ("∞" if value > 0 else "-∞") if math.isinf(value) else None


def _scaled(value: float, units: tuple[str, ...]) -> str:
    for unit in units:
        if abs(value) < 999.5 or unit == units[-1]:
            digits = 0 if unit == units[0] else max(0, 2 - int(math.log10(abs(value))))
            return f"{value:.{digits}f} {unit}".rstrip()
        value /= 1000
    raise AssertionError


def size(value: Any) -> str:
    """Bytes: `1.23 MB`."""
    return _special(value) or _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def count(value: Any) -> str:
    """A number of things: `135 M`."""
    return _special(value) or _scaled(value, ("", "k", "M", "G", "T"))


def percent(value: Any, digits: int = 1, sign: bool = False) -> str:
    """A fraction: `79.9 %`."""
    return _special(value) or f"{100 * value:{'+' if sign else ''}.{digits}f} %"


def number(value: Any) -> str:
    """Four significant digits."""
    if special := _special(value):
        return special
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def seconds(value: Any) -> str:
    if special := _special(value):
        return special
    return (
        f"{value * 1000:.0f} ms"
        if value < 1
        else f"{value:.1f} s"
        if value < 120
        else f"{value / 60:.1f} min"
    )


def milliseconds(value: Any) -> str:
    return _special(value) or (f"{value:.4g} ms" if value < 10_000 else f"{value / 1000:.4g} s")


def shape(dims: Iterable[int]) -> str:
    return " × ".join(str(d) for d in dims)


def clean(text: Any) -> str:
    """Text from elsewhere made safe to show: control, direction-override and lone surrogate characters become
    U+FFFD, so that a name cannot move a terminal's cursor, reverse a line or break an encoding."""
    return "".join("\ufffd" if c not in "\n\t" and _unsafe(c) else c for c in str(text))


def _unsafe(c: str) -> bool:
    return (
        unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")
        or "\u202a" <= c <= "\u202e"
        or "\u2066" <= c <= "\u2069"
    )
