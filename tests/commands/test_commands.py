"""How every command ends: with a right status and at most one sentence, never a traceback, whatever its streams are,
whenever it is interrupted, and whatever it is given for a path."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dbrx_fn.checkpoints.hub import SMALL
from dbrx_fn.cli.command import INTERRUPTED, TERMINATED
from tests.support.console_script import write_script
from tests.support.tiny_runs import write_config, write_text

ROOT = Path(__file__).parents[2]
COMMANDS = (
    *("generate", "train", "convert", "inspect", "evaluate", "check", "bench"),
    *("train_tokenizer", "random_checkpoint", "small.recipe", "serve"),
)
WORKERS = tuple(name for name in COMMANDS if name != "serve")
"""Commands whose work ends; a server's doesn't."""
NOWHERE = "~nobody-of-this-name/x"
STRANGE = "x\x1b[31m\u202e\ny"


def jobs(folder: Path) -> dict[str, list[str]]:
    """A short piece of work for each command, writing under `folder`."""
    folder.mkdir(exist_ok=True)
    config = str(write_config(folder / "config.json"))
    text = str(write_text(folder / "text.txt", 60))
    (folder / "recipe" / "texts").mkdir(parents=True, exist_ok=True)
    small = ["--batch-size", "2", "--sequence-length", "16", "--steps", "2"]
    return {
        "generate": ["--prompt", "x", "--max-tokens", "2"],
        "train": ["--data", text, "--config", config, "--out", str(folder / "run"), *small],
        "convert": [str(SMALL), str(folder / "converted")],
        "inspect": [str(SMALL)],
        "evaluate": ["perplexity", str(SMALL), "--data", text, "--sequence-length", "64"],
        "check": ["--only", "positions"],
        "bench": ["training", "--shape", config, *small],
        "train_tokenizer": ["--data", text, "--vocab-size", "300", "--out", str(folder / "tokenizer")],
        "random_checkpoint": [str(folder / "random"), "--d-model", "32"],
        "small.recipe": ["--out", str(folder / "recipe"), "--only", "texts"],
        "serve": ["--port", "0"],
    }


def with_path(path: str, folder: Path) -> dict[str, list[list[str]]]:
    """For each command, what names `path` in place of a file or folder that is read, in all ways."""
    text = str(write_text(folder / "text.txt"))
    return {
        "generate": [
            ["--model", path, "--prompt", "x"],
            ["--batch", path, "--out", str(folder / "answers.jsonl")],
        ],
        "train": [
            ["--data", path, "--out", str(folder / "run-1")],
            ["--data", text, "--config", path, "--out", str(folder / "run-2")],
            ["--data", text, "--model", path, "--out", str(folder / "run-3")],
            ["--data", text, "--tokenizer", path, "--out", str(folder / "run-4")],
            ["--resume", "--out", path],
        ],
        "convert": [[path, str(folder / "converted")], [str(SMALL), str(folder / "again"), "--tokenizer", path]],
        "inspect": [[path]],
        "evaluate": [["perplexity", path, "--data", text], ["perplexity", str(SMALL), "--data", path]],
        "check": [],
        "bench": [["inference", "--model", path], ["inference", "--shape", path], ["training", "--shape", path]],
        "train_tokenizer": [["--data", path, "--vocab-size", "300", "--out", str(folder / "tokenizer")]],
        "random_checkpoint": [],
        "small.recipe": [],
        "serve": [["--model", path], ["--api-key-file", path]],
    }


@dataclass
class Ended:
    """What a command came to."""

    status: int
    output: str
    error: str

    def is_refusal(self) -> bool:
        """Whether it ended with status 2 and one sentence, in which no character steers a terminal."""
        sentence = self.error.removesuffix("\n")
        return self.status == 2 and sentence.startswith("error: ") and sentence.endswith(".") and sentence.isprintable()


def run(cases: list[dict[str, Any]]) -> list[Ended]:
    """Runs commands as `forked_commands` does."""
    ended = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "forked_commands.py")],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=500,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    return [Ended(**result) for result in json.loads(ended.stdout)]


needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")


@needs_full
def test_help_ends_well_whatever_its_output_is() -> None:
    wanted = {"file": 0, "gone": 0, "full": 2, "closed": 2}
    cases = [{"name": name, "arguments": ["--help"], "output": output} for output in wanted for name in COMMANDS]
    for case, ended in zip(cases, run(cases), strict=True):
        status = wanted[str(case["output"])]
        assert (ended.status, "usage: " in ended.output) == (status, case["output"] == "file"), case
        assert ended.is_refusal() if status else ended.error == "", (case, ended)


@needs_full
@pytest.mark.parametrize("output", ["gone", "full", "closed"])
def test_work_ends_well_whatever_its_output_is(output: str, tmp_path: Path) -> None:
    given = jobs(tmp_path)
    cases = [{"name": name, "arguments": given[name], "output": output} for name in WORKERS]
    for name, ended in zip(WORKERS, run(cases), strict=True):
        assert "Traceback" not in ended.error, name
        # The recipe's texts are there, of which it says nothing.
        assert ended.status == (0 if output == "gone" or name == "small.recipe" else 2), (name, ended)
        if ended.status:
            assert "error: standard output can't be written (" in ended.error, name
    # A result that nobody reads is no reason not to make what was asked for.
    for made in ("run/model", "converted", "tokenizer/tokenizer.json", "random"):
        assert (tmp_path / made).exists(), made


@pytest.mark.parametrize("error", ["gone", "closed"])
def test_messages_that_nobody_reads_do_not_end_the_work(error: str, tmp_path: Path) -> None:
    given = jobs(tmp_path)
    cases = [{"name": name, "arguments": given[name], "error": error} for name in WORKERS]
    for name, ended in zip(WORKERS, run(cases), strict=True):
        assert ended.status == 0, (name, ended)
        assert ended.output or name == "small.recipe", name
        assert "error: " not in ended.output, name


def test_a_path_that_cannot_work_is_refused_in_one_sentence(tmp_path: Path) -> None:
    cases = []
    for path in (NOWHERE, STRANGE, "nobody/of-this-name", "x" * 5000, "/dev/null", "/"):
        ways = with_path(path, tmp_path)
        cases += [{"name": name, "arguments": arguments} for name in COMMANDS for arguments in ways[name]]
    before = sorted(tmp_path.iterdir())
    for case, ended in zip(cases, run(cases), strict=True):
        assert ended.is_refusal(), (case, ended)
        assert ended.output == "", case
    assert sorted(tmp_path.iterdir()) == before


def imports_are_under_way(process: int) -> bool:
    """Whether a process has come past the first lines of the package; before those, Python's own are in charge."""
    return "libmlx" in Path(f"/proc/{process}/maps").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="what a process has loaded is read from /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_interrupted_at_any_moment_ends_quietly(name: str, number: signal.Signals, tmp_path: Path) -> None:
    draw = random.Random(f"{name} {number}")
    script = write_script(tmp_path / "dbrx-fn")
    for attempt, way in enumerate((["-m", f"dbrx_fn.{name}"], [str(script), name])):
        folder = tmp_path / str(attempt)
        running = subprocess.Popen(
            [sys.executable, *way, *jobs(folder)[name]],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        try:
            while running.poll() is None and not imports_are_under_way(running.pid):
                time.sleep(0.001)
            time.sleep(draw.choice([0, draw.uniform(0, 1)]))
            running.send_signal(number)
            error = running.communicate(timeout=100)[1]
        finally:
            running.kill()
        assert "Traceback" not in error
        # A command that had ended already is in order too.
        stopped = INTERRUPTED if number == signal.SIGINT else TERMINATED
        assert running.returncode in (0, stopped, -number), error
        # Nothing half-written: what there is is whole, or is what the command will go on with.
        if running.returncode == INTERRUPTED and name in ("train_tokenizer", "random_checkpoint"):
            assert not [path for path in folder.iterdir() if path.name.startswith(".")]
