"""How values read: the same words in tables, in HTML and on the terminal."""

from __future__ import annotations

import math

ABSENT = "–"  # noqa: RUF001


def printable(text: str) -> str:
    """Return the text with every control, format and bidirectional character replaced: names come from outside."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def number(value: float | None, digits: int = 3) -> str:
    """Return the value with `digits` significant digits, a dash if it is missing or not finite."""
    if value is None or not math.isfinite(value):
        return ABSENT
    text = f"{value:#.{digits}g}".rstrip(".")
    return f"{value:,.0f}" if "e" in text and 1.0 <= abs(value) < 1e9 else text


def percent(value: float | None, digits: int = 1) -> str:
    """Return a share as percent, a dash if it is missing or not finite."""
    return ABSENT if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f} %"


def probability(value: float) -> str:
    """Return a probability as percent that never rounds to certainty."""
    if not 0.0 <= value <= 1.0:
        return ABSENT
    if value < 0.001:
        return "< 0.1 %"
    return "> 99.9 %" if value > 0.999 else percent(value)


def score(value: float) -> str:
    """Return a standardised score with its sign and one decimal."""
    return f"{value:+,.1f}" if math.isfinite(value) else ABSENT
