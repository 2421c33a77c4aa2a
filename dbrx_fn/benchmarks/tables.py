"""Results as text: tables, times, large numbers."""

from collections.abc import Callable, Sequence
from typing import TypeVar

_Row = TypeVar("_Row")


def table(columns: dict[str, Callable[[_Row], str]], shown: Sequence[_Row]) -> str:
    """A header and a line for each row, with a column for each function of a row."""
    rows = [list(columns), *([show(one) for show in columns.values()] for one in shown)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def time_text(seconds: float | None) -> str:
    """A time with a unit, such as `8.40 ms`; nothing for `None`."""
    if seconds is None:
        return ""
    if seconds >= 1:
        return f"{seconds:,.2f} s"
    return f"{1e3 * seconds:,.2f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:,.2f} us"


def scaled(number: float) -> str:
    """Three digits and the prefix of a unit, such as `66.5 G`."""
    for prefix in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:,.3g} T"
