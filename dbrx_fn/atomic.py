"""Files and folders that appear when they are complete, or not at all.

What is written lies beside its place under a hidden name until it has reached the disk, and is then renamed, which is
one step for any file system. Whoever looks sees what was there before, or all of the new; also after a crash, which
leaves at most something hidden behind.
"""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from dbrx_fn.errors import InputError


@contextlib.contextmanager
def new_folder(path: Path, *, replacing: Collection[str] = ()) -> Iterator[Path]:
    """Yields a hidden folder beside `path` to write into, which becomes `path` when the block ends well.

    Its files are flushed to the disk first. If the block raises, nothing stays.

    Args:
        path: the folder to be made; its parents too, where they are missing.
        replacing: names of files; a folder that holds no others is replaced. That takes two steps, between which
            there is neither the old one nor the new.

    Raises:
        InputError: if `path` exists and may not be replaced, or an `OSError`, such as a full disk, ends the block.
    """
    beside, replaced = hidden_beside(path), hidden_beside(path)
    try:
        _check_free(path, replacing)
        made = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.mkdir()
        yield beside
        for place, _, files in os.walk(beside):
            for name in files:
                flush(Path(place, name))
            flush(Path(place))
        # Renaming replaces an empty folder, so one that was made in the meantime would be lost.
        _check_free(path, replacing)
        if os.path.lexists(path):
            path.rename(replaced)
        beside.rename(path)
        for folder in (path.parent, *(folder.parent for folder in made)):
            flush(folder)
    except OSError as error:
        raise _unwritable(path, error, beside) from None
    finally:
        # If all went well, only what was replaced is still hidden.
        for hidden in (beside, replaced):
            shutil.rmtree(hidden, ignore_errors=True)


def write_file(path: Path, content: bytes) -> None:
    """Writes a file whole, in place of what is there.

    Raises:
        InputError: if it can't be written; what was there stays.
    """
    beside = hidden_beside(path)
    try:
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        flush(path.parent)
    except OSError as error:
        raise _unwritable(path, error, beside) from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


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


def _check_free(path: Path, replacing: Collection[str]) -> None:
    if not os.path.lexists(path):
        return
    if not replacing or path.is_symlink() or not path.is_dir() or set(os.listdir(path)) - set(replacing):
        raise InputError(f"{path} exists already: name a new folder.")


def _unwritable(path: Path, error: OSError, beside: Path) -> InputError:
    reason = error.strerror or str(error)
    culprit = "" if error.filename is None else os.fsdecode(error.filename)
    # Another file's trouble, such as of one that was to be copied; the hidden name means nothing to anyone.
    if culprit and not culprit.startswith(str(beside)):
        reason += f": {culprit}"
    return InputError(f"{path} can't be written ({reason}): free some room, or name another place.")
