"""A process that makes checks: what it does, and its parent's handle of it."""

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import mlx.core as mx

from dbrx_fn.checking.checks import Check, outcome_of
from dbrx_fn.checking.comparison import Comparison
from dbrx_fn.checking.compiled_kernels import VARIABLE

Plan = Callable[[], Sequence[Check]]
"""Makes the checks, the same ones in each process. It is pickled, so its module mustn't be `__main__`."""
Answer = tuple[float, Comparison | None, str | None]
"""An outcome's parts: seconds, comparison, problem."""

_LAST_WORDS = 5.0
"""Seconds that a process may take to end after it has closed its connection."""


class Worker:
    """A new process, with an empty folder for its compiled kernels.

    `link`: is ready to be read when the process can make a check, when it has made one, and when it has ended.
    """

    def __init__(self, plan: Plan, kernels: Path) -> None:
        self.kernels = kernels
        self.link, there = Pipe()
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import work; work({there.fileno()})"],
                stdin=subprocess.DEVNULL,
                # Standard output is the report's.
                stdout=subprocess.DEVNULL,
                pass_fds=[there.fileno()],
                env=os.environ | {VARIABLE: str(kernels), "PYTHONPATH": os.pathsep.join(sys.path)},
                # The terminal's Ctrl-C goes to this process only, which then ends its workers.
                start_new_session=True,
            )
        self._send(plan)

    def start(self, check: int) -> None:
        """Makes the process start a check, given by its index in the plan."""
        self._send(check)

    def answer(self) -> Answer | None:
        """The result of the check that it has made, or `None` if it is ready for its first one.

        Raises:
            EOFError: if the process has ended.
        """
        try:
            answer: Answer | None = self.link.recv()
        except OSError as error:
            raise EOFError from error
        return answer

    def kill(self) -> None:
        """Ends the process, without a wait for its end."""
        self._process.kill()

    def ended(self) -> str:
        """Waits for the end of a process that is killed or has closed its connection, and returns how it ended."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_LAST_WORDS)
        self._process.kill()
        self.link.close()
        status = self._process.wait()
        return signal.Signals(-status).name if status < 0 else f"status {status}"

    def _send(self, what: object) -> None:
        # A process that has ended is noticed when its answer is read.
        with suppress(OSError):
            self.link.send(what)


def work(descriptor: int) -> None:
    """The process: receives the plan, then indices of checks, and answers each. It ends with its parent."""
    link: Connection[Any, Any] = Connection(descriptor)
    received: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def receive() -> None:
        try:
            while True:
                received.put(link.recv_bytes())
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=receive, daemon=True).start()
    checks = pickle.loads(received.get())()
    # It fails here if it can't use the GPU.
    mx.eval(mx.zeros(8))
    link.send(None)
    while True:
        outcome = outcome_of(checks[pickle.loads(received.get())])
        link.send((outcome.seconds, outcome.compared, outcome.problem))
