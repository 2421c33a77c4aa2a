"""Reads JSON from untrusted files: regular files of bounded size, with one-line reasons for errors."""

import json
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dbrx_fn.errors import CheckpointError

LARGEST = 16 * 2**20
"""The most bytes of a JSON file. Parsed, it takes up to 20 times its size. DBRX's largest, an index, has 1 MB."""

LARGEST_VOCABULARY = 64 * 2**20
"""The most bytes of a tokenizer's file. The largest known, with 260 thousand tokens, have 33 MB."""


POINTER = b"version https://git-lfs.github.com/spec/v1"
"""The beginning of a Git LFS pointer file (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md)."""


def refuse_pointer(path: Path, content: bytes) -> None:
    """Raises `CheckpointError` if a file's content, or its beginning, is a Git LFS pointer."""
    if content.startswith(POINTER):
        raise CheckpointError(
            f"{path} is a Git LFS pointer in place of the file: run `git lfs pull` in the folder that was cloned."
        )


def read_bounded(path: Path, most: int = LARGEST) -> bytes:
    """The content of a regular file. Other files aren't opened: a pipe would wait forever, and a device never ends.

    Raises:
        OSError: if the file doesn't exist or can't be read.
        ValueError: if it isn't a regular file, or has more than `most` bytes.
        CheckpointError: if Git LFS has left a pointer in its place.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    if status.st_size > most:
        raise ValueError(f"its {status.st_size} bytes are more than the {most} that are read")
    content = path.read_bytes()
    refuse_pointer(path, content)
    return content


def parse_json(content: bytes, *, unique: bool = False) -> object:
    """The value of UTF-8 JSON. With `unique`, duplicate keys are an error, since readers disagree which one counts.

    Raises:
        ValueError: if it isn't such JSON. The text gives a short reason.
    """
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_without_repeats if unique else None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None


def shown(value: object, most: int = 80) -> str:
    """A value as text for a message, shortened if it is long."""
    text = ""
    try:
        for piece in _pieces(value, most):
            text += piece
            if len(text) > most:
                return text[: most - 1] + "…"
    except ValueError:
        # The integer has more digits than Python prints.
        return f"a huge {type(value).__name__}"
    return text


def _pieces(value: object, most: int) -> Iterator[str]:
    """Yields `repr` piece by piece, so only the first items of a huge value are visited."""
    if isinstance(value, str):
        yield repr(value[: most + 1])
    elif isinstance(value, list):
        yield "["
        for number, item in enumerate(value):
            yield ", " if number else ""
            yield from _pieces(item, most)
        yield "]"
    elif isinstance(value, dict):
        yield "{"
        for number, (key, item) in enumerate(value.items()):
            yield ", " if number else ""
            yield from _pieces(key, most)
            yield ": "
            yield from _pieces(item, most)
        yield "}"
    else:
        yield repr(value)


def shown_path(path: Path | str) -> str:
    """A file's name as text for a message. It is escaped if it isn't printable."""
    return str(path) if str(path).isprintable() else shown(str(path), 200)


def is_plain_name(name: object, most: int) -> bool:
    """Whether this is a text that messages can show unchanged: not empty, at most `most` bytes, all printable."""
    return isinstance(name, str) and 0 < len(name) <= most and name.isprintable() and len(name.encode()) <= most


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{shown(twice)} is there twice")
    return found
