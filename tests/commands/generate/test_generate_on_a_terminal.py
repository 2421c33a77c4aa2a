"""What `generate` shows on a terminal and not in a pipe: the prompt stands before the text that continues it, and
nothing that a model says steers the terminal."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from dbrx_fn.model.config import Config, FFNConfig
from dbrx_fn.random_checkpoint import write_random_checkpoint
from dbrx_fn.text.tokenizer import read_tokenizer

pty = pytest.importorskip("pty", reason="this system has no terminals of that kind")
ROOT = Path(__file__).parents[3]
CONFIG = Config(d_model=16, n_heads=2, n_layers=1, vocab_size=264, ffn=FFNConfig(8, 2, 1), dtype="float32")
DIM, BRIGHT = "\x1b[2m", "\x1b[22m"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("terminal") / "checkpoint"
    write_random_checkpoint(path, CONFIG, mx.random.key(0))
    return path


def say(folder: Path, text: str) -> list[str]:
    """Options by which the model says this text, of one byte a token, and nothing else."""
    [token] = {token for token in read_tokenizer(folder).encode(text)}
    return ["--logit-bias", f"{token}:inf", "--max-tokens", str(len(text))]


def on_a_terminal(folder: Path, *options: str, environment: dict[str, str] | None = None) -> str:
    """What comes out of standard output and error, which are one terminal."""
    ours, theirs = pty.openpty()
    running = subprocess.Popen(
        [sys.executable, "-m", "dbrx_fn.generate", "--model", str(folder), *options],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "TERM": "xterm", **(environment or {})},
    )
    os.close(theirs)
    shown = b""
    # Its other end closed, a terminal gives an error on Linux, and nothing elsewhere.
    with contextlib.suppress(OSError):
        while read := os.read(ours, 1 << 16):
            shown += read
    os.close(ours)
    assert running.wait(timeout=100) == 0, shown
    text = shown.decode().replace("\r\n", "\n")
    # Without the progress bar.
    return re.sub(r"\r[^\n]*\r|\x1b\[A", "", text)


def in_a_pipe(folder: Path, *options: str) -> tuple[str, str]:
    ended = subprocess.run(
        [sys.executable, "-m", "dbrx_fn.generate", "--model", str(folder), *options],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout, ended.stderr


def test_the_prompt_stands_dimmed_before_the_text_that_continues_it(folder: Path) -> None:
    options = ["--prompt", "To be", *say(folder, "aaa")]
    shown = on_a_terminal(folder, *options)
    assert f"{DIM}To be{BRIGHT}aaa\n\nprompt " in shown
    assert in_a_pipe(folder, *options)[0] == "aaa\n"


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_terminal_without_colours_gets_none(environment: dict[str, str], folder: Path) -> None:
    shown = on_a_terminal(folder, "--prompt", "To be", *say(folder, "aaa"), environment=environment)
    assert "To beaaa\n" in shown
    assert "\x1b" not in shown


def test_an_answer_stands_alone(folder: Path) -> None:
    shown = on_a_terminal(folder, "--chat", "--prompt", "To be?", *say(folder, "aaa"))
    assert "aaa\n" in shown
    assert "To be?" not in shown


def test_of_a_long_prompt_the_end_is_shown(folder: Path) -> None:
    shown = on_a_terminal(folder, "--prompt", "b" * 1500 + "To be", *say(folder, "aaa"))
    assert re.search(rf"{re.escape(DIM)}…b+To be{re.escape(BRIGHT)}aaa\n", shown)
    assert shown.count("b") < 500


def test_nothing_that_the_model_or_the_prompt_says_steers_the_terminal(folder: Path) -> None:
    options = ["--prompt", "x\x1b[2J\u202ey\n\tz", *say(folder, "\x1b\x1b")]
    shown = on_a_terminal(folder, *options, environment={"NO_COLOR": "1"})
    assert "x\\x1b[2J\\u202ey\n        z\\x1b\\x1b\n" in shown or "x\\x1b[2J\\u202ey\n\tz\\x1b\\x1b\n" in shown
    assert "\x1b" not in shown
    # Who reads a pipe gets what was said.
    assert in_a_pipe(folder, *options)[0] == "\x1b\x1b\n"


def test_the_summary_has_the_seed_that_draws_the_same_text_again(folder: Path) -> None:
    drawn = ["--prompt", "To be", "--temp", "1", "--max-tokens", "12"]
    text, summary = in_a_pipe(folder, *drawn)
    found = re.search(r"^seed +(\d+)$", summary, re.MULTILINE)
    assert found
    assert in_a_pipe(folder, *drawn, "--seed", found[1])[0] == text
    assert "seed" not in in_a_pipe(folder, "--prompt", "To be", "--temp", "0", "--max-tokens", "2")[1]
