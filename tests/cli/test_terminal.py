"""What commands say on a terminal: interrupted, they end with status 130 and no traceback; warnings are plain lines."""

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from dbrx_fn import bench, random_checkpoint, train_tokenizer
from dbrx_fn.cli.command import INTERRUPTED
from dbrx_fn.cli.terminal import byte_progress, printed_warnings
from tests.support.tiny_runs import write_config, write_text


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("main", "slow", "options"),
    [
        (bench.main, "dbrx_fn.benchmarks.training.train_step", ["training", "--shape", "{}/config.json"]),
        (random_checkpoint.main, "dbrx_fn.random_checkpoint.init_params", ["{}/out"]),
        (
            train_tokenizer.main,
            "dbrx_fn.train_tokenizer.train_bpe",
            ["--data", "{}/text.md", "--vocab-size", "300", "--out", "{}/out"],
        ),
    ],
    ids=["bench", "random_checkpoint", "train_tokenizer"],
)
def test_ctrl_c_ends_a_command_with_130(
    main: Callable[[list[str]], int],
    slow: str,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_config(tmp_path / "config.json")
    write_text(tmp_path / "text.md")
    monkeypatch.setattr(slow, interrupt)
    assert main([option.format(tmp_path) for option in options]) == INTERRUPTED == 130
    assert "Traceback" not in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "text.md"]


def test_ctrl_c_from_a_terminal_leaves_no_traceback(tmp_path: Path) -> None:
    out = tmp_path / "out"
    # Large enough to be caught while it is written.
    sizes = ["--d-model", "1024", "--n-layers", "8", "--dtype", "bfloat16"]
    running = subprocess.Popen(
        [sys.executable, "-m", "dbrx_fn.random_checkpoint", str(out), *sizes], stderr=subprocess.PIPE, text=True
    )
    try:
        while not os.listdir(tmp_path) and running.poll() is None:
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        err = running.communicate(timeout=100)[1]
    finally:
        running.kill()
    assert (running.returncode, err) == (INTERRUPTED, "")
    assert list(tmp_path.iterdir()) == []


def test_warnings_are_plain_lines_each_once(capsys: pytest.CaptureFixture[str]) -> None:
    shown = warnings.showwarning
    with printed_warnings():
        for _ in range(3):
            warnings.warn("the moon is full.", stacklevel=1)
        warnings.warn("the moon is new.", stacklevel=1)
    assert capsys.readouterr().err == "warning: the moon is full.\nwarning: the moon is new.\n"
    assert warnings.showwarning is shown


def test_bytes_are_counted_up_to_their_total() -> None:
    with byte_progress("reading") as progress:
        for done in range(0, 30, 10):
            progress(done, 20)
