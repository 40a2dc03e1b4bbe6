"""Figures as people read them; the same in the terminal, in Markdown and in HTML."""

from __future__ import annotations

import math

NOTHING = "-"
"""Where a figure does not apply."""


def points(value: float | None) -> str:
    """A difference in points, with its sign."""
    if value is None:
        return NOTHING
    text = f"{value:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text


def percent(value: float | None, digits: int = 2) -> str:
    """Without the sign."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def short(value: float | None) -> str:
    """Five significant digits."""
    return NOTHING if value is None else f"{value:.5g}"


def decibel(value: float | None) -> str:
    """``∞`` where nothing differs."""
    return "∞" if value is None else f"{value:.1f}"


def similarity(value: float | None) -> str:
    """A cosine similarity."""
    return NOTHING if value is None else f"{value:.4f}"


def milliseconds(value: float) -> str:
    """Three significant digits, never in exponents."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(0, digits)}f}"


def rate(value: float) -> str:
    """Images per second, three significant digits, with separators."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


def size(value: int | None) -> str:
    """Bytes, in decimal units."""
    if value is None:
        return NOTHING
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.2f} {unit}"
    return f"{value} B"


def p_value(value: float) -> str:
    """Two or three digits."""
    return "<0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"
