"""What all pictures share: their size, colours and legend, what is readable on a colour, and how they become files.

They are drawn with matplotlib, which is an extra: `pip install 'dbrx-fn[pictures]'`.
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
"""One for each run, program or kind. All are dark enough to write in on white (contrast of at least 4.5)."""

_DOTS_PER_INCH = 150
_LONGEST_LINE = 28


def check_matplotlib() -> None:
    """Raises `InputError` if there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("Pictures need matplotlib, which isn't installed: pip install 'dbrx-fn[pictures]'.") from None


def check_picture(file: Path) -> None:
    """Raises `InputError` if there is no matplotlib, or a name is no picture's."""
    check_matplotlib()
    if file.suffix not in (".png", ".svg"):
        raise InputError(f"{file} is no name of a picture: end it with .png or .svg.")


def check_new_picture(file: Path) -> None:
    """Raises `InputError` as `check_picture`, and if the file exists or its folder doesn't."""
    check_picture(file)
    if os.path.lexists(file):
        raise InputError(f"{file} exists already: name a new picture.")
    if not file.parent.is_dir():
        raise InputError(f"{file.parent} is no folder: name a picture in one that exists.")


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches.

    Raises:
        InputError: if there is no matplotlib.
    """
    check_matplotlib()
    # Not pyplot, which looks for a screen.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout="constrained")


def color(number: int) -> str:
    """The colour of the run, program or kind with this number, from 0."""
    return COLORS[number % len(COLORS)]


def readable_on(background: tuple[float, float, float]) -> str:
    """Black or white, whichever stands out more from a colour (red, green, blue; each 0 to 1)."""
    return "black" if luminance(background) > 0.179 else "white"


def luminance(rgb: tuple[float, float, float]) -> float:
    """Relative luminance of a colour (red, green, blue; each 0 to 1): 0 for black and 1 for white (WCAG 2.2).

    The contrast of two colours is (lighter + 0.05) / (darker + 0.05). Above 0.179 that of black is the higher one.
    """
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in rgb)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def wrapped(name: str) -> str:
    """A name of any length, on as many lines as it needs."""
    return "\n".join(textwrap.wrap(name, _LONGEST_LINE)) or name


def add_grid(axes: "Axes") -> None:
    """Faint lines behind all else."""
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def add_legend(figure: "Figure", axes: "Axes", columns: int) -> None:
    """Says above the axes, where it covers nothing, what their labelled lines and points are."""
    handles, labels = axes.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    for text in legend.get_texts():
        # A dollar in a name isn't mathematics.
        text.set_parse_math(False)


def write_picture(figure: "Figure", file: Path) -> None:
    """Writes a .png or .svg; the same figure makes the same file.

    Raises:
        InputError: if the name is neither's, or the file can't be written.
    """
    import matplotlib

    check_picture(file)
    kind = file.suffix.lstrip(".")
    drawn = io.BytesIO()
    # Without a date and with names that aren't random, the same picture is the same file.
    with matplotlib.rc_context({"svg.hashsalt": "dbrx_fn"}):
        figure.savefig(drawn, format=kind, metadata={"Date": None} if kind == "svg" else None)
    write_file(file, drawn.getvalue())
