"""`train --steps N --resume`: more steps for a run, and a `model/` that is always the last one's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dbrx_fn.runs.folder import RunFolder
from dbrx_fn.train import main
from dbrx_fn.training.step import Recipe, learning_rate
from tests.support.tiny_runs import arguments, contents, metrics, write_config, write_text

Begin = Callable[..., Path]


@pytest.fixture(scope="module")
def begin(tmp_path_factory: pytest.TempPathFactory) -> Begin:
    """Makes a run of the same text, finished."""
    folder = tmp_path_factory.mktemp("runs")
    config, text = write_config(folder / "config.json"), write_text(folder / "text.md")

    def run(steps: int, **options: Any) -> Path:
        out = folder / f"{steps}{sorted(options.items())}"
        if not out.exists():
            assert main(arguments(out, config, [text], steps=steps, eval_every=4, **options)) == 0
        return out

    return run


@pytest.fixture
def finished(begin: Begin, tmp_path: Path) -> Path:
    """One of 6 steps, to go on with."""
    return Path(shutil.copytree(begin(6), tmp_path / "run"))


def said(capsys: pytest.CaptureFixture[str], *command: object, status: int = 0) -> str:
    assert main([str(word) for word in command]) == status
    return capsys.readouterr().err


def rates(run: Path) -> list[float]:
    return [line["learning_rate"] for line in metrics(run) if "learning_rate" in line]


def test_more_steps_at_a_constant_rate_are_those_of_a_longer_run(
    begin: Begin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the last bit, and the model is the last step's."""
    options = {"schedule": "constant", "save_every": 2, "keep": 2}
    run = Path(shutil.copytree(begin(6, **options), tmp_path / "run"))
    first = contents(run / "model")
    said(capsys, "--out", run, "--resume", "--steps", 12)
    longer = begin(12, **options)
    for part in ("model", "checkpoints/step-00000012"):
        assert contents(run / part) == contents(longer / part)
    assert contents(run / "model") != first
    assert [line for line in metrics(run) if "learning_rate" in line] == [
        line for line in metrics(longer) if "learning_rate" in line
    ]
    assert RunFolder(run).saved_steps() == [10, 12]
    assert (run / "run.json").read_bytes() == (longer / "run.json").read_bytes()


def test_the_rate_is_from_there_on_that_of_the_longer_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = rates(finished)
    err = said(capsys, "--out", finished, "--resume", "--steps", 15)
    new = [learning_rate(Recipe(15), done) for done in range(6, 15)]
    assert rates(finished)[:6] == before
    assert rates(finished)[6:] == pytest.approx(new)
    assert (
        "15 steps in place of 6: the learning rate is from here on that of a run of 15 steps,"
        f" {new[0]:.3g} in step 7 after {before[-1]:.3g} in step 6" in err
    )
    # It is said where that began, and not again.
    assert "in place of" not in said(capsys, "--out", finished, "--resume")


def test_steps_in_run_json_are_as_the_option(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_hand = Path(shutil.copytree(finished, tmp_path / "by hand"))
    settings = json.loads((by_hand / "run.json").read_text())
    settings["recipe"]["steps"] = 9
    (by_hand / "run.json").write_text(json.dumps(settings))
    told = [
        line
        for command in (["--out", by_hand, "--resume"], ["--out", finished, "--resume", "--steps", 9])
        for line in said(capsys, *command).splitlines()
        if "in place of" in line
    ]
    assert len(told) == 2
    assert told[0] == told[1]
    for part in ("model", "checkpoints"):
        assert contents(by_hand / part) == contents(finished / part)


def test_an_unfinished_run_may_be_given_other_steps(
    finished: Path, begin: Begin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(begin(6, save_every=3), tmp_path / "unfinished"))
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    for steps, last in ((8, 8), (9, 9)):
        assert "in place of" in said(capsys, "--out", run, "--resume", "--steps", steps)
        assert RunFolder(run).saved_steps()[-1] == last
    # Where nothing is saved, no step has been made yet.
    shutil.rmtree(run / "checkpoints")
    assert "in place of" not in said(capsys, "--out", run, "--resume", "--steps", 6)
    assert contents(run / "model") == contents(finished / "model")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", 6], "--steps asks for 6 steps where 6 are done"),
        (["--steps", 5], "--steps asks for 5 steps where 6 are done"),
        (["--steps", 0], "steps is 0 where it must be at least 1"),
        (["--steps", 9, "--seed", 1], "--seed can't be changed in a run"),
    ],
)
def test_steps_that_can_not_be(
    options: list[object], words: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    assert words in said(capsys, "--out", finished, "--resume", *options, status=2)
    assert contents(finished) == before


def test_fewer_steps_in_run_json_than_are_done(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = json.loads((finished / "run.json").read_text())
    settings["recipe"]["steps"] = 5
    (finished / "run.json").write_text(json.dumps(settings))
    assert "run.json asks for 5 steps where 6 are done" in said(capsys, "--out", finished, "--resume", status=2)


@pytest.mark.parametrize("left", ["the model before", "nothing", "half a model"])
def test_a_run_that_was_killed_before_its_model_was_there(
    left: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its last checkpoint is, so the model is written when it is resumed."""
    before = Path(shutil.copytree(finished / "model", finished.parent / "before"))
    said(capsys, "--out", finished, "--resume", "--steps", 8)
    expected = contents(finished)
    shutil.rmtree(finished / "model")
    if left != "nothing":
        before.rename(finished / "model")
    if left == "half a model":
        (finished / "model" / "model.safetensors").unlink()
    said(capsys, "--out", finished, "--resume")
    assert contents(finished) == expected


def test_what_is_the_last_steps_is_left_as_it_is(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also what somebody has added or changed beside the weights."""
    (finished / "model" / "notes.txt").write_text("mine")
    (finished / "model" / "generation_config.json").write_text("{}")
    before = contents(finished)
    said(capsys, "--out", finished, "--resume")
    assert contents(finished) == before


def test_a_file_that_would_be_lost_is_named_before_the_first_step(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = finished / "model" / "notes.txt"
    mine.write_text("mine")
    before = contents(finished)
    assert f"{mine} is in the way of the run's model" in said(
        capsys, "--out", finished, "--resume", "--steps", 8, status=2
    )
    assert contents(finished) == before
    mine.unlink()
    said(capsys, "--out", finished, "--resume", "--steps", 8)
