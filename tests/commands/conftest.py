"""What several tests of commands need."""

import subprocess
import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def server() -> Iterator["subprocess.Popen[str]"]:
    """A process that forks commands and kills them at a given moment (`tests.support.convert_and_kill`)."""
    if sys.platform != "linux":
        pytest.skip("forking a process that has imported MLX is only known to work there")
    command = [sys.executable, "-m", "tests.support.convert_and_kill"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
