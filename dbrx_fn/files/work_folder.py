"""A hidden folder that a command works in: its own files and no others, one process at a time, and no link followed.

A stranger may have put anything there before, and other processes may change it meanwhile. So the folder is opened once
and locked, and everything in it is opened, made and removed by its name within the open folder. A link in a name's
place then leads nowhere; and since each file is made anew, what another name leads to is never written.
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
# With the last of these, opening a pipe waits for nobody.
_OLD_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK


class WorkFolder:
    """An open folder. Names are of what lies directly in it."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor

    def names(self) -> list[str]:
        """All names in it, sorted."""
        return sorted(os.listdir(self.descriptor))

    def open(self, name: str) -> BinaryIO | None:
        """A file to be read; `None` if there is none.

        Raises:
            InputError: if it is something else than a regular file.
        """
        try:
            descriptor = os.open(name, _OLD_FILE, dir_fd=self.descriptor)
        except FileNotFoundError:
            return None
        except OSError as error:
            # Of a link.
            if error.errno == errno.ELOOP:
                raise self.refusal(name, "no regular file") from None
            raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise self.refusal(name, "no regular file")
        return open(descriptor, "rb")

    def read(self, name: str) -> bytes | None:
        """A small file's content; `None` if there is none, or it is large."""
        file = self.open(name)
        if file is None:
            return None
        with file:
            content = file.read(LARGEST + 1)
        return content if len(content) <= LARGEST else None

    def create(self, name: str, *, private: bool = False) -> BinaryIO:
        """A new file to be written, in place of one of this name. Only its owner may read a private one."""
        self.remove(name)
        return open(os.open(name, _NEW_FILE, 0o600 if private else 0o666, dir_fd=self.descriptor), "wb")

    def write(self, name: str, content: bytes) -> None:
        """Writes a file whole, in place of one of this name, and waits until its content is on the disk."""
        with self.create(hidden(name)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self.rename(hidden(name), name)

    def rename(self, old: str, new: str) -> None:
        """Gives a file another name."""
        os.rename(old, new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def move(self, name: str, path: Path) -> None:
        """Moves a file or folder to another place on the same disk."""
        os.rename(name, path, src_dir_fd=self.descriptor)

    def flush(self) -> None:
        """Waits until all names in it are on the disk."""
        os.fsync(self.descriptor)

    def remove(self, name: str) -> None:
        """Removes a file, if there is one; of a link, the link."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)

    def remove_own(self, files: Collection[str], but: Collection[str] = ()) -> None:
        """Removes files by the patterns of their names, `hidden` or not, except some."""
        for name in self.names():
            if _is_own(name, files) and name not in but:
                self.remove(name)

    def remove_folder(self, name: str) -> None:
        """Removes an empty folder."""
        os.rmdir(name, dir_fd=self.descriptor)

    @contextlib.contextmanager
    def folder(self, name: str) -> Iterator["WorkFolder"]:
        """A folder in this one, made if it isn't there."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, dir_fd=self.descriptor)
        try:
            descriptor = os.open(name, OPEN_FOLDER, dir_fd=self.descriptor)
        except NotADirectoryError:
            raise self.refusal(name, "no folder") from None
        try:
            yield WorkFolder(self.path / name, descriptor)
        finally:
            os.close(descriptor)

    def refuse_foreign(self, files: Collection[str], folder: str | None = None) -> None:
        """Refuses what isn't the command's own.

        Args:
            files: patterns of the names that its files can have, `hidden` or not.
            folder: name of a folder that may be there too.

        Raises:
            InputError: if anything else is there.
        """
        for name in self.names():
            mode = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False).st_mode
            if name == folder and stat.S_ISDIR(mode):
                continue
            if not _is_own(name, files):
                raise self.refusal(name, "none of its own files")
            if not stat.S_ISREG(mode):
                raise self.refusal(name, "no regular file")

    def refusal(self, name: str, what: str) -> InputError:
        """What is said of something that is in the way."""
        return InputError(
            f"{shown_path(self.path)} is where this command works, and {shown(name)} in it is {what}: move that"
            " elsewhere, or name another place."
        )


def hidden(name: str) -> str:
    """A file's name while it is being written."""
    return f".{name}.unfinished"


def _is_own(name: str, files: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, form) for pattern in files for form in (pattern, hidden(pattern)))


@contextlib.contextmanager
def work_folder(path: Path, taken: str, place: Path | None = None) -> Iterator[WorkFolder]:
    """Opens a work folder; arguments and errors are those of `folder_claimed`."""
    with folder_claimed(path, taken, place) as descriptor:
        yield WorkFolder(path, descriptor)
