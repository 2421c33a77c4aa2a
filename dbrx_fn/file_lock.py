"""Keeps two processes from writing to the same place."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from dbrx_fn.errors import InputError


def try_lock(descriptor: int) -> bool | None:
    """Locks an open file or folder until it is closed, which the process's end does too, however it ends.

    Returns:
        Whether that succeeded: `False` where another process holds the lock, `None` where the file system has none,
        as some of networks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def locked(file: Path, taken: str) -> Iterator[None]:
    """Holds a lock on a file that exists; it goes with the process, however that ends.

    Raises:
        InputError: saying `taken`, if another process holds it.
    """
    with file.open("rb") as opened:
        if try_lock(opened.fileno()) is False:
            raise InputError(taken)
        yield
