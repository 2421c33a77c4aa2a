"""A roofline: measured speeds below the machine's limits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dbrx_fn.benchmarks.inference import Figure as Measured
from dbrx_fn.drawing.figure import add_grid, add_legend, color, new_figure
from dbrx_fn.drawing.point_labels import PointLabel, label_points

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class RooflinePoint:
    """One measurement: its operations, bytes and seconds."""

    program: str
    label: str
    operations: int
    bytes: int
    seconds: float


def roofline_points(measured: Sequence[Measured]) -> list[RooflinePoint]:
    """A point for each measurement whose operations and bytes are counted."""
    return [
        RooflinePoint(
            one.program,
            f"{one.what} {one.tokens:,}" + (f" x {one.batch_text}" if one.what == "decode" else ""),
            one.operations,
            one.bytes,
            one.seconds,
        )
        for one in measured
        # The first token's work is that of a prefill, which has a point of its own.
        if one.what != "first token"
        if one.operations is not None and one.bytes is not None and one.seconds is not None
    ]


def draw_roofline(points: Sequence[RooflinePoint], operations_per_second: float, bytes_per_second: float) -> "Figure":
    """Operations per second over operations per byte, below the limits of the machine's two rates.

    Left of the roof's edge the bound is reading, right of it computing. Both scales are logarithmic.

    Args:
        points: at least one.
        operations_per_second: the machine's.
        bytes_per_second: the machine's.

    Raises:
        InputError: if there is no matplotlib.
    """
    figure = new_figure(9, 6.2)
    axes = figure.subplots()
    axes.set(xlabel="operations per byte", ylabel="operations per second", xscale="log", yscale="log")
    intensities = [point.operations / point.bytes for point in points]
    edge = operations_per_second / bytes_per_second
    roof = np.array([min(*intensities, edge) / 4, edge, max(*intensities, edge) * 4])
    bound = f"{bytes_per_second / 1e9:,.1f} GB/s, {operations_per_second / 1e12:,.3g} TFLOP/s"
    axes.plot(roof, np.minimum(roof * bytes_per_second, operations_per_second), color="black", linewidth=1, label=bound)
    labels = []
    for number, program in enumerate(dict.fromkeys(point.program for point in points)):
        shown = [point for point in points if point.program == program]
        x = [point.operations / point.bytes for point in shown]
        y = [point.operations / point.seconds for point in shown]
        axes.scatter(x, y, s=24, color=color(number), label=program)
        labels += [
            PointLabel(point.label, to_right, up, color(number))
            for point, to_right, up in zip(shown, x, y, strict=True)
        ]
    add_grid(axes)
    add_legend(figure, axes, columns=4)
    label_points(figure, {axes: labels})
    return figure
