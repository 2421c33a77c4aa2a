"""Ctrl-C and SIGTERM in a run: it is saved where it stands, and goes on to the last bit."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dbrx_fn.cli.command import Terminated
from dbrx_fn.cli.stop_signals import deferred_stop
from dbrx_fn.files.atomic import is_leftover
from dbrx_fn.runs.folder import RunFolder
from tests.support.tiny_runs import arguments, contents, metrics, write_config, write_conversations, write_text

# Saving waits for a minute before a checkpoint is flushed to the disk.
SLOW_TO_SAVE = """
import sys, time
import dbrx_fn.files.atomic as atomic
flush = atomic.flush

def slow(path):
    time.sleep(60 * ("step-" in str(path)))
    flush(path)

atomic.flush = slow
from dbrx_fn.train import main
sys.exit(main())
"""
STEPS = 150
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Run:
    """One process of the command."""

    def __init__(self, log: Path, *command: str, code: str | None = None, **more: Any) -> None:
        self.log = log
        start = ["-m", "dbrx_fn.train"] if code is None else ["-c", code]
        with log.open("w") as opened:
            self.process = subprocess.Popen(
                [sys.executable, *start, *command], stdout=subprocess.DEVNULL, stderr=opened, **more
            )

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Waits until something has happened, for which the process must live."""
        while not ready():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.002)

    def ended(self) -> tuple[int, str]:
        """Its status, and what it printed on standard error."""
        try:
            status = self.process.wait(timeout=100)
        finally:
            self.process.kill()
        said = self.log.read_text()
        assert "Traceback" not in said
        return status, said


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts processes, of which none stays."""
    runs: list[Run] = []

    def start(*command: str, **more: Any) -> Run:
        runs.append(Run(tmp_path / f"{len(runs)}.log", *command, **more))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.wait()


def lines(out: Path) -> int:
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def leftovers(folder: Path) -> list[str]:
    return [entry.name for entry in folder.rglob("*") if is_leftover(entry) or entry.name.endswith("-set-up")]


@pytest.mark.parametrize(
    ("numbers", "name", "options"),
    [
        ((signal.SIGINT, signal.SIGTERM), "text.md", {"micro_batches": 2}),
        ((signal.SIGTERM,), "conversations.jsonl", {"dtype": "bfloat16", "schedule": "linear"}),
        ((signal.SIGINT,), "conversations.jsonl", {"lora": 4}),
    ],
    ids=["text", "conversations", "adapters"],
)
def test_a_run_interrupted_anywhere_ends_as_one_that_nobody_disturbed(
    numbers: tuple[signal.Signals, ...], name: str, options: Any, tmp_path: Path, started: Callable[..., Run]
) -> None:
    """Though nothing is saved but at its end and where it is interrupted."""
    config: Path | None = write_config(tmp_path / "config.json")
    data = (write_text if name == "text.md" else write_conversations)(tmp_path / name)
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "run"
    every = {"steps": STEPS, "save_every": STEPS, "eval_every": 40, "log_every": 1, **options}
    if "lora" in options:
        assert started(*arguments(tmp_path / "start", config, [data], steps=1)).ended()[0] == 0
        every, config = {**every, "model": tmp_path / "start" / "model"}, None
    assert started(*arguments(undisturbed, config, [data], **every)).ended()[0] == 0

    draw, begun = random.Random(len(name)), 0
    command = arguments(out, config, [data], **every)
    for number in numbers:
        run = started(*command)
        wanted = begun + draw.randint(1, 40)
        run.wait_for(lambda wanted=wanted: lines(out) > wanted)  # type: ignore[misc]
        time.sleep(draw.random() * 0.02)
        run.process.send_signal(number)
        status, said = run.ended()
        saved = RunFolder(out).saved_steps()
        assert status == STATUS[number]
        assert said.splitlines()[-1] == f"interrupted: --out {out} --resume goes on after step {saved[-1]}."
        assert "stopping after this step, which is saved; once more ends at once" in said
        # Each step is noted, so nothing was done in vain.
        assert max(line["step"] for line in metrics(out)) == saved[-1]
        assert begun < saved[-1] < STEPS
        assert leftovers(tmp_path) == []
        begun, command = lines(out), ["--out", str(out), "--resume"]
    status, said = started(*command).ended()
    assert status == 0
    assert f"resumed after step {saved[-1]}" in said
    assert metrics(out) == metrics(undisturbed)
    last = f"step-{STEPS:08d}"
    for part in ("adapters" if "lora" in options else "model", f"checkpoints/{last}"):
        assert contents(out / part) == contents(undisturbed / part)


def test_once_more_ends_at_once_and_damages_nothing(tmp_path: Path, started: Callable[..., Run]) -> None:
    config, text, out = write_config(tmp_path / "config.json"), write_text(tmp_path / "text.md"), tmp_path / "run"
    run = started(*arguments(out, config, [text], steps=3000, save_every=3000, log_every=1), code=SLOW_TO_SAVE)
    run.wait_for(lambda: lines(out) > 3)
    run.process.send_signal(signal.SIGINT)
    run.wait_for(lambda: any(is_leftover(entry) for entry in (out / "checkpoints").glob(".step-*")))
    # One that follows at once is taken for the same, as some programs send it twice.
    run.process.send_signal(signal.SIGINT)
    time.sleep(1.2)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert run.ended()[0] == 130
    assert time.monotonic() - began < 20
    assert RunFolder(out).saved_steps() == []
    status, said = started("--out", str(out), "--resume", "--steps", "9").ended()
    assert status == 0
    assert "resumed after" not in said
    assert leftovers(out) == []


@pytest.mark.parametrize("number", STATUS)
def test_nothing_is_kept_of_a_set_up(number: signal.Signals, tmp_path: Path, started: Callable[..., Run]) -> None:
    place = tmp_path / "place"
    place.mkdir()
    config, text = write_config(tmp_path / "config.json"), write_text(tmp_path / "text.md", 60_000)
    run = started(*arguments(place / "run", config, [text]))
    run.wait_for((place / ".run-set-up" / "tokenizer").exists)
    run.process.send_signal(number)
    status, said = run.ended()
    assert (status, said.splitlines()[-1]) == (STATUS[number], "interrupted: nothing is kept.")
    assert list(place.iterdir()) == []


def test_a_run_in_the_background_ignores_ctrl_c_as_its_shell_asked(tmp_path: Path, started: Callable[..., Run]) -> None:
    config, text, out = write_config(tmp_path / "config.json"), write_text(tmp_path / "text.md"), tmp_path / "run"
    given = arguments(out, config, [text], steps=3000, log_every=1)
    run = started(*given, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    run.wait_for(lambda: lines(out) > 3)
    run.process.send_signal(signal.SIGINT)
    before = lines(out)
    run.wait_for(lambda: lines(out) > before + 5)
    run.process.send_signal(signal.SIGTERM)
    assert run.ended()[0] == 143


def test_before_a_step_was_saved_it_is_said_that_the_run_begins_again(tmp_path: Path) -> None:
    out = tmp_path / "a run"
    assert RunFolder(out).how_to_go_on() == "nothing is kept"
    out.mkdir()
    (out / "run.json").touch()
    assert RunFolder(out).how_to_go_on() == (f"--out '{out}' --resume begins with the first step, as none was saved")


def signalled(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STATUS)
def test_a_stop_is_asked_for_and_told_once(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in STATUS}
    told = threading.Event()
    with deferred_stop(told.set) as stop:
        assert not stop.requested
        signalled(number)
        assert told.wait(10)
        assert stop.requested
        told.clear()
        signalled(number)
    assert not told.is_set()
    assert type(stop.error()) is (Terminated if number == signal.SIGTERM else KeyboardInterrupt)
    assert {each: signal.getsignal(each) for each in STATUS} == before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_other_signals_and_threads_are_let_be() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    try:
        with deferred_stop(lambda: None) as stop:
            signalled(signal.SIGUSR1)
            time.sleep(0.05)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]

    def elsewhere() -> None:
        with deferred_stop(lambda: None) as stop:
            seen.append(int(stop.requested))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [signal.SIGUSR1, 0]
