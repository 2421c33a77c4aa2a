"""Shared by all pictures: size, colours, legend, readable text on colours, and writing of files.

matplotlib draws them. It is an extra: `pip install 'dbrx-fn[pictures]'`.
"""

import io
import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from dbrx_fn.errors import InputError
from dbrx_fn.files.atomic import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#1f5fa8", "#b3480a", "#2a7a2a", "#8a2f8f", "#a61c2c", "#00707a", "#6b5300", "#444444")
"""Colours of runs, programs or kinds. All are dark enough for text on white (contrast of at least 4.5)."""

_DOTS_PER_INCH = 150
_LONGEST_LINE = 28


def check_matplotlib() -> None:
    """Raises `InputError` if matplotlib isn't installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("Pictures need matplotlib, which isn't installed: pip install 'dbrx-fn[pictures]'.") from None


def check_picture(file: Path) -> None:
    """Raises `InputError` if matplotlib isn't installed, or the name has no picture's ending."""
    check_matplotlib()
    if file.suffix not in (".png", ".svg"):
        raise InputError(f"{file} is not the name of a picture: end it with .png or .svg.")


def check_new_picture(file: Path) -> None:
    """Raises `InputError` as in `check_picture`, or if the file exists, or if its folder doesn't."""
    check_picture(file)
    if os.path.lexists(file):
        raise InputError(f"{file} exists already: name a new picture.")
    if not file.parent.is_dir():
        raise InputError(f"{file.parent} is not a folder: name a picture in one that exists.")


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of the given size in inches.

    Raises:
        InputError: if matplotlib isn't installed.
    """
    check_matplotlib()
    # pyplot would look for a screen.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout="constrained")


def color(number: int) -> str:
    """The colour of the run, program or kind with this number, from 0."""
    return COLORS[number % len(COLORS)]


def readable_on(background: tuple[float, float, float]) -> str:
    """Black or white, whichever has more contrast with a colour (red, green, blue; each 0 to 1)."""
    return "black" if luminance(background) > 0.179 else "white"


def luminance(rgb: tuple[float, float, float]) -> float:
    """Relative luminance of a colour (red, green, blue; each 0 to 1): 0 for black and 1 for white (WCAG 2.2).

    The contrast of two colours is (lighter + 0.05) / (darker + 0.05). Above 0.179, black has more contrast than white.
    """
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in rgb)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def wrapped(name: str) -> str:
    """A name of any length, wrapped into lines."""
    return "\n".join(textwrap.wrap(name, _LONGEST_LINE)) or name


def add_grid(axes: "Axes") -> None:
    """Adds faint grid lines in the background."""
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def add_legend(figure: "Figure", axes: "Axes", columns: int) -> None:
    """Adds a legend above the axes, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    for text in legend.get_texts():
        # A dollar sign in a name doesn't start mathematics.
        text.set_parse_math(False)


def write_picture(figure: "Figure", file: Path) -> None:
    """Writes a .png or .svg. The same figure makes the same file.

    Raises:
        InputError: if the name has another ending, or the file can't be written.
    """
    import matplotlib

    check_picture(file)
    kind = file.suffix.lstrip(".")
    drawn = io.BytesIO()
    # Without a date and random names, the same picture makes the same file.
    with matplotlib.rc_context({"svg.hashsalt": "dbrx_fn"}):
        figure.savefig(drawn, format=kind, metadata={"Date": None} if kind == "svg" else None)
    write_file(file, drawn.getvalue())
