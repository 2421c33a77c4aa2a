"""Pictures: all that is written on them can be read, they show what was measured, and are the same again."""

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dbrx_fn.benchmarks.roofline import RooflinePoint, draw_roofline
from dbrx_fn.drawing.figure import check_matplotlib, luminance, write_picture
from dbrx_fn.errors import InputError
from dbrx_fn.evaluation.picture import QuantizedModel, draw_quantizations
from dbrx_fn.runs.pictures import draw_expert_load, draw_losses, running_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

LINES: list[dict[str, Any]] = [
    *({"step": step, "cross_entropy": 6 / step} for step in range(1, 20)),
    *({"step": step, "held_out_nats_per_token": 6.5 / step} for step in (10, 19)),
]
LONG = "a-folder-whose-name-says-all-there-is-to-say-of-its-quantization-" * 3


def losses(runs: int, batches: int) -> "Figure":
    noise = np.random.default_rng(0)

    def lines(best: float) -> list[dict[str, Any]]:
        steps = range(1, batches + 1)
        return [
            *({"step": 10 * n, "cross_entropy": best + 6 / n + noise.normal(0, 0.1)} for n in steps),
            *({"step": 10 * n, "held_out_nats_per_token": best + 1 + 6 / n} for n in steps[4::5]),
        ]

    return draw_losses({f"run {number}": lines(2 + 0.4 * number) for number in range(runs)})


def load(layers: int, experts: int) -> "Figure":
    """Of routers that send many experts nothing and some far more than their share."""
    return draw_expert_load(np.random.default_rng(0).dirichlet(np.full(experts, 0.3), layers))


def quantizations(count: int, name: str, spread: float, worst: float) -> "Figure":
    """`count` models in both kinds, whose sizes are apart by `spread` bits."""
    models = [
        QuantizedModel(
            f"{name}{number}", 4 + spread * number, 0.02 + 1e-3 * spread * number, 45.5 + spread, number % 2 == 0
        )
        for number in range(count)
    ]
    models.append(QuantizedModel(f"{name}last", 3.0, 0.7, worst, False))
    return draw_quantizations(models, name + "first", 45.4)


def roofline(programs: int, contexts: tuple[int, ...], batch_sizes: tuple[int, ...]) -> "Figure":
    """Like DBRX in 4 bits on an H100."""
    points = []
    for number in range(programs):
        program, slower = f"program {number}", 1 + number
        for context in contexts:
            work = 72 * 10**9 * context, 74 * 10**9
            points.append(RooflinePoint(program, f"prefill {context:,}", *work, (0.03 + context / 7000) * slower))
            for batch_size in batch_sizes:
                read = (20 + 7 * (batch_size - 1) ** 0.6 + batch_size * context * 1.6e-4) * 1e9
                name = f"decode {context:,} x {batch_size}"
                work = 72 * 10**9 * batch_size, round(read)
                points.append(RooflinePoint(program, name, *work, read / 2.6e12 * slower))
    return draw_roofline(points, 790e12, 3e12)


DRAWN: dict[str, Callable[[], "Figure"]] = {
    "the loss of a run": lambda: losses(1, 190),
    "losses of three runs": lambda: losses(3, 190),
    "a single batch": lambda: losses(1, 1),
    "no batch": lambda: draw_losses({"run": []}),
    "loads of one expert": lambda: load(1, 1),
    "loads of one layer": lambda: load(1, 16),
    "loads of 40 layers": lambda: load(40, 16),
    "loads of 40 layers of one expert": lambda: load(40, 1),
    "loads of 64 experts": lambda: load(16, 64),
    "loads of more experts than fit": lambda: load(3, 300),
    "one model": lambda: quantizations(0, "affine-", 0, 75),
    "models like those of the docs": lambda: quantizations(13, "affine-4-router-", 0.35, 75),
    "models in one place": lambda: quantizations(12, "mxfp4-router-", 0, 46),
    "many models with long names": lambda: quantizations(24, LONG, 0.001, 46),
    "names that look like mathematics": lambda: quantizations(2, "_a$b_{c$ ", 1, 46),
    "one point below the roof": lambda: roofline(1, (512,), ()),
    "a usual roofline": lambda: roofline(1, (256, 1024), (1, 8)),
    "a roofline of two programs": lambda: roofline(2, (128, 2048, 16384), (1, 8, 32)),
    "a crowded roofline": lambda: roofline(3, (100, 101, 102), (1, 2, 3)),
}


@functools.cache
def drawn(name: str) -> "Figure":
    figure = DRAWN[name]()
    figure.draw_without_rendering()
    return figure


