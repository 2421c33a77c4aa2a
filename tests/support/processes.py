"""Several processes that share a model, over MLX's ring on this machine's loopback."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Finished:
    """How a process ended, and what it printed."""

    status: int
    out: str
    err: str


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def started(
    arguments: Sequence[str], count: int = 2, *, env: Mapping[str, str] | None = None
) -> Iterator[list["subprocess.Popen[str]"]]:
    """`python ARGUMENTS` as so many processes of one group. Whatever still runs after the block is killed."""
    with TemporaryDirectory() as folder:
        # A single process has no group.
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(count)]))
        processes = [
            subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env={**os.environ, **(env or {})}
                | ({"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} if count > 1 else {}),
                stdin=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(count)
        ]
        try:
            yield processes
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    process.kill()
                process.wait()
                for stream in (process.stdin, process.stdout, process.stderr):
                    if stream is not None:
                        # What wasn't sent to a process that has ended can't be.
                        with suppress(OSError):
                            stream.close()


def finished(processes: Sequence["subprocess.Popen[str]"], timeout: float = 200.0) -> list[Finished]:
    """Waits for all processes. They are killed if that takes longer than `timeout` seconds."""
    end = time.monotonic() + timeout
    results = []
    for process in processes:
        try:
            out, err = process.communicate(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            for other in processes:
                other.send_signal(signal.SIGKILL)
            out, err = process.communicate()
            err += "\n(killed after the time limit)"
        results.append(Finished(process.returncode, out, err))
    return results


def run_processes(
    arguments: Sequence[str], count: int = 2, *, env: Mapping[str, str] | None = None, timeout: float = 200.0
) -> list[Finished]:
    """Runs processes of one group to their ends."""
    with started(arguments, count, env=env) as processes:
        return finished(processes, timeout)
