"""Opens regular files and nothing else."""

import io
import os
import stat
from pathlib import Path


def open_regular(path: Path) -> io.BufferedReader:
    """Opens a regular file, or a link to one, to read its bytes.

    Other files are refused: a pipe would wait for a writer, and a device may never end.

    Raises:
        OSError: if it can't be opened.
        ValueError: if it isn't a regular file.
    """
    # With O_NONBLOCK, opening a pipe doesn't wait.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is not a regular file")
    return open(descriptor, "rb")
