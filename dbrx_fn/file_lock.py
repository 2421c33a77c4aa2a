"""Keeps two processes from writing to the same place."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from dbrx_fn.errors import InputError


@contextlib.contextmanager
def locked(file: Path, taken: str) -> Iterator[None]:
    """Holds a lock on a file that exists; it goes with the process, however that ends.

    Raises:
        InputError: saying `taken`, if another process holds it.
    """
    with file.open("rb") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(taken) from None
        except OSError:
            # Some network file systems have no locks, and hold files as well.
            pass
        yield
