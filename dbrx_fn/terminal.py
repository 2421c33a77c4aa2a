"""What all commands share of how they speak to a terminal: exit status, warnings, progress."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

INTERRUPTED = 130
"""The exit status by which shells know that Ctrl-C ended a command."""


@contextmanager
def printed_warnings() -> Iterator[None]:
    """Prints warnings as plain lines on standard error, each once, without the place in the code they came from."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        # Plain print would write into a progress bar.
        tqdm.write(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield


@contextmanager
def byte_progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a progress bar, on a terminal only; yields what it is told bytes done and bytes in all with."""
    with tqdm(desc=name, unit="B", unit_scale=True, unit_divisor=1024, disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def size_text(nbytes: float) -> str:
    """A number of bytes as people read it: `245.1 GiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:,.0f} {unit}" if unit == "bytes" else f"{nbytes:,.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.1f} GiB"


def close_standard_output() -> None:
    """Keeps Python from complaining once more when it flushes at exit what its reader doesn't want any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
