"""Files and folders that appear when they are complete, or not at all.

What is written lies beside its place under a hidden name until it has reached the disk, and is then renamed, which is
one step for any file system. Whoever looks sees what was there before, or all of the new; also after a crash, which
leaves at most something hidden behind. A process holds a lock on what it has hidden, so the next one that writes to the
same place knows what a killed one left, and removes it.
"""

import contextlib
import fnmatch
import os
import re
import secrets
import shutil
import stat
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from dbrx_fn.errors import InputError
from dbrx_fn.files.file_lock import is_still, try_lock
from dbrx_fn.files.json_file import shown


@contextlib.contextmanager
def new_folder(
    path: Path, *, replacing: Collection[str] = (), files: Collection[str] = (), beside: Path | None = None
) -> Iterator[Path]:
    """Yields a hidden folder beside `path` to write into, which becomes `path` when the block ends well.

    Its files are flushed to the disk first. If the block raises, nothing stays.

    Args:
        path: the folder to be made; its parents too, where they are missing.
        replacing: names of files; a folder that holds no others is replaced. That takes two steps, between which
            there is neither the old one nor the new.
        files: patterns of the names that the block writes, by which `remove_leftovers` knows what a killed one left.
        beside: the hidden folder, where the caller has made one; if the block raises, its content is the caller's.

    Raises:
        InputError: if `path` exists and may not be replaced, or an `OSError`, such as a full disk, ends the block.
    """
    _check_name(path)
    replaced = hidden_beside(path)
    try:
        _check_free(path, replacing)
        made = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path, files or replacing)
        with _hidden(path, folder=True) if beside is None else contextlib.nullcontext((beside, -1)) as (hidden, _):
            yield hidden
            for place, _, names in os.walk(hidden):
                for name in names:
                    flush(Path(place, name))
                flush(Path(place))
            # Renaming replaces an empty folder, so one that was made in the meantime would be lost.
            _check_free(path, replacing)
            # Without leave to replace, renaming fails where another process has made the folder just now.
            if replacing and os.path.lexists(path):
                path.rename(replaced)
            hidden.rename(path)
        for folder in (path.parent, *(folder.parent for folder in made)):
            flush(folder)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            for name in replacing:
                (replaced / name).unlink(missing_ok=True)
            replaced.rmdir()


def write_file(path: Path, content: bytes) -> None:
    """Writes a file whole, in place of what is there.

    Raises:
        InputError: if it can't be written; what was there stays.
    """
    with new_file(path) as file:
        file.write(content)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a hidden file beside `path` to write into, which takes `path`'s place when the block ends well.

    If the block raises, nothing stays, and what was there does.

    Raises:
        InputError: if an `OSError`, such as a full disk, ends the block.
    """
    _check_name(path)
    try:
        remove_leftovers(path)
        with _hidden(path, folder=False) as (beside, descriptor):
            with open(descriptor, "wb", closefd=False) as file:
                yield file
            os.fsync(descriptor)
            beside.replace(path)
        flush(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from None


def remove_leftovers(path: Path, files: Collection[str] = ()) -> None:
    """Removes what killed processes left under hidden names beside `path`; what a live one writes is locked, and stays.

    Args:
        path: the file or folder that they were making.
        files: patterns of names. A folder that holds any other file stays too, and a warning says so.
    """
    with contextlib.suppress(OSError):
        for entry in path.parent.iterdir():
            if entry.name.startswith(f".{path.name}-") and is_leftover(entry):
                _remove_leftover(entry, files)


def hidden_beside(path: Path) -> Path:
    """A new hidden name beside `path`, for what isn't whole yet, or no more."""
    return path.parent / f".{path.name}-{secrets.token_hex(4)}.unfinished"


def is_leftover(path: Path) -> bool:
    """Whether `path` has a name such as those of `hidden_beside`, under which a killed process may leave things."""
    return re.fullmatch(r"\..+-[0-9a-f]{8}\.unfinished", path.name) is not None


def flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _hidden(path: Path, *, folder: bool) -> Iterator[tuple[Path, int]]:
    """A new hidden folder or file beside `path`, open and locked until the block ends, and then gone or renamed."""
    while True:
        beside = hidden_beside(path)
        if folder:
            beside.mkdir()
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW if folder else os.O_WRONLY | os.O_CREAT | os.O_EXCL
        descriptor = os.open(beside, flags, 0o666)
        try:
            # Until it is locked it looks like a leftover, and another process may just be removing it.
            if try_lock(descriptor) is not False and is_still(beside, os.fstat(descriptor)):
                yield beside, descriptor
                return
        finally:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                shutil.rmtree(beside) if folder else beside.unlink()


def _remove_leftover(path: Path, files: Collection[str]) -> None:
    try:
        # A link isn't followed, and a pipe not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        status = os.fstat(descriptor)
        # Locked and no more of this name, it has become what it was made for.
        if not try_lock(descriptor) or not is_still(path, status):
            return
        if stat.S_ISREG(status.st_mode):
            path.unlink()
        elif stat.S_ISDIR(status.st_mode):
            foreign = _foreign_file(path, files)
            if foreign is None:
                shutil.rmtree(path)
            else:
                warnings.warn(
                    f"{path} was left by a killed process and holds {foreign}, which is none of its files: move that"
                    " elsewhere and remove the rest.",
                    stacklevel=5,
                )
    finally:
        os.close(descriptor)


def _foreign_file(folder: Path, files: Collection[str]) -> str | None:
    """A name in a folder that isn't of these patterns, or no regular file's."""
    for entry in folder.iterdir():
        own = any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in files)
        if not own or not stat.S_ISREG(entry.lstat().st_mode):
            return shown(entry.name)
    return None


def _check_name(path: Path) -> None:
    try:
        if b"\0" not in os.fsencode(path):
            return
    except UnicodeError:
        pass
    raise InputError(f"{shown(str(path))} can't be a file's name: choose another.")


def _check_free(path: Path, replacing: Collection[str]) -> None:
    if not os.path.lexists(path):
        return
    if not replacing or path.is_symlink() or not path.is_dir() or _foreign_file(path, replacing) is not None:
        raise InputError(f"{path} exists already: name a new folder.")


def _unwritable(path: Path, error: OSError) -> InputError:
    reason = error.strerror or str(error)
    culprit = "" if error.filename is None else os.fsdecode(error.filename)
    # Another file's trouble, such as of one that was to be copied; the hidden name means nothing to anyone.
    if culprit and f"{os.sep}.{path.name}-" not in culprit:
        reason += f": {culprit}"
    return InputError(f"{path} can't be written ({reason}): free some room, or name another place.")
