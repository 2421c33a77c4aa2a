"""Pictures of training runs, of what quantization costs, and of speed.

They are drawn with matplotlib, which is an extra: `pip install 'dbrx-fn[pictures]'`.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from dbrx_fn.atomic import write_file
from dbrx_fn.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


def draw_losses(runs: Mapping[str, Sequence[Mapping[str, Any]]], file: Path) -> None:
    """Loss curves over steps: training's cross-entropy and, where it was evaluated, the held-out text's.

    Args:
        runs: by name, the lines of each run's `metrics.jsonl`.
        file: a .png or .svg to write.

    Raises:
        InputError: if it is neither, it can't be written, or there is no matplotlib.
    """
    figure = _figure(7, 4)
    axes = figure.subplots()
    for number, (name, lines) in enumerate(runs.items()):
        color = f"C{number}"
        trained = [line for line in lines if "cross_entropy" in line]
        steps = [line["step"] for line in trained]
        axes.plot(
            steps, [line["cross_entropy"] for line in trained], color=color, alpha=0.45, label=f"{name}, training"
        )
        seen = [line for line in lines if "held_out_nats_per_token" in line]
        if seen:
            nats = [line["held_out_nats_per_token"] for line in seen]
            axes.plot([line["step"] for line in seen], nats, color=color, marker=".", label=f"{name}, held out")
    axes.set(xlabel="step", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    _write(figure, file)


def draw_expert_load(expert_share: ArrayLike, file: Path) -> None:
    """How often each expert of each layer was chosen, as a multiple of its fair share.

    Args:
        expert_share: `[layer expert]`, rows adding up to 1.
        file: a .png or .svg to write.

    Raises:
        InputError: if it is neither, it can't be written, or there is no matplotlib.
    """
    share = np.asarray(expert_share, np.float64)
    layers, experts = share.shape
    load = share * experts
    figure = _figure(1.5 + 0.5 * experts, 1.5 + 0.45 * layers)
    axes = figure.subplots()
    picture = axes.imshow(load, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
    for layer in range(layers):
        for expert in range(experts):
            axes.text(expert, layer, f"{load[layer, expert]:.2f}", ha="center", va="center", fontsize=7)
    axes.set(xlabel="expert", ylabel="layer", xticks=range(experts), yticks=range(layers))
    figure.colorbar(picture, label="times its fair share")
    _write(figure, file)


@dataclass(frozen=True)
class QuantizedModel:
    """One point of `draw_quantizations`; `kl_divergence` in nats, from the model that it was made of."""

    label: str
    bits_per_weight: float
    kl_divergence: float
    perplexity: float
    quantized_router: bool


def draw_quantizations(models: Sequence[QuantizedModel], original: str, original_perplexity: float, file: Path) -> None:
    """KL divergence and perplexity of quantized models over their bits per weight, each marked with its name.

    Those whose routers are quantized look different from the others. The scale of KL divergences is logarithmic, so one
    of 0 (or of less, by rounding) has no place there.

    Args:
        models: at least one.
        original: the name of what they were made of, or are compared with.
        original_perplexity: its perplexity.
        file: a .png or .svg to write.

    Raises:
        InputError: if it is neither, it can't be written, or there is no matplotlib.
    """
    figure = _figure(11, 6)
    left, right = figure.subplots(1, 2)
    kinds = (
        (False, "routers in high precision", "o", "C0", (5, 5), "left"),
        (True, "routers quantized", "s", "C1", (-5, -5), "right"),
    )
    for quantized, legend, marker, color, offset, side in kinds:
        shown = [model for model in models if model.quantized_router == quantized]
        if not shown:
            continue
        bits = [model.bits_per_weight for model in shown]
        for axes, values in (
            (left, [model.kl_divergence if model.kl_divergence > 0 else np.nan for model in shown]),
            (right, [model.perplexity for model in shown]),
        ):
            axes.scatter(bits, values, s=24, marker=marker, color=color, label=legend)
            for model, value in zip(shown, values, strict=True):
                if np.isfinite(value):
                    place = (model.bits_per_weight, value)
                    # Aslant, the names of neighbours don't lie upon each other.
                    aslant: dict[str, Any] = {"rotation": 45, "rotation_mode": "anchor", "ha": side, "va": "center"}
                    axes.annotate(
                        model.label, place, offset, textcoords="offset points", fontsize=7, color=color, **aslant
                    )
    right.axhline(original_perplexity, color="black", linewidth=0.8, linestyle="--", label=f"{original}, the first")
    left.set(xlabel="bits per weight", ylabel="KL divergence from the first, nats per token", yscale="log")
    right.set(xlabel="bits per weight", ylabel="perplexity")
    for axes in (left, right):
        axes.margins(0.15, 0.25)
        axes.grid(alpha=0.3)
    right.legend(frameon=False)
    _write(figure, file)


@dataclass(frozen=True)
class RooflinePoint:
    """One point of `draw_roofline`: what was done, in how many seconds."""

    program: str
    label: str
    operations: int
    bytes: int
    seconds: float


def draw_roofline(
    points: Sequence[RooflinePoint], operations_per_second: float, bytes_per_second: float, file: Path
) -> None:
    """Operations per second over operations per byte, below what the machine's two rates allow.

    Left of the roof's edge reading is the bound, right of it computing. Both scales are logarithmic.

    Args:
        points: at least one.
        operations_per_second: the machine's.
        bytes_per_second: the machine's.
        file: a .png or .svg to write.

    Raises:
        InputError: if it is neither, it can't be written, or there is no matplotlib.
    """
    figure = _figure(9, 6)
    axes = figure.subplots()
    intensities = [point.operations / point.bytes for point in points]
    edge = operations_per_second / bytes_per_second
    roof = np.geomspace(min(*intensities, edge) / 4, max(*intensities, edge) * 16, 200)
    bound = f"{bytes_per_second / 1e9:,.1f} GB/s, {operations_per_second / 1e12:,.3g} TFLOP/s"
    axes.plot(roof, np.minimum(roof * bytes_per_second, operations_per_second), color="black", linewidth=1, label=bound)
    for number, program in enumerate(dict.fromkeys(point.program for point in points)):
        shown = [point for point in points if point.program == program]
        x = [point.operations / point.bytes for point in shown]
        y = [point.operations / point.seconds for point in shown]
        axes.scatter(x, y, s=24, color=f"C{number}", label=program)
        # On two sides, the names of two programs' points don't lie upon each other.
        side: dict[str, Any] = {"xytext": (-5, 3), "ha": "right"} if number % 2 else {"xytext": (5, -9), "ha": "left"}
        for point, place in zip(shown, zip(x, y, strict=True), strict=True):
            axes.annotate(point.label, place, textcoords="offset points", fontsize=7, color=f"C{number}", **side)
    axes.set(xlabel="operations per byte", ylabel="operations per second", xscale="log", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    _write(figure, file)


def _figure(width: float, height: float) -> "Figure":
    check_matplotlib()
    # Not pyplot, which looks for a screen.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _write(figure: "Figure", file: Path) -> None:
    import matplotlib

    check_picture(file)
    kind = file.suffix.lstrip(".")
    drawn = io.BytesIO()
    # Without a date and with names that aren't random, the same picture is the same file.
    with matplotlib.rc_context({"svg.hashsalt": "dbrx_fn"}):
        figure.savefig(drawn, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    write_file(file, drawn.getvalue())
