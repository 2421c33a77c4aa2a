"""This package's server as a child process, for as long as it is measured."""

import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dbrx_fn.errors import InputError

_PATIENCE = 10.0
"""Seconds that the server has to end."""


@contextmanager
def served(options: Sequence[str]) -> Iterator[str]:
    """Serves on a free port of this machine within the block. Gives the server's URL.

    Args:
        options: of `python -m dbrx_fn.serve`.

    Raises:
        InputError: with the server's last words, if it doesn't start, or ends before the block does.
    """
    command = [sys.executable, "-m", "dbrx_fn.serve", "--port", "0", "--drain", "0", *options]
    process: subprocess.Popen[str] | None = None
    # Nobody reads a pipe while the server runs, and a full one would hold it up.
    with tempfile.TemporaryFile("w+") as said:

        def last_words() -> str:
            said.seek(0)
            return (said.read().strip().splitlines() or ["it said nothing."])[-1].removeprefix("error: ")

        try:
            with _signals_wait():
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, text=True
                )
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            if not url:
                process.wait()
                raise InputError(f"The server doesn't start: {last_words()}")
            yield url
            if process.poll() is not None:
                raise InputError(f"The server ended while it was measured: {last_words()}")
        finally:
            if process is not None:
                _end(process)


def _end(process: "subprocess.Popen[str]") -> None:
    process.terminate()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Holds Ctrl-C and SIGTERM back until the block ends: an exception within `Popen` would lose the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    taken = {number: handler for number, handler in found.items() if handler not in (signal.SIG_IGN, None)}
    for number in taken:
        signal.signal(number, lambda number, _: held.append(number))
    try:
        yield
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)
    if held:
        signal.raise_signal(held[0])
