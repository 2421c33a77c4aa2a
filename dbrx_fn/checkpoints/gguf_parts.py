"""The contents of a GGUF file, which may be the first of several that llama.cpp's `llama-gguf-split` has made.

The parts are named NAME-00001-of-0000N.gguf. The first has the metadata, and each knows its number (`split.no`).
"""

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from dbrx_fn.checkpoints.gguf_header import Contents, read_contents
from dbrx_fn.errors import CheckpointError

_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def read_parts(file: Path, whole: Collection[str] = ()) -> Contents:
    """The metadata of a file and the tensors of all its parts.

    Args:
        file: a GGUF file, the first if it has several parts.
        whole: as in `read_contents`.

    Raises:
        CheckpointError: as in `read_contents`; or if a part is missing or disagrees with the first.
    """
    first = read_contents(file, whole)
    count = first.metadata.get("split.count", 0)
    if isinstance(count, int) and count > 1:
        first = _joined(file, first, count)
    if not first.entries:
        raise CheckpointError(f"{file} holds no tensors: name the file with the model's weights.")
    return first


def _joined(file: Path, first: Contents, count: int) -> Contents:
    name = _NAME.fullmatch(file.name)
    if name is None or int(name["count"]) != count:
        raise CheckpointError(
            f"{file} is one of {count} parts, which must be named like {file.stem[:40]}-00001-of-{count:05}.gguf: give"
            " all parts the names that they came with."
        )
    names = [f"{name['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    if file.name != names[0]:
        raise CheckpointError(f"{file} is one of {count} parts: name the first of them, {names[0]}.")
    parts = [first]
    for other in names[1:]:
        if not (file.parent / other).exists():
            raise CheckpointError(f"{file} is one of {count} parts, and {other} isn't beside it: copy all parts there.")
        parts.append(read_contents(file.parent / other))
    for number, part in enumerate(parts):
        said = part.metadata.get("split.no"), part.metadata.get("split.count")
        if said != (number, count):
            raise CheckpointError(
                f"{file.parent / names[number]} says that it is part {said[0]} of {said[1]} where part {number} of"
                f" {count} is expected: take all parts from one conversion."
            )
    entries = tuple(entry for part in parts for entry in part.entries)
    said_tensors = first.metadata.get("split.tensors.count", len(entries))
    if said_tensors != len(entries):
        raise CheckpointError(
            f"{file} and its other parts hold {len(entries)} tensors where it says {said_tensors}: take all parts from"
            " one conversion."
        )
    return replace(first, entries=entries)
