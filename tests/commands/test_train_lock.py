"""Two processes never write to one run, set-up, tokenizer or checkpoint, and what a killed one left is cleaned up."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from dbrx_fn import train, train_tokenizer
from dbrx_fn.checkpoints.config_file import config_from_dict
from dbrx_fn.checkpoints.loader import load
from dbrx_fn.checkpoints.saver import save
from dbrx_fn.errors import InputError
from dbrx_fn.files.atomic import new_folder
from dbrx_fn.files.file_lock import folder_claimed, locked
from dbrx_fn.model.params import init_params
from dbrx_fn.runs.folder import RunFolder
from tests.support.tiny_runs import TINY, arguments, contents, write_config, write_text

Command = Callable[[list[str]], int]


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """Arguments of a short run in `place/run`, whose set-up takes a while."""
    (tmp_path / "place").mkdir()
    config, text = write_config(tmp_path / "config.json"), write_text(tmp_path / "text.md", 20_000)
    return arguments(tmp_path / "place" / "run", config, [text], steps=2)


@pytest.fixture
def stopped(tmp_path: Path, given: list[str]) -> Iterator["subprocess.Popen[str]"]:
    """A process of that run that stands still in its set-up."""
    hidden = tmp_path / "place" / ".run-set-up"
    process = subprocess.Popen([sys.executable, "-m", "dbrx_fn.train", *given], stderr=subprocess.PIPE, text=True)
    while not (hidden / "tokenizer").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)
    yield process
    process.kill()
    process.communicate()


def refused(capsys: pytest.CaptureFixture[str], main: Command, command: list[str]) -> str:
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err.removeprefix("error: ").strip()


def test_a_second_set_up_is_refused_and_the_first_ends_well(
    stopped: "subprocess.Popen[str]", given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "place"
    before = contents(place)
    said = refused(capsys, train.main, given)
    assert said == f"{place / 'run'} is being set up by another process: wait until it ends, or name another --out."
    assert contents(place) == before
    stopped.send_signal(signal.SIGCONT)
    assert stopped.wait(timeout=100) == 0
    assert [entry.name for entry in place.iterdir()] == ["run"]
    assert "holds a run already" in refused(capsys, train.main, given)


def test_a_set_up_that_was_killed_is_in_nobodys_way(
    stopped: "subprocess.Popen[str]", given: list[str], tmp_path: Path
) -> None:
    stopped.kill()
    stopped.wait()
    place = tmp_path / "place"
    assert [entry.name for entry in place.iterdir()] == [".run-set-up"]
    assert train.main(given) == 0
    assert [entry.name for entry in place.iterdir()] == ["run"]


def test_what_no_set_up_wrote_is_refused_and_stays(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden = tmp_path / "place" / ".run-set-up"
    hidden.mkdir()
    (hidden / "notes.txt").write_text("mine")
    (hidden / "data").mkdir()
    before = contents(tmp_path)
    assert f"{hidden / 'notes.txt'} is in the way and no run wrote it" in refused(capsys, train.main, given)
    assert contents(tmp_path) == before
    assert (hidden / "data").exists()


def test_links_in_a_set_ups_place_lead_nowhere(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victim, hidden = tmp_path / "victim", tmp_path / "place" / ".run-set-up"
    for name in ("data/train", "tokenizer", "checkpoints"):
        (victim / name).mkdir(parents=True)
        (victim / name / "run.json").write_text("precious")
    before = contents(victim)
    hidden.symlink_to(victim)
    assert "place/run can't be written" in refused(capsys, train.main, given)
    assert contents(victim) == before
    hidden.unlink()
    hidden.mkdir()
    (hidden / "data").symlink_to(victim / "data")
    (hidden / "tokenizer").symlink_to(victim / "tokenizer")
    (hidden / ".tokenizer-0123abcd.unfinished").symlink_to(victim)
    assert train.main(given) == 0
    assert contents(victim) == before


@pytest.mark.parametrize("part", ["checkpoints", "model", "metrics.jsonl", "data", "tokenizer", "run.json"])
def test_a_run_is_not_written_through_links(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, text, out = write_config(tmp_path / "config.json"), write_text(tmp_path / "text.md"), tmp_path / "run"
    assert train.main(arguments(out, config, [text], steps=1)) == 0
    capsys.readouterr()
    (out / part).rename(tmp_path / "elsewhere")
    (out / part).symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path)
    said = refused(capsys, train.main, ["--out", str(out), "--resume", "--steps", "3"])
    assert said == f"{out / part} is a link, which no run writes through: put what it leads to in its place."
    assert contents(tmp_path) == before


def test_a_run_that_is_being_trained_is_not_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By another process, which is stopped in the midst of it; the run may have been renamed meanwhile."""
    config, text, out = write_config(tmp_path / "config.json"), write_text(tmp_path / "text.md"), tmp_path / "run"
    command = arguments(out, config, [text], steps=100_000, log_every=1)
    process = subprocess.Popen([sys.executable, "-m", "dbrx_fn.train", *command], stderr=subprocess.DEVNULL)
    try:
        while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").stat().st_size < 1000:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        moved = out.rename(tmp_path / "moved")
        said = refused(capsys, train.main, ["--out", str(moved), "--resume"])
        assert said == f"{moved} is being trained by another process: wait until it ends."
    finally:
        process.kill()
        process.wait()
    assert train.main(["--out", str(moved), "--resume", "--steps", "3"]) == 0


