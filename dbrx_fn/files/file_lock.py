"""Keeps two processes from writing to the same place."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from dbrx_fn.errors import InputError

OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
"""How a folder is opened, and no link to one."""


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
def locked(path: Path, taken: str) -> Iterator[None]:
    """Holds a lock on a file or folder that exists; it goes with the process, however that ends.

    Raises:
        InputError: saying `taken`, if another process holds it.
        OSError: if it can't be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if try_lock(descriptor) is False:
            raise InputError(taken)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def folder_claimed(path: Path, taken: str, place: Path | None = None) -> Iterator[int]:
    """Makes a folder and its parents, or takes the one that a killed process left, and holds a lock on it.

    Yields the open folder's descriptor.

    The lock is the folder's, also under another name. An empty folder is removed at the end.

    Args:
        path: the folder.
        taken: the sentence for whoever comes second.
        place: what a sentence calls it, if `path` is a hidden name.

    Raises:
        InputError: saying `taken`, if another process holds it; or if it can't be made, or is no folder, as a link to
            one isn't.
    """
    while True:
        try:
            with contextlib.suppress(FileExistsError):
                path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _made(path)
        except OSError as error:
            said = f"{place or path} can't be written ({error.strerror or error}): name another place."
            raise InputError(said) from None
        if descriptor is None:
            continue
        try:
            if try_lock(descriptor) is False:
                raise InputError(taken)
            # Whoever held it may have renamed or removed it just before.
            if is_still(path, os.fstat(descriptor)):
                try:
                    yield descriptor
                finally:
                    if is_still(path, os.fstat(descriptor)):
                        with contextlib.suppress(OSError):
                            path.rmdir()
                return
        finally:
            os.close(descriptor)


def is_still(path: Path, status: os.stat_result) -> bool:
    """Whether a name is still that of a file whose status this is."""
    try:
        return os.path.samestat(path.lstat(), status)
    except FileNotFoundError:
        return False


def _made(path: Path) -> int | None:
    """A folder's descriptor, made if need be; `None` if whoever held it has renamed or removed it just now."""
    with contextlib.suppress(FileExistsError):
        path.mkdir()
    try:
        return os.open(path, OPEN_FOLDER)
    except FileNotFoundError:
        return None
