"""Checks in several processes give what one process gives, and no process ends or stops the others."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from dbrx_fn.checking.checks import Outcome, run_checks
from dbrx_fn.checking.compiled_kernels import VARIABLE, kernel_folder
from dbrx_fn.checking.plan import planned
from dbrx_fn.checking.workers import PATIENCE, run_in_workers, worker_count
from tests.support.check_in_workers import plan, unable

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of compiled kernels."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    monkeypatch.setenv(VARIABLE, str(folder))
    assert kernel_folder() == folder
    return folder


def made(*names: str, seconds: float = 60, patience: float = PATIENCE) -> list[Outcome]:
    return run_in_workers(plan(*names), partial(plan, *names), time.monotonic() + seconds, 2, patience)


def test_workers_find_what_one_process_finds() -> None:
    wanted = partial(planned, "experts, float32")
    alone = run_checks(wanted(), time.monotonic() + 60)
    together = run_in_workers(wanted(), wanted, time.monotonic() + 60, 2)
    assert len(alone) == 12
    assert [(each.check.case, each.compared) for each in together] == [
        (each.check.case, each.compared) for each in alone
    ]
    assert not any(each.wrong or each.left_out for each in together)


def test_a_process_that_ends_or_hangs_in_a_check_is_told_of_and_the_others_go_on() -> None:
    outcomes = made("ends", "hangs", "right", "crashes", "right", patience=2.0)
    assert [outcome.problem for outcome in outcomes] == [
        "its process ended with status 3",
        "it hangs: it made no progress in 2 s",
        None,
        "its process ended with SIGSEGV",
        None,
    ]
    assert [outcome.wrong for outcome in outcomes] == [True, True, False, True, False]
    assert outcomes[1].seconds >= 2
    assert not any(outcome.left_out for outcome in outcomes)


def test_what_has_not_ended_in_time_is_left_out() -> None:
    start = time.monotonic()
    outcomes = made("right", "hangs", "hangs", "right", seconds=6)
    assert 6 <= time.monotonic() - start < 12
    assert [outcome.left_out for outcome in outcomes] == [False, True, True, True]
    assert not any(outcome.wrong for outcome in outcomes)


def test_where_no_process_can_start_the_checks_run_in_this_one() -> None:
    names = ("right", "right")
    outcomes = run_in_workers(plan(*names), partial(unable, *names), time.monotonic() + 60, 1)
    assert not any(outcome.wrong or outcome.left_out for outcome in outcomes)


def test_whole_kernels_reach_the_other_processes_and_the_next_run(kept: Path) -> None:
    first = made("compiles and waits", "waits and compiles", "compiles half")
    assert not any(outcome.wrong or outcome.left_out for outcome in first)
    assert {str(file.relative_to(kept)) for file in kept.rglob("*.*")} == {
        "deep/whole.ptx",
        "deep/whole.txt",
        "back.ptx",
        "back.txt",
    }
    [again] = made("waits")
    assert not again.wrong
    assert not again.left_out


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_command(stop: signal.Signals, tmp_path: Path) -> None:
    folder = tmp_path / "processes"
    folder.mkdir()
    command = subprocess.Popen(
        [sys.executable, "-m", "tests.support.check_in_workers", folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
    )
    while len(list(folder.iterdir())) < 3:
        assert command.poll() is None
        time.sleep(0.05)
    command.send_signal(stop)
    out, error = command.communicate(timeout=10)
    assert (command.returncode, out, error) == ({signal.SIGINT: 130, signal.SIGKILL: -9}[stop], "", "")
    until = time.monotonic() + 5
    while any(Path("/proc", file.name).exists() for file in folder.iterdir()):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert list(tmp_path.glob("dbrx_fn-check-*")) == [] or stop == signal.SIGKILL


def test_a_cpu_needs_no_workers() -> None:
    assert worker_count() == 1
