"""Finds and reads data files: texts as a whole, JSON rows one by one."""

import io
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dbrx_fn.errors import InputError
from dbrx_fn.files.json_file import parse_json, read_bounded, shown, shown_path
from dbrx_fn.files.regular_file import open_regular

TEXT_FILES = (".txt", ".text", ".md", ".markdown", ".rst", ".tex")
LINE_FILES = (".jsonl", ".ndjson")
ROW_FILES = (*LINE_FILES, ".json")

LARGEST_FILE = 2**34
"""The most bytes of a file of text or lines."""

LARGEST_ROW = 2**26
"""The most bytes of a line, or of a .json file. Parsed, JSON takes up to twenty times its size."""

_CHUNK = 2**20


def find_files(path: Path) -> list[Path]:
    """The path itself if it is a file, or a folder's files of texts and rows, at any depth, in sorted order.

    Hidden files and folders are skipped. Links are followed, and a file or folder with several names is taken once, so
    cycles end. Files of other kinds are skipped with a warning.

    Raises:
        InputError: if a folder can't be read, or holds no such file.
    """
    # Path.is_dir would raise if a name is too long.
    if not os.path.isdir(path):
        return [path]

    def fail(error: OSError) -> None:
        raise InputError(
            f"{shown_path(error.filename)} can't be read ({error.strerror}): check the folder's permissions."
        )

    found: list[Path] = []
    others: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(path, onerror=fail, followlinks=True):
        visible = [name for name in folders if not name.startswith(".")]
        # A folder's own name comes before links to it.
        folders[:] = sorted(visible, key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        if _seen_before(folder, seen):
            folders.clear()
            continue
        for name in sorted(names):
            suffix = Path(name).suffix.lower()
            if name.startswith("."):
                continue
            if suffix not in (*TEXT_FILES, *ROW_FILES):
                others[suffix or "no ending"] += 1
            elif not _seen_before(os.path.join(folder, name), seen):
                found.append(Path(folder, name))
    if not found:
        raise InputError(
            f"{shown_path(path)} holds no {', '.join((*TEXT_FILES, *ROW_FILES))} file: name another folder."
        )
    if others:
        kinds = ", ".join(f"{count} of {suffix}" for suffix, count in others.most_common(5))
        warnings.warn(f"{shown_path(path)}: files of other kinds are passed over ({kinds}).", stacklevel=2)
    return sorted(found)


def holds_rows(path: Path) -> bool:
    """Whether a file holds rows, by its name's ending. Otherwise it is a text.

    Raises:
        InputError: if the ending belongs to neither.
    """
    suffix = path.suffix.lower()
    if suffix and suffix not in (*TEXT_FILES, *ROW_FILES):
        raise InputError(
            f"{shown_path(path)} ends in {shown_path(suffix)}, which isn't read: give rows as {', '.join(ROW_FILES)}, "
            "and text of any kind as .txt."
        )
    return suffix in ROW_FILES


def read_text(path: Path) -> str:
    """A text file's content, without a byte order mark.

    Raises:
        InputError: if the file is missing, isn't a regular file, is too large, or isn't UTF-8 text.
    """
    content = bytearray()
    with _open(path) as file:
        try:
            while chunk := file.read(_CHUNK):
                if 0 in chunk:
                    raise InputError(f"{shown_path(path)} holds a zero byte, so it is no text: name another file.")
                content += chunk
            return content.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{shown_path(path)} isn't UTF-8 at byte {error.start} ({error.reason}): convert it first."
            ) from None
        except OSError as error:
            raise _unreadable(path, error) from None
        except MemoryError:
            raise InputError(
                f"{shown_path(path)} is larger than this machine's memory: cut it into several files."
            ) from None


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """The rows of a JSON file, each with its name for messages.

    A .json file is a list of rows, or one row. In other files each line that isn't blank is a row.

    Raises:
        InputError: as in `read_text`, or if a row isn't a JSON object.
    """
    if path.suffix.lower() in LINE_FILES:
        yield from _read_lines(path)
        return
    try:
        value = _parse(read_bounded(path, LARGEST_ROW), shown_path(path))
    except FileNotFoundError:
        raise _missing(path) from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{shown_path(path)} can't be read ({error}): check it, or write it as .jsonl, a row to a line."
        ) from None
    rows = value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, start=1):
        source = f"{shown_path(path)}, row {number}" if isinstance(value, list) else shown_path(path)
        yield source, _as_row(row, source)


def _read_lines(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    with _open(path) as file:
        number = 0
        while True:
            try:
                line = file.readline(LARGEST_ROW + 1)
            except OSError as error:
                raise _unreadable(path, error) from None
            if not line:
                return
            number += 1
            source = f"{shown_path(path)}, line {number}"
            if len(line) > LARGEST_ROW:
                raise InputError(f"{source}: it has more than {LARGEST_ROW} bytes, which is no row: cut it.")
            if line.strip() not in (b"", b"\xef\xbb\xbf"):
                yield source, _as_row(_parse(line, source), source)


def _parse(content: bytes, source: str) -> object:
    try:
        return parse_json(content, unique=True)
    except ValueError as error:
        raise InputError(f"{source}: this isn't JSON ({error}): correct it.") from None


def _as_row(value: object, source: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise InputError(f"{source}: {shown(value)} is found where a JSON object is expected.")
    return value


def _open(path: Path) -> io.BufferedReader:
    try:
        file = open_regular(path)
    except FileNotFoundError:
        raise _missing(path) from None
    # A name with a zero byte raises ValueError.
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    size = os.fstat(file.fileno()).st_size
    if size > LARGEST_FILE:
        file.close()
        raise InputError(
            f"{shown_path(path)} has {size} bytes, more than the {LARGEST_FILE} that are read: cut it into several."
        )
    return io.BufferedReader(file)


def _missing(path: Path) -> InputError:
    return InputError(f"{shown_path(path)} doesn't exist: name a file of text or rows, or a folder of them.")


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(f"{shown_path(path)} can't be read ({reason}): check the name and the file's permissions.")


def _seen_before(path: str, seen: set[tuple[int, int]]) -> bool:
    """Whether this file or folder was seen under another name."""
    try:
        status = os.stat(path)
    except OSError:
        # The reader reports this error.
        return False
    place = (status.st_dev, status.st_ino)
    before = place in seen
    seen.add(place)
    return before
