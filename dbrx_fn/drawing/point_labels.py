"""Labels of a picture's points, placed so that none covers another label, a point or a line.

A label stands as near to its point as possible. If it could be taken for another point's, a thin line leads to it. If
the axes have no room, the figure grows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from dbrx_fn.drawing.figure import wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.text import Text

# Lengths in points, 72 to an inch.
_FONT_SIZE = 7
_MARKER = 4.0
"""Half the size of a marker, with room around it."""
_PADDING = 1.5
_STEP = 1.15
"""The ratio of successive distances at which room is looked for."""
_TURNS = 24
"""Number of directions in which room is looked for."""
_DETOUR = 40.0
"""How much further away a label may stand to keep its line off another point."""
_LAST = 1e6
"""A penalty above any distance, for places that are the last resort."""
_BESIDE = 9.0
"""The distance beyond which a line leads to the label."""
_GROWTH = 1.2
_GROWTHS_TO_UNCROSS = 2
"""How often a figure grows to keep thin lines from passing below labels."""

Boxes = npt.NDArray[np.float64]
"""`[box 4]`, or a single box `[4]`: left, bottom, right, top, in pixels."""
Points = npt.NDArray[np.float64]
"""`[point 2]`, or a single point `[2]`, in pixels."""


@dataclass(frozen=True)
class PointLabel:
    """A name, its point in the axes' own units, and its colour."""

    text: str
    x: float
    y: float
    color: str


def label_points(figure: "Figure", labels: Mapping["Axes", Sequence[PointLabel]]) -> None:
    """Writes all labels of a figure. Its size and layout must not change afterwards.

    Points and lines must be drawn before, so that they stay uncovered.
    """
    texts = {axes: [_text(axes, label) for label in of_axes] for axes, of_axes in labels.items()}
    for growths in count():
        # The layout moves axes, so places are chosen after it.
        figure.set_layout_engine("constrained")
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        may_cross = growths >= _GROWTHS_TO_UNCROSS
        places = [_places(axes, labels[axes], texts[axes], may_cross) for axes in labels]
        if None not in places:
            break
        width, height = figure.get_size_inches()
        figure.set_size_inches(width * _GROWTH, height * _GROWTH)
    for axes, boxes in zip(labels, cast(list[list[Boxes]], places), strict=True):
        _put(axes, labels[axes], texts[axes], boxes)


def _text(axes: "Axes", label: PointLabel) -> "Text":
    text = axes.text(
        label.x,
        label.y,
        wrapped(label.text),
        fontsize=_FONT_SIZE,
        color=label.color,
        ha="center",
        va="center",
        multialignment="left",
        # A dollar in a name isn't mathematics.
        parse_math=False,
        bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.5},
    )
    # The label stays within the axes, so the layout can ignore it.
    text.set_in_layout(False)
    return text


def _put(axes: "Axes", labels: Sequence[PointLabel], texts: Sequence["Text"], boxes: Sequence[Boxes]) -> None:
    to_data = axes.transData.inverted()
    points = _pixel_points(axes, labels)
    for label, text, box, point in zip(labels, texts, boxes, points, strict=True):
        (x, y), (end_x, end_y), (text_x, text_y) = to_data.transform(
            [point, _nearest(box, point), (box[:2] + box[2:]) / 2]
        )
        text.set_position((text_x, text_y))
        distances = np.hypot(*(points - _nearest(box, points)).T)
        own = np.hypot(*(point - _nearest(box, point)))
        # If several points are about equally near, a reader can't tell which is meant.
        if own > _pixels(axes, _BESIDE) or np.sum(distances < 1.5 * own) > 1:
            axes.plot([x, end_x], [y, end_y], color=label.color, linewidth=0.5, scalex=False, scaley=False)


