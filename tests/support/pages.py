"""The commands and scripts of a page of documentation, run as a reader who pastes them would run them."""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: under which heading it stands, in which language, and what it says."""

    heading: str
    language: str
    code: str


def blocks(page: str) -> list[Block]:
    """The blocks of a page that name their language, in order."""
    found, heading = [], ""
    for match in re.finditer(r"^#+ ([^\n]*)$|^```(\w+)\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        heading = match[1] or heading
        if match[2]:
            found.append(Block(heading, match[2], match[3]))
    return found


def environment(folder: Path) -> dict[str, str]:
    """Where `python` is the one that runs the tests, as if its environment were active. `folder` gets it."""
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    packages = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PATH": path, "PYTHONPATH": packages, "HF_HUB_OFFLINE": "1"}
