"""Sizes and SHA-256 sums of files, noted when files are written and compared when they are read again.

A note is a JSON object with a sum of itself, so damage to the note is found too. The sums detect damage and mix-ups,
but don't show who wrote a file.
"""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dbrx_fn.files.json_file import LARGEST, parse_json, read_bounded, shown
from dbrx_fn.files.regular_file import open_regular

SEAL = "checksum"
"""The key of a note's own sum."""

_AT_ONCE = 2**20


def file_sum(path: Path, most: int | None = None) -> dict[str, Any]:
    """A file's `bytes` and `sha256`, in hexadecimal.

    Args:
        path: a regular file.
        most: the most bytes that it may have.

    Raises:
        OSError: if it can't be read.
        ValueError: if it isn't a regular file, or has more than `most` bytes.
    """
    with open_regular(path) as file:
        found = os.fstat(file.fileno()).st_size
        if most is not None and found > most:
            raise ValueError(f"its {found} bytes are more than the {most} that are read")
        digest, size, block = hashlib.sha256(), 0, memoryview(bytearray(_AT_ONCE))
        while read := file.readinto(block):
            digest.update(block[:read])
            size += read
    return {"bytes": size, "sha256": digest.hexdigest()}


def folder_sums(folder: Path) -> dict[str, dict[str, Any]]:
    """The sums of all files under a folder, by their paths within it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {file.relative_to(folder).as_posix(): file_sum(file) for file in files}


def sealed(note: Mapping[str, Any]) -> dict[str, Any]:
    """The note with a sum of its content."""
    return {**note, SEAL: _seal(note)}


def read_note(path: Path, *forms: Collection[str]) -> dict[str, Any]:
    """Reads a note, which must have exactly the keys of one of the `forms`. A note with `SEAL` is checked against it.

    Raises:
        OSError: if the file doesn't exist or can't be read.
        ValueError: if it isn't such a note. The text gives a short reason.
    """
    note = parse_json(read_bounded(path, LARGEST), unique=True)
    if not isinstance(note, dict) or set(note) not in [set(form) for form in forms]:
        raise ValueError(f"it must hold {', '.join(forms[0])}")
    if SEAL in note and note[SEAL] != _seal({key: value for key, value in note.items() if key != SEAL}):
        raise ValueError(f"its {SEAL} is {shown(note[SEAL])}, which isn't that of its content")
    return note


def disagreement(found: Mapping[str, Any], noted: object) -> str | None:
    """How a file's sum differs from the noted one, in words, or `None` if they agree."""
    if not isinstance(noted, dict) or noted.keys() != found.keys():
        return f"it was noted as {shown(noted)}"
    if found["bytes"] != noted["bytes"]:
        return f"it has {found['bytes']} bytes where {shown(noted['bytes'])} were written"
    if found["sha256"] != noted["sha256"]:
        return "it has other bytes than were written"
    return None


def _seal(note: Mapping[str, Any]) -> str:
    content = json.dumps(note, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()
