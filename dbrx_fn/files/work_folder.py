"""A hidden work folder of a command: it holds only the command's files, serves one process, and follows no link.

A stranger may have put files there before, and other processes may change it. So the folder is opened once and locked,
and its entries are opened, made and removed by name within the open folder. Links aren't followed. Each file is created
new, so a file that another name links to is never written.
"""

import contextlib
import errno
import fnmatch
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from dbrx_fn.errors import InputError
from dbrx_fn.files.file_lock import OPEN_FOLDER, folder_claimed
from dbrx_fn.files.json_file import LARGEST, shown, shown_path

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL
# With O_NONBLOCK, opening a pipe doesn't wait.
_OLD_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK


class WorkFolder:
    """An open work folder. Names refer to its direct entries."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor

    def names(self) -> list[str]:
        """All names in the folder, sorted."""
        return sorted(os.listdir(self.descriptor))

    def open(self, name: str) -> BinaryIO | None:
        """Opens a file for reading. Returns `None` if it doesn't exist.

        Raises:
            InputError: if it isn't a regular file.
        """
        try:
            descriptor = os.open(name, _OLD_FILE, dir_fd=self.descriptor)
        except FileNotFoundError:
            return None
        except OSError as error:
            # ELOOP means that it is a link.
            if error.errno == errno.ELOOP:
                raise self.refusal(name, "not a regular file") from None
            raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise self.refusal(name, "not a regular file")
        return open(descriptor, "rb")

    def read(self, name: str) -> bytes | None:
        """The content of a small file, or `None` if it doesn't exist or is large."""
        file = self.open(name)
        if file is None:
            return None
        with file:
            content = file.read(LARGEST + 1)
        return content if len(content) <= LARGEST else None

    def create(self, name: str, *, private: bool = False) -> BinaryIO:
        """Creates a file for writing. It replaces one of this name. Only its owner may read a `private` one."""
        self.remove(name)
        return open(os.open(name, _NEW_FILE, 0o600 if private else 0o666, dir_fd=self.descriptor), "wb")

    def write(self, name: str, content: bytes) -> None:
        """Writes a file atomically, replacing one of this name, and waits until its content is on the disk."""
        with self.create(hidden(name)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self.rename(hidden(name), name)

    def rename(self, old: str, new: str) -> None:
        """Renames a file."""
        os.rename(old, new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def move(self, name: str, path: Path) -> None:
        """Moves a file or folder to another place on the same disk."""
        os.rename(name, path, src_dir_fd=self.descriptor)

    def flush(self) -> None:
        """Waits until the folder's list of names is on the disk."""
        os.fsync(self.descriptor)

    def remove(self, name: str) -> None:
        """Removes a file or a link, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)

    def remove_own(self, files: Collection[str], but: Collection[str] = ()) -> None:
        """Removes all files whose names, or names before `hidden`, match the patterns, except those in `but`."""
        for name in self.names():
            if _is_own(name, files) and name not in but:
                self.remove(name)

    def remove_folder(self, name: str) -> None:
        """Removes an empty folder."""
        os.rmdir(name, dir_fd=self.descriptor)

    @contextlib.contextmanager
    def folder(self, name: str) -> Iterator["WorkFolder"]:
        """Opens a folder in this one. It is made if missing."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, dir_fd=self.descriptor)
        try:
            descriptor = os.open(name, OPEN_FOLDER, dir_fd=self.descriptor)
        except NotADirectoryError:
            raise self.refusal(name, "not a folder") from None
        try:
            yield WorkFolder(self.path / name, descriptor)
        finally:
            os.close(descriptor)

    def refuse_foreign(self, files: Collection[str], folder: str | None = None) -> None:
        """Refuses entries that aren't the command's own.

        Args:
            files: patterns of the names that its files can have, before or after `hidden`.
            folder: name of a folder that may exist too.

        Raises:
            InputError: if there is any other entry.
        """
        for name in self.names():
            mode = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False).st_mode
            if name == folder and stat.S_ISDIR(mode):
                continue
            if not _is_own(name, files):
                raise self.refusal(name, "none of its own files")
            if not stat.S_ISREG(mode):
                raise self.refusal(name, "not a regular file")

    def refusal(self, name: str, what: str) -> InputError:
        """The error for a foreign entry."""
        return InputError(
            f"{shown_path(self.path)} is where this command works, and {shown(name)} in it is {what}: move that"
            " elsewhere, or name another place."
        )


def hidden(name: str) -> str:
    """A file's temporary name while it is being written."""
    return f".{name}.unfinished"


def _is_own(name: str, files: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, form) for pattern in files for form in (pattern, hidden(pattern)))


@contextlib.contextmanager
def work_folder(path: Path, taken: str, place: Path | None = None) -> Iterator[WorkFolder]:
    """Opens a work folder. Arguments and errors are those of `folder_claimed`."""
    with folder_claimed(path, taken, place) as descriptor:
        yield WorkFolder(path, descriptor)