def _places(axes: "Axes", labels: Sequence[PointLabel], texts: Sequence["Text"], may_cross: bool) -> list[Boxes] | None:
    """The box of each label, or `None` if there isn't room for all.

    Args:
        axes: the labels' axes.
        labels: the labels to place.
        texts: the drawn labels.
        may_cross: whether lines may pass below other labels as a last resort.
    """
    points = _pixel_points(axes, labels)
    markers = np.concatenate([points - _pixels(axes, _MARKER), points + _pixels(axes, _MARKER)], axis=-1)
    starts, ends = _segments(axes.lines)
    places: list[Boxes] = []
    for number, (point, text) in enumerate(zip(points, texts, strict=True)):
        extent = text.get_window_extent()
        size = np.array([extent.width, extent.height]) + 2 * _pixels(axes, _PADDING)
        boxes, distances = _candidates(axes, point, size)
        taken = np.concatenate([markers, *(place[None] for place in places)])
        free = ~_overlap(boxes, taken).any(axis=1) & ~_meet(starts, ends, boxes).any(axis=0)
        boxes, distances = boxes[free], distances[free]
        # The thin lines to the labels so far, and to this one.
        names, end = np.array(places).reshape(-1, 4), _nearest(boxes, point)
        under = _meet(points[:number], _nearest(names, points[:number]), boxes).any(axis=0)
        under |= _meet(point, end, names).any(axis=1)
        through_points = _meet(point, end, np.delete(markers, number, axis=0)).any(axis=1)
        cost = distances + _DETOUR * through_points + np.where(under, _LAST if may_cross else np.inf, 0.0)
        if not np.isfinite(cost).any():
            return None
        places.append(boxes[np.argmin(cost)])
    return places


def _candidates(axes: "Axes", point: Points, size: Points) -> tuple[Boxes, npt.NDArray[np.float64]]:
    """Boxes within the axes around a point, and their distances from it, in points.

    The nearest come first; at equal distance, those at the point's sides.
    """
    inside = axes.get_window_extent()
    furthest = np.hypot(inside.width, inside.height) / _pixels(axes, 1)
    distances = _MARKER * _STEP ** np.arange(np.log(furthest / _MARKER) / np.log(_STEP))
    turns = np.array(sorted(range(_TURNS), key=lambda turn: (turn % 12 != 0, turn % 6 != 0, turn))) * 2 * np.pi / _TURNS
    directions = np.stack([np.cos(turns), np.sin(turns)], axis=-1)
    # The distance is that of the box's nearest side, not of its centre.
    centers = point + directions * (_pixels(axes, 1) * distances[:, None, None] + size / 2)
    boxes = np.concatenate([centers - size / 2, centers + size / 2], axis=-1).reshape(-1, 4)
    within = np.all((boxes[:, :2] >= inside.min) & (boxes[:, 2:] <= inside.max), axis=-1)
    return boxes[within], np.repeat(distances, _TURNS)[within]


def _overlap(boxes: Boxes, others: Boxes) -> npt.NDArray[np.bool_]:
    """`[box other]`: whether two boxes overlap."""
    apart = (boxes[:, None, :2] >= others[:, 2:]) | (boxes[:, None, 2:] <= others[:, :2])
    return cast(npt.NDArray[np.bool_], ~apart.any(axis=-1))


def _meet(starts: Points, ends: Points, boxes: Boxes) -> npt.NDArray[np.bool_]:
    """`[line box]`: whether the straight line from a start to an end crosses a box."""
    way = ends - starts
    # The fractions of the way at which the line enters and leaves the strip between two parallel sides.
    way = np.where(way == 0, 1e-9, way)[:, None]
    start = np.broadcast_to(starts, ends.shape)[:, None]
    sides = np.stack([(boxes[:, :2] - start) / way, (boxes[:, 2:] - start) / way])
    enters, leaves = sides.min(axis=0).max(axis=-1), sides.max(axis=0).min(axis=-1)
    return cast(npt.NDArray[np.bool_], (enters < leaves) & (enters < 1) & (leaves > 0))


def _segments(lines: Sequence["Line2D"]) -> tuple[Points, Points]:
    """Starts and ends of the straight segments of drawn lines."""
    corners = [np.asarray(line.get_transform().transform(line.get_xydata())) for line in lines]
    starts, ends = ([np.empty((0, 2)), *(part[side] for part in corners)] for side in (slice(-1), slice(1, None)))
    return np.concatenate(starts), np.concatenate(ends)


def _nearest(boxes: Boxes, points: Points) -> Points:
    """The point of each box that is nearest to a given point."""
    return np.clip(points, boxes[..., :2], boxes[..., 2:])


def _pixel_points(axes: "Axes", labels: Sequence[PointLabel]) -> Points:
    return np.array(axes.transData.transform([(label.x, label.y) for label in labels])).reshape(-1, 2)


def _pixels(axes: "Axes", points: float) -> float:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return points * figure.dpi / 72