def written(figure: "Figure") -> "list[Text]":
    """All that is written on a picture."""
    from matplotlib.text import Text

    # Ticks beyond the axes have texts too, which aren't drawn.
    beyond = {
        id(text)
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        for text in (tick.label1, tick.label2)
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    texts = figure.findobj(Text)
    return [text for text in texts if text.get_visible() and text.get_text() and id(text) not in beyond]


@pytest.mark.parametrize("name", DRAWN)
def test_nothing_written_lies_on_another_or_beyond_the_edge(name: str) -> None:
    texts = written(drawn(name))
    boxes = np.array([text.get_window_extent().extents for text in texts])
    apart = (boxes[:, None, :2] >= boxes[:, 2:]) | (boxes[:, None, 2:] <= boxes[:, :2])
    pairs = np.argwhere(np.triu(~apart.any(axis=-1), k=1))
    assert [(texts[one].get_text(), texts[other].get_text()) for one, other in pairs] == []
    inside = (boxes >= 0).all(axis=-1) & (boxes[:, 2:] <= drawn(name).bbox.size).all(axis=-1)
    assert [texts[index].get_text() for index in np.flatnonzero(~inside)] == []


@pytest.mark.parametrize("name", [name for name in DRAWN if "model" in name or "roof" in name])
def test_every_point_has_a_name_and_no_name_covers_one(name: str) -> None:
    for axes in drawn(name).axes:
        places = np.concatenate(
            [axes.transData.transform(np.asarray(marks.get_offsets())) for marks in axes.collections]
        )
        places = places[np.isfinite(places).all(axis=-1)]
        assert len(axes.texts) == len(places) > 0
        assert not any(text.get_window_extent().contains(*place) for text in axes.texts for place in places)


@pytest.mark.parametrize("name", DRAWN)
def test_everything_written_stands_out_from_what_is_behind_it(name: str) -> None:
    """A contrast of 4.5 is what WCAG asks for small text."""
    from matplotlib.colors import to_rgb

    for text in written(drawn(name)):
        behind = (1.0, 1.0, 1.0)
        if text.axes is not None and text.axes.images and text in text.axes.texts:
            (image,) = text.axes.images
            column, row = (round(float(place)) for place in text.get_position())
            red, green, blue, _ = image.to_rgba(np.asarray(image.get_array())[row, column])
            behind = (red, green, blue)
        dark, light = sorted((luminance(behind), luminance(to_rgb(text.get_color()))))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, text.get_text()


@pytest.mark.parametrize("name", DRAWN)
def test_pictures_fit_a_page(name: str) -> None:
    width, height = drawn(name).bbox.size
    assert min(width, height) >= 200
    assert max(width, height) <= 6000


def test_a_png_has_the_figure_in_its_size(tmp_path: Path) -> None:
    figure = drawn("loads of one layer")
    write_picture(figure, tmp_path / "picture.png")
    content = (tmp_path / "picture.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    size = [int.from_bytes(content[place : place + 4]) for place in (16, 20)]
    assert size == pytest.approx(figure.bbox.size, abs=1)


def test_a_name_on_several_lines_is_whole() -> None:
    texts = [text.get_text().replace("\n", "") for text in written(quantizations(1, LONG, 1, 46))]
    assert f"{LONG}last" in texts
    assert f"the first: {LONG}first" in texts


def test_the_load_of_each_expert_is_written_in_its_place(tmp_path: Path) -> None:
    share = np.array([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0]])
    words = text(draw_expert_load(share), tmp_path)
    for load in (
        "0.40 0.80 1.20 1.60 1.00 1.00 1.00 1.00 4.00 0.00 0.00 0.00",
        "layer",
        "expert",
        "times its fair share",
    ):
        assert load in words


def text(figure: "Figure", folder: Path) -> str:
    """What an SVG says in words, which matplotlib leaves beside the glyphs as comments."""
    write_picture(figure, folder / "picture.svg")
    return " ".join(re.findall(r"<!-- (.*?) -->", (folder / "picture.svg").read_text()))


def test_losses_are_named_for_what_they_are(tmp_path: Path) -> None:
    words = text(draw_losses({"jitter": LINES, "none": LINES[:5]}), tmp_path)
    for label in (
        "step",
        "nats per token",
        "jitter: single training batches",
        "jitter: mean of 5 of them",
        "jitter: held-out text",
        "none: single training batches",
    ):
        assert label in words
    assert "none: mean" not in words
    assert "none: held-out" not in words


def test_single_batches_are_faint_behind_their_running_mean() -> None:
    (axes,) = losses(1, 190).axes
    single, mean, held_out = axes.lines
    assert 0 < (single.get_alpha() or 1) < 0.5
    assert mean.get_alpha() is None
    assert single.get_zorder() <= mean.get_zorder()
    noise, smooth = (np.abs(np.diff(np.asarray(line.get_ydata())[50:])).mean() for line in (single, mean))
    assert smooth < noise / 3
    assert np.asarray(held_out.get_xdata()).tolist() == list(range(50, 1901, 50))


def test_a_running_mean_is_of_the_neighbours_there_are() -> None:
    values = np.array([8.0, 4.0, 0.0, 2.0, 4.0, 6.0])
    assert running_mean(values, 3).tolist() == [8.0, 4.0, 2.0, 2.0, 4.0, 5.0]
    assert running_mean(values[:1], 5).tolist() == [8.0]


@pytest.mark.parametrize("kind", ["png", "svg"])
@pytest.mark.parametrize("drawn", ["the loss of a run", "a usual roofline"])
def test_the_same_figures_are_the_same_file(drawn: str, kind: str, tmp_path: Path) -> None:
    for file in ("one", "other"):
        write_picture(DRAWN[drawn](), tmp_path / f"{file}.{kind}")
    assert (tmp_path / f"one.{kind}").read_bytes() == (tmp_path / f"other.{kind}").read_bytes()


def test_without_matplotlib_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'dbrx-fn\[pictures\]'"):
        check_matplotlib()
    with pytest.raises(InputError, match="matplotlib"):
        draw_losses({"model": LINES})


@pytest.mark.parametrize("name", ["loss", "loss.jpg", "loss.PDF", ".png"])
def test_files_that_are_no_picture_are_refused(name: str, tmp_path: Path) -> None:
    figure = draw_losses({"model": LINES})
    with pytest.raises(InputError, match=r"is not the name of a picture: end it with \.png or \.svg\.$"):
        write_picture(figure, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
