"""Pictures: files of the kind that was asked for, the same for the same figures, showing all of them."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dbrx_fn.errors import InputError
from dbrx_fn.pictures import check_matplotlib, draw_expert_load, draw_losses

LINES: list[dict[str, Any]] = [
    *({"step": step, "cross_entropy": 6 / step} for step in range(1, 20)),
    *({"step": step, "held_out_nats_per_token": 6.5 / step} for step in (10, 19)),
]


def text(file: Path) -> str:
    """What an SVG says in words, which matplotlib leaves beside the glyphs as comments."""
    return " ".join(re.findall(r"<!-- (.*?) -->", file.read_text()))


def test_losses_of_several_runs(tmp_path: Path) -> None:
    draw_losses({"jitter": LINES, "none": LINES[:19]}, tmp_path / "loss.svg")
    words = text(tmp_path / "loss.svg")
    for label in ("step", "nats per token", "jitter, training", "jitter, held out", "none, training"):
        assert label in words
    assert "none, held out" not in words


def test_the_load_of_each_expert_is_written_in_its_place(tmp_path: Path) -> None:
    share = np.array([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0]])
    draw_expert_load(share, tmp_path / "load.svg")
    words = text(tmp_path / "load.svg")
    for load in (
        "0.40 0.80 1.20 1.60 1.00 1.00 1.00 1.00 4.00 0.00 0.00 0.00",
        "layer",
        "expert",
        "times its fair share",
    ):
        assert load in words


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (40, 16), (24, 64)])
def test_pictures_fit_a_screen_or_a_page(shape: tuple[int, int], tmp_path: Path) -> None:
    draw_expert_load(np.full(shape, 1 / shape[1]), tmp_path / "load.png")
    content = (tmp_path / "load.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    width, height = (int.from_bytes(content[place : place + 4]) for place in (16, 20))
    assert min(width, height) >= 200
    assert max(width, height) <= 6000


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_same_figures_are_the_same_file(kind: str, tmp_path: Path) -> None:
    for name in ("one", "other"):
        draw_losses({"model": LINES}, tmp_path / f"{name}.{kind}")
    assert (tmp_path / f"one.{kind}").read_bytes() == (tmp_path / f"other.{kind}").read_bytes()


def test_without_matplotlib_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'dbrx-fn\[pictures\]'"):
        check_matplotlib()
    with pytest.raises(InputError, match="matplotlib"):
        draw_losses({"model": LINES}, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


@pytest.mark.parametrize("name", ["loss", "loss.jpg", "loss.PDF", ".png"])
def test_files_that_are_no_picture_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no name of a picture: end it with \.png or \.svg\.$"):
        draw_losses({"model": LINES}, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
