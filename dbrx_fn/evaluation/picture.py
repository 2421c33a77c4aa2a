"""A picture of quantization's cost: KL divergence and perplexity over size."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dbrx_fn.drawing.figure import add_grid, add_legend, color, new_figure, wrapped
from dbrx_fn.drawing.point_labels import PointLabel, label_points

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class QuantizedModel:
    """One point. `kl_divergence` is from the original model, in nats."""

    label: str
    bits_per_weight: float
    kl_divergence: float
    perplexity: float
    quantized_router: bool


def draw_quantizations(models: Sequence[QuantizedModel], original: str, original_perplexity: float) -> "Figure":
    """KL divergence and perplexity of quantized models over their bits per weight, with their names.

    Models with quantized routers have another marker. The scale of KL divergences is logarithmic, so a divergence of 0
    (or below, by rounding) isn't drawn.

    Args:
        models: at least one.
        original: the name of the model to compare with.
        original_perplexity: its perplexity.

    Raises:
        InputError: if there is no matplotlib.
    """
    figure = new_figure(11, 6)
    left, right = figure.subplots(1, 2)
    left.set(xlabel="bits per weight", ylabel="KL divergence from the first, nats per token", yscale="log")
    right.set(xlabel="bits per weight", ylabel="perplexity")
    for number, (quantized, marker) in enumerate(((False, "o"), (True, "s"))):
        shown = [model for model in models if model.quantized_router == quantized]
        if not shown:
            continue
        bits = [model.bits_per_weight for model in shown]
        legend = "routers quantized" if quantized else "routers in high precision"
        divergences = [model.kl_divergence if model.kl_divergence > 0 else np.nan for model in shown]
        left.scatter(bits, divergences, s=24, marker=marker, color=color(number))
        right.scatter(
            bits, [model.perplexity for model in shown], s=24, marker=marker, color=color(number), label=legend
        )
    first = wrapped(f"the first: {original}")
    right.axhline(original_perplexity, color="black", linewidth=0.8, linestyle="--", label=first)
    for axes in (left, right):
        axes.margins(0.15, 0.15)
        add_grid(axes)
    add_legend(figure, right, columns=3)

    def label(model: QuantizedModel, value: float) -> PointLabel:
        return PointLabel(model.label, model.bits_per_weight, value, color(int(model.quantized_router)))

    label_points(
        figure,
        {
            left: [label(model, model.kl_divergence) for model in models if model.kl_divergence > 0],
            right: [label(model, model.perplexity) for model in models],
        },
    )
    return figure


def short_names(paths: Sequence[str]) -> list[str]:
    """The paths shortened to the fewest last parts that are all different."""
    parts = [os.path.abspath(path).split(os.sep) for path in paths]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(path[-count:]) for path in parts]
        if len(set(names)) == len(set(map(tuple, parts))):
            return names
    return list(paths)