def rivals(count: int, attempt: Callable[[int], None]) -> list[Exception | None]:
    """How attempts from threads of the same moment ended."""
    ended: list[Exception | None] = [None] * count
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        barrier.wait()
        try:
            attempt(number)
        except Exception as error:
            ended[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ended


def test_of_many_that_set_a_run_up_one_does(tmp_path: Path) -> None:
    """Whoever comes second finds it taken, or finds the run."""
    for turn in range(30):
        run = RunFolder(tmp_path / f"run-{turn}")

        def attempt(number: int, run: RunFolder = run) -> None:
            with run.set_up() as hidden:
                hidden.tokenizer.mkdir()
                (hidden.tokenizer / str(number)).touch()
                hidden.settings_file.write_text(json.dumps({"number": number}))

        ended = rivals(6, attempt)
        winners = [number for number, error in enumerate(ended) if error is None]
        assert len(winners) == 1
        assert all(isinstance(error, InputError) for error in ended if error)
        assert json.loads(run.settings_file.read_bytes()) == {"number": winners[0]}
        assert os.listdir(run.tokenizer) == [str(winners[0])]
    assert len(list(tmp_path.iterdir())) == 30


def test_a_folder_is_claimed_by_one_at_a_time(tmp_path: Path) -> None:
    held: list[int] = []

    def attempt(number: int) -> None:
        for _ in range(50):
            try:
                with folder_claimed(tmp_path / "a" / "place", "taken"):
                    held.append(number)
                    assert held == [number]
                    (tmp_path / "a" / "place" / "file").touch(exist_ok=False)
                    (tmp_path / "a" / "place" / "file").unlink()
                    held.clear()
            except InputError as error:
                assert str(error) == "taken"  # noqa: PT017

    assert rivals(4, attempt) == [None] * 4
    assert list((tmp_path / "a").iterdir()) == []
    with locked(tmp_path, "taken"), pytest.raises(InputError, match="taken"), locked(tmp_path, "taken"):
        pass


def test_of_two_that_save_to_one_place_one_does(tmp_path: Path) -> None:
    """The other says so, and the checkpoint is whole."""
    config = config_from_dict(TINY)
    trees = [init_params(config, mx.random.key(seed)) for seed in range(2)]
    mx.eval(trees)

    def attempt(number: int) -> None:
        with new_folder(tmp_path / "model") as folder:
            (folder / "number").write_text(str(number))
            time.sleep(0.05)

    for _ in range(5):
        ended = rivals(4, attempt)
        (winner,) = [number for number, error in enumerate(ended) if error is None]
        assert all(isinstance(error, InputError) for error in ended if error)
        assert (tmp_path / "model" / "number").read_text() == str(winner)
        (tmp_path / "model" / "number").unlink()
        (tmp_path / "model").rmdir()
    save(tmp_path / "model", trees[0], config)
    with pytest.raises(InputError, match="exists already"):
        save(tmp_path / "model", trees[1], config)
    assert mx.array_equal(load(tmp_path / "model")[0]["lm_head"]["weight"], trees[0]["lm_head"]["weight"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_tokenizer_is_written_by_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = write_text(tmp_path / "text.md"), tmp_path / "tok"
    command = ["--data", str(text), "--vocab-size", "270", "--out", str(out)]
    with folder_claimed(out, "taken"):
        said = refused(capsys, train_tokenizer.main, command)
    assert said == f"{out} is being written by another process: wait until it ends."
    assert not out.exists()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "there").mkdir()
    assert train_tokenizer.main([*command[:-1], str(tmp_path / "link")]) == 0
    assert (tmp_path / "there" / "tokenizer.json").exists()
    # What can't be done leaves nothing.
    assert train_tokenizer.main([*command[:3], "99999", *command[4:]]) == 2
    assert not out.exists()
