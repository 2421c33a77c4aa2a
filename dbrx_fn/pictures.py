"""Pictures of a training run, drawn with matplotlib, which is an extra: `pip install 'dbrx-fn[pictures]'`."""

import io
from collections.abc import Mapping, Sequence
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


def _figure(width: float, height: float) -> "Figure":
    check_matplotlib()
    # Not pyplot, which looks for a screen.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _write(figure: "Figure", file: Path) -> None:
    import matplotlib

    kind = file.suffix.lstrip(".")
    if kind not in ("png", "svg"):
        raise InputError(f"{file} is no name of a picture: end it with .png or .svg.")
    drawn = io.BytesIO()
    # Without a date and with names that aren't random, the same picture is the same file.
    with matplotlib.rc_context({"svg.hashsalt": "dbrx_fn"}):
        figure.savefig(drawn, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    write_file(file, drawn.getvalue())
