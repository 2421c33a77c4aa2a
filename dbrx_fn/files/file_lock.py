"""Locks that keep two processes from writing to the same place."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from dbrx_fn.errors import InputError

OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
"""Flags that open a folder, but no link to one."""


def try_lock(descriptor: int) -> bool | None:
    """Locks an open file or folder until it is closed, at the latest by the end of the process.

    Returns:
        `True` on success, `False` if another process holds the lock, and `None` if the file system has no locks, as
        some network file systems.
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
    """Holds a lock on an existing file or folder. The lock ends with the process, at the latest.

    Raises:
        InputError: with the text `taken`, if another process holds the lock.
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
    """Makes a folder and its parents, or opens an existing one, and holds a lock on it. Yields its descriptor.

    The lock stays with the folder if it is renamed. An empty folder is removed at the end.

    Args:
        path: the folder.
        taken: the error's text if another process holds the lock.
        place: the name to use in errors, if `path` is a hidden name.

    Raises:
        InputError: with the text `taken`, if another process holds the lock; or if the folder can't be made; or if
            `path` is a link or a file.
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
            # The last holder of the lock may have renamed or removed the folder.
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
    """Whether `path` still names the file with this status."""
    try:
        return os.path.samestat(path.lstat(), status)
    except FileNotFoundError:
        return False


def _made(path: Path) -> int | None:
    """The descriptor of a folder, made if missing. `None` if another process has just renamed or removed it."""
    with contextlib.suppress(FileExistsError):
        path.mkdir()
    try:
        return os.open(path, OPEN_FOLDER)
    except FileNotFoundError:
        return None
