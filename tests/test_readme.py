"""The README's commands, pasted one after the other into one shell, and its script.

Left out are the lines that install or run nox, since the tests are run by those. Training takes 2 steps instead of 200.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from dbrx_fn.__main__ import COMMANDS
from tests.support import pages
from tests.support.pages import ROOT, environment

README = (ROOT / "README.md").read_text()
LEFT_OUT = ("pip install", "nox")


def blocks(language: str) -> list[str]:
    return [block.code for block in pages.blocks(README) if block.language == language]


def test_commands_can_be_pasted_into_one_shell(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "docs", clone / "docs")
    shutil.copy(ROOT / "README.md", clone)
    lines = "".join(blocks("sh")).splitlines()
    commands = [line for line in lines if not any(words in line for words in LEFT_OUT)]
    assert len(commands) >= 6
    assert all(line.startswith("python -m dbrx_fn.") for line in commands)
    short = [line.replace("--steps 200", "--steps 2") for line in commands]
    assert short != commands
    ended = subprocess.run(
        ["sh", "-ec", "\n".join(short)],
        cwd=clone,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "warning" not in ended.stderr
    assert sorted(path.name for path in clone.iterdir()) == ["README.md", "docs", "run", "run-4bit"]


def test_what_installs_leaves_its_environment_active() -> None:
    """Or else the commands after it would run another Python."""
    installing = [line for line in "".join(blocks("sh")).splitlines() if "pip install" in line]
    assert installing
    for line in installing:
        assert line.startswith("python3 -m venv .venv && . .venv/bin/activate && pip install "), line


def test_the_script_runs(tmp_path: Path) -> None:
    [script] = blocks("python")
    given, said = environment(tmp_path), []
    for _ in range(2):
        ended = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, env=given, capture_output=True, text=True, timeout=200
        )
        assert (ended.returncode, ended.stderr) == (0, "")
        said.append(ended.stdout)
    assert len(said[0]) > 50
    assert said[0] == said[1]


def test_commands_that_are_named_exist() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        named = set(re.findall(r"python -m dbrx_fn\.([\w.]+\w)", page.read_text()))
        assert named <= COMMANDS.keys(), page
