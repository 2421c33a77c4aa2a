"""A serving benchmark's figures as a table, as JSON's objects, and as a picture."""

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dbrx_fn.benchmarks.serving import Percentiles, ServingFigure
from dbrx_fn.benchmarks.serving_run import Measured
from dbrx_fn.benchmarks.tables import table, time_text
from dbrx_fn.drawing.figure import add_grid, add_legend, color, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def serving_text(measured: Measured) -> str:
    """What was measured, a table of the loads, and why requests failed."""
    endpoint, workload, limits = measured.endpoint, measured.workload, measured.limits
    columns: dict[str, Callable[[ServingFigure], str]] = {
        "load": lambda f: str(f.load),
        "requests": lambda f: str(f.requests),
        "failed": lambda f: str(f.failed),
        "tokens/s": lambda f: f"{f.tokens_per_second:,.1f}",
        "first token": lambda f: _times(f.first_token),
        "between tokens": lambda f: _times(f.between_tokens),
        "good": lambda f: f"{100 * f.good / f.requests:.0f}%",
        "good/s": lambda f: f"{f.good_per_second:.2f}",
        "in flight": lambda f: f"{f.in_flight:.1f}",
        "waiting": lambda f: "" if f.waiting is None else f"{f.waiting:.1f}, {f.most_waiting}",
        "rows filled": lambda f: "" if f.rows_filled is None else f"{100 * f.rows_filled:.0f}%",
    }
    spread = f", lognormal with spread {workload.spread:g}" if workload.spread else ""
    ends = "whole answers" if "ignore_eos" in endpoint.options else "answers may end earlier"
    return "\n".join(
        [
            f"{measured.server}: prompts of {workload.prompt} tokens, answers of {workload.answer}{spread}; {ends};"
            f" temperature {endpoint.temperature:g}, seed {workload.seed}",
            f"first token and between tokens: percentiles 50, 90, 99; good: first within {time_text(limits.first)}, no"
            f" longer than {time_text(limits.between)} between",
            table(columns, measured.figures),
            *(
                f"failed: {f.load}: {count} x {reason}"
                for f in measured.figures
                for reason, count in f.failures.items()
            ),
            *(
                f"warning: {f.load}: a request was sent {time_text(f.latest)} late, as the benchmark's own process was"
                " too busy"
                for f in measured.figures
                if f.latest > 0.1
            ),
        ]
    )


def serving_object(measured: Measured) -> dict[str, Any]:
    """All that was measured, for JSON."""
    endpoint = measured.endpoint
    return {
        "server": {
            "name": measured.server,
            "model": endpoint.model,
            "temperature": endpoint.temperature,
            "options": endpoint.options,
            "words_per_token": endpoint.words_per_token,
        },
        "workload": asdict(measured.workload),
        "limits": asdict(measured.limits),
        "figures": [asdict(figure) for figure in measured.figures],
    }


def draw_serving(measured: Measured) -> "Figure":
    """Plots latencies and tokens per second over the loads, which must be all rates or all numbers of clients.

    Raises:
        InputError: if there is no matplotlib.
    """
    figures = measured.figures
    by_rate = figures[0].load.rate is not None
    x = [f.load.rate if by_rate else f.load.clients for f in figures]
    figure = new_figure(11, 4)
    first, between, speed = figure.subplots(1, 3)
    for number, name in enumerate(("p50", "p90", "p99")):
        for axes, percentiles in (
            (first, [f.first_token for f in figures]),
            (between, [f.between_tokens for f in figures]),
        ):
            y = [float("nan") if p is None else 1e3 * getattr(p, name) for p in percentiles]
            axes.plot(x, y, marker="o", markersize=4, color=color(number), label=f"{name[1:]}th percentile")
    speed.plot(x, [f.tokens_per_second for f in figures], marker="o", markersize=4, color=color(0))
    for axes, title in (
        (first, "time to first token, ms"),
        (between, "time between tokens, ms"),
        (speed, "tokens/s in all"),
    ):
        axes.set(xlabel="requests/s" if by_rate else "clients", ylim=(0, None))
        axes.set_title(title, fontsize=10)
        add_grid(axes)
    figure.supxlabel(measured.server, fontsize=9, parse_math=False)
    add_legend(figure, first, columns=3)
    return figure


def _times(percentiles: Percentiles | None) -> str:
    if percentiles is None:
        return ""
    return " ".join(f"{1e3 * seconds:,.0f}" for seconds in (percentiles.p50, percentiles.p90, percentiles.p99)) + " ms"
