"""Ctrl-C and SIGTERM during work that should be saved first.

The first signal asks for a stop, and the work checks for it at points where it can be saved. Another signal, a second
or more later, ends the process at once, even while it waits for the device or the disk.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dbrx_fn.cli.command import SAME_PRESS, Terminated
from dbrx_fn.runtime.group import group

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether a stop was asked for."""

    def __init__(self) -> None:
        self._number: int | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._number is not None

    def error(self) -> KeyboardInterrupt:
        """The exception that ends a command after the signal."""
        return Terminated() if self._number == signal.SIGTERM else KeyboardInterrupt()

    def _watch(self, reading: int, tell: Callable[[], None]) -> None:
        """Reads signals' numbers from a pipe until the pipe is closed."""
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
    """Defers Ctrl-C and SIGTERM within the block, unless they are ignored. Of several processes only one gets them.

    Args:
        tell: called at the first signal, from another thread, since the main thread may be busy for long.
    """
    if threading.current_thread() is not threading.main_thread() or not group().leads:
        yield Stop()
        return
    stop = Stop()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # A daemon thread can't hold up an exception in the block.
    watcher = threading.Thread(target=stop._watch, args=(reading, tell), daemon=True)
    watcher.start()
    taken = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # Python writes only signals with a handler to the pipe.
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
