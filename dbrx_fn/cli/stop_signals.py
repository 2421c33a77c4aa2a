"""Ctrl-C and SIGTERM in the midst of work that should be saved first.

The first one asks for a stop, which the work looks for where it can be saved. One that comes a second or more later
ends the process at once, even while it waits for the device or the disk.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dbrx_fn.cli.command import SAME_PRESS, Terminated

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether a stop was asked for."""

    def __init__(self) -> None:
        self._number: int | None = None

    @property
    def requested(self) -> bool:
        """True from the first signal on."""
        return self._number is not None

    def error(self) -> KeyboardInterrupt:
        """The exception by which a command ends after the signal."""
        return Terminated() if self._number == signal.SIGTERM else KeyboardInterrupt()

    def _watch(self, reading: int, tell: Callable[[], None]) -> None:
        """Takes signals' numbers from a pipe until that is closed."""
        began = 0.0
        while number := os.read(reading, 1):
            if number[0] not in _SIGNALS:
                continue
            if self._number is None:
                self._number, began = number[0], time.monotonic()
                tell()
            elif time.monotonic() - began > SAME_PRESS:
                os._exit(128 + number[0])


@contextmanager
def deferred_stop(tell: Callable[[], None]) -> Iterator[Stop]:
    """Defers Ctrl-C and SIGTERM within the block, unless they are ignored.

    Args:
        tell: called from a thread at the first one, since what the main thread is in may take long.
    """
    if threading.current_thread() is not threading.main_thread():
        yield Stop()
        return
    stop = Stop()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # A daemon, so that an exception in the block can't be held up.
    watcher = threading.Thread(target=stop._watch, args=(reading, tell), daemon=True)
    watcher.start()
    taken = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # Only a signal that Python handles is written to the pipe.
    before = {number: signal.signal(number, lambda *_: None) for number in taken}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken)
        os.close(writing)
        watcher.join()
        os.close(reading)
