"""`python -m dbrx_fn.serve` as a process of its own, as users start it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass
class ServerProcess:
    """A server that runs, and the URL that it printed."""

    process: subprocess.Popen[str]
    url: str

    def end(self, number: int) -> tuple[int, str]:
        """Sends a signal; returns the exit status and all that was said on standard error."""
        self.process.send_signal(number)
        said = self.process.communicate(timeout=60)[1]
        return self.process.returncode, said


@contextmanager
def server_process(*options: str, **environment: str) -> Iterator[ServerProcess]:
    """Serves the small model on a free port within the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dbrx_fn.serve", "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://"), process.communicate(timeout=10)[1]
        yield ServerProcess(process, url)
    finally:
        process.kill()
        process.wait(10)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
