"""Files and folders that appear when they are complete, or not at all.

A new file is written beside its target under a hidden name. When it is on the disk it is renamed, which is atomic. So a
reader sees either the old content or all of the new, even after a crash, which leaves at most a hidden file. A process
locks its hidden files. The next process that writes to the same target removes unlocked ones, which a killed process
has left.
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
    """Yields a hidden folder beside `path` to write into. It becomes `path` when the block ends without an error.

    Its files are flushed to the disk first. If the block raises, nothing is left.

    Args:
        path: the new folder. Missing parents are made too.
        replacing: names of files. An existing folder that holds no others is replaced. That takes two steps, between
            which neither the old folder nor the new one exists.
        files: patterns of the names that the block writes. `remove_leftovers` recognizes a killed process's files by
            them.
        beside: the hidden folder, if the caller has made one. If the block raises, its content is left to the caller.

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
            # Renaming would replace an empty folder that was made in the meantime.
            _check_free(path, replacing)
            # If nothing may be replaced, renaming fails if another process has just made the folder.
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
    """Writes a file atomically. It replaces an existing one.

    Raises:
        InputError: if it can't be written. An existing file is kept.
    """
    with new_file(path) as file:
        file.write(content)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a hidden file beside `path` to write into. It replaces `path` when the block ends without an error.

    If the block raises, the hidden file is removed and `path` is unchanged.

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
    """Removes hidden files and folders beside `path` that killed processes have left. Locked ones are in use and stay.

    Args:
        path: the file or folder that the processes were making.
        files: patterns of names. A folder with any other file stays too, with a warning.
    """
    with contextlib.suppress(OSError):
        for entry in path.parent.iterdir():
            if entry.name.startswith(f".{path.name}-") and is_leftover(entry):
                _remove_leftover(entry, files)


def hidden_beside(path: Path) -> Path:
    """A new hidden name beside `path`, for a file or folder that is incomplete."""
    return path.parent / f".{path.name}-{secrets.token_hex(4)}.unfinished"


def is_leftover(path: Path) -> bool:
    """Whether `path` has a name of the form of `hidden_beside`."""
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
    """Yields a new hidden folder or file beside `path`, locked during the block, then removed unless renamed."""
    while True:
        beside, descriptor = hidden_beside(path), -1
        if os.path.lexists(beside):
            continue
        try:
            # Ctrl-C may come as soon as the folder or file is there.
            if folder:
                beside.mkdir()
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW if folder else os.O_WRONLY | os.O_CREAT | os.O_EXCL
            descriptor = os.open(beside, flags, 0o666)
            # Before it is locked it looks like a leftover, so another process may be removing it.
            if try_lock(descriptor) is not False and is_still(beside, os.fstat(descriptor)):
                yield beside, descriptor
                return
        finally:
            if descriptor >= 0:
                os.close(descriptor)
            with contextlib.suppress(OSError):
                shutil.rmtree(beside) if folder else beside.unlink()


def _remove_leftover(path: Path, files: Collection[str]) -> None:
    try:
        # The flags follow no link and wait for no pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        status = os.fstat(descriptor)
        # A file that is locked, or has lost this name, is in use.
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
    """The name of an entry that doesn't match these patterns or isn't a regular file, if there is one."""
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
    # The error may be about another file, such as one to copy. The hidden name is left out of messages.
    if culprit and f"{os.sep}.{path.name}-" not in culprit:
        reason += f": {culprit}"
    return InputError(f"{path} can't be written ({reason}): free some room, or name another place.")
