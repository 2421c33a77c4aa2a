"""Pictures of training: the loss, and the experts' load."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dbrx_fn.drawing.figure import add_grid, add_legend, color, new_figure, readable_on

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FEWEST_SMOOTHED = 10
"""With fewer batches, only single batches are drawn, and no mean."""
_HIGHEST_LOAD = 2.0
_LONGEST_BAR = 10
"""The most layers with a vertical colour bar beside them."""
_MOST_NUMBERED = 64
"""The most experts, and layers, with a number in each cell. With more, cells are too small."""


def draw_losses(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> "Figure":
    """Loss over steps: of single training batches (faint), their running mean, and the held-out text if measured.

    Args:
        runs: by name, the lines of each run's `metrics.jsonl`.

    Raises:
        InputError: if there is no matplotlib.
    """
    figure = new_figure(7, 4.4)
    axes = figure.subplots()
    for number, (name, lines) in enumerate(runs.items()):
        trained = [line for line in lines if "cross_entropy" in line]
        if trained:
            steps = [line["step"] for line in trained]
            losses = np.array([line["cross_entropy"] for line in trained], np.float64)
            axes.plot(
                steps, losses, color=color(number), alpha=0.3, linewidth=0.8, label=f"{name}: single training batches"
            )
            width = _window(len(losses))
            if width > 1:
                smooth = running_mean(losses, width)
                axes.plot(steps, smooth, color=color(number), linewidth=1.4, label=f"{name}: mean of {width} of them")
        seen = [line for line in lines if "held_out_nats_per_token" in line]
        if seen:
            nats = [line["held_out_nats_per_token"] for line in seen]
            steps = [line["step"] for line in seen]
            axes.plot(
                steps,
                nats,
                color=color(number),
                linestyle="--",
                marker="o",
                markersize=4,
                label=f"{name}: held-out text",
            )
    axes.set(xlabel="step", ylabel="nats per token")
    add_grid(axes)
    add_legend(figure, axes, columns=3 if len(runs) == 1 else 2)
    return figure


def running_mean(values: npt.NDArray[np.float64], width: int) -> npt.NDArray[np.float64]:
    """The mean of `width` (odd) neighbours around each value.

    There are fewer neighbours at the two ends. At the beginning, where losses fall steeply, the mean stays centred. At
    the end it takes all available values.
    """
    half = width // 2
    reaches = [min(index, half) for index in range(len(values))]
    return np.array([values[index - reach : index + reach + 1].mean() for index, reach in enumerate(reaches)])


def _window(batches: int) -> int:
    """The number of batches in a mean: a twentieth, at least 5, and odd."""
    return 1 if batches < _FEWEST_SMOOTHED else 2 * max(2, batches // 40) + 1


def draw_expert_load(expert_share: npt.ArrayLike) -> "Figure":
    """How often each expert of each layer was chosen, as a multiple of its fair share.

    Args:
        expert_share: `[layer expert]`, rows adding up to 1.

    Raises:
        InputError: if there is no matplotlib.
    """
    share = np.asarray(expert_share, np.float64)
    layers, experts = share.shape
    load = share * experts
    # Beyond these sizes cells become smaller.
    columns, rows = min(experts, _MOST_NUMBERED), min(layers, _MOST_NUMBERED)
    figure = new_figure(max(3.0, 1.5 + 0.5 * columns), max(2.6, 1.0 + 0.45 * rows))
    axes = figure.subplots()
    picture = axes.imshow(load, cmap="RdBu_r", vmin=0, vmax=_HIGHEST_LOAD, aspect="auto")
    if experts <= _MOST_NUMBERED and layers <= _MOST_NUMBERED:
        for (layer, expert), value in np.ndenumerate(load):
            red, green, blue, _ = picture.to_rgba(value)
            ink = readable_on((red, green, blue))
            axes.text(expert, layer, f"{value:.2f}", color=ink, ha="center", va="center", fontsize=7)
    axes.set(xlabel="expert", ylabel="layer", xticks=_ticks(experts), yticks=_ticks(layers))
    figure.colorbar(
        picture,
        label="times its fair share",
        extend="max" if load.max() > _HIGHEST_LOAD else "neither",
        shrink=min(1.0, _LONGEST_BAR / rows),
    )
    return figure


def _ticks(count: int) -> range:
    return range(0, count, -(-count // _MOST_NUMBERED))
