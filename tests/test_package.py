"""The package as it is installed: its commands' list, console script, version, and what a wheel holds."""

import importlib
import pkgutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import dbrx_fn
from dbrx_fn.__main__ import COMMANDS, main
from tests.support.console_script import write_script

ROOT = Path(__file__).parents[1]


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "COLUMNS": "100"},
    )


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return write_script(tmp_path / "dbrx-fn")


def test_all_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    modules = [name for _, name, package in pkgutil.walk_packages(dbrx_fn.__path__) if not package]
    modules += ["small.recipe"]
    runnable = {name for name in modules if hasattr(importlib.import_module(f"dbrx_fn.{name}"), "main")}
    assert set(COMMANDS) == runnable - {"__main__"}
    assert main([]) == 0
    said = capsys.readouterr().out
    for name, purpose in COMMANDS.items():
        assert f"  {name} " in said
        assert purpose in said


def test_a_command_is_the_same_in_all_ways_to_start_it(script: Path) -> None:
    words = ["--prompt", "To be", "--max-tokens", "3", "--seed", "1", "--temp", "0"]
    ways = [("-m", "dbrx_fn.generate"), ("-m", "dbrx_fn", "generate"), (script, "generate")]
    texts = [python(*way, *words).stdout for way in ways]
    assert texts[0].count("\n") >= 1
    assert texts == [texts[0]] * 3


def test_help_names_what_was_started(script: Path) -> None:
    for way, called in (
        (("-m", "dbrx_fn"), "python -m dbrx_fn"),
        (("-m", "dbrx_fn.bench", "inference"), "python -m dbrx_fn.bench inference"),
        (("-m", "dbrx_fn", "bench", "inference"), "python -m dbrx_fn.bench inference"),
        ((script,), "dbrx-fn"),
        ((script, "bench", "inference"), "dbrx-fn bench inference"),
    ):
        ended = python(*way, "--help")
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.startswith(f"usage: {called} ["), way


@pytest.mark.parametrize("words", ["generat", "--no-such-option", "x\x1b[31m", "bench inference x\x1b[31m"])
def test_what_is_no_command_is_refused(words: str) -> None:
    ended = python("-m", "dbrx_fn", *words.split())
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert "error: " in ended.stderr
    assert "\x1b" not in ended.stderr


def test_version() -> None:
    assert python("-m", "dbrx_fn", "--version").stdout == f"dbrx_fn {dbrx_fn.__version__}\n"
    assert dbrx_fn.__version__[0].isdigit()


def test_a_wheel_holds_types_model_kernels_script_and_version(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    built = python("-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        info = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
        entries = wheel.read(f"{info}/entry_points.txt").decode()
        metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    sources = {path for path in (ROOT / "dbrx_fn").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {str(path.relative_to(ROOT)) for path in sources} <= names
    # By this a user's type checker takes the types.
    assert "dbrx_fn/py.typed" in names
    assert "dbrx-fn = dbrx_fn.__main__:main" in entries
    assert metadata["Version"] == dbrx_fn.__version__
