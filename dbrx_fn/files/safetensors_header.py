"""Reads and checks a safetensors file's header, before any tensor is read.

The safetensors library checks it first. The library takes the last of two tensors of one name, names that can't be
printed, and sizes beyond the 32 bits that MLX has for them. Those are refused here.
Format: https://github.com/huggingface/safetensors#format.
"""

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dbrx_fn.files.json_file import LARGEST, POINTER, is_plain_name, parse_json, refuse_pointer, shown
from dbrx_fn.files.regular_file import open_regular

LONGEST_NAME = 256
"""The most bytes of a tensor's name."""

_MOST_AXES = 8
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class HeaderTensor:
    """One tensor in a header: the format's name of its dtype, its shape, and the offset of its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Header:
    """A header's tensors by name, and its metadata texts."""

    tensors: Mapping[str, HeaderTensor]
    texts: Mapping[str, str]


def checked_header(file: Path) -> Header:
    """The header of a file, after a check that the file has the length that its header implies.

    Raises:
        OSError: if the file can't be opened, or there is no memory to map it.
        ValueError: if it isn't such a file. The text gives a short reason.
        CheckpointError: if Git LFS has left a pointer in its place.
    """
    with open_regular(file) as opened:
        start = opened.read(8)
        if start == POINTER[:8]:
            refuse_pointer(file, start + opened.read(len(POINTER)))
        length = int.from_bytes(start, "little")
        # A parsed header takes many times its size in memory.
        if length > LARGEST:
            raise ValueError(f"its header has {length} bytes, more than the {LARGEST} that are read")
        content = opened.read(length)
    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(_reason(error)) from None
    except (MemoryError, OSError):
        # The library maps the entire file. Which of the two it raises differs by its release.
        reason = f"its {file.stat().st_size} bytes can't be mapped within the limit of `ulimit -v`"
        raise OSError(errno.ENOMEM, reason) from None
    if not content.startswith(b"{"):
        raise ValueError("its header doesn't begin with {")
    header: Any = parse_json(content, unique=True)
    texts = header.pop("__metadata__", None) or {}
    return Header({name: _tensor(name, entry, 8 + length) for name, entry in header.items()}, texts)


def _tensor(name: str, entry: Any, data_start: int) -> HeaderTensor:
    """A tensor's entry, which the library has checked. Raises ValueError if MLX or a message can't hold it."""
    if not is_plain_name(name, LONGEST_NAME):
        raise ValueError(f"{shown(name)} can't be a tensor's name")
    # The library accepts lists instead of objects, an object instead of a dtype's name, and unknown fields.
    if not isinstance(entry, dict) or entry.keys() != _FIELDS or not isinstance(entry["dtype"], str):
        raise ValueError(f"{name} is {shown(entry)} where its dtype, shape and data_offsets are expected")
    shape = entry["shape"]
    if len(shape) > _MOST_AXES or any(size >= 2**31 for size in shape):
        raise ValueError(f"{name} has the shape {shown(shape)}")
    return HeaderTensor(entry["dtype"], tuple(shape), data_start + entry["data_offsets"][0])


def _reason(error: SafetensorError) -> str:
    """The library's reason, made safe to show, since it may quote the file."""
    text = str(error).removeprefix("Error while deserializing header: ")
    return text if text.isprintable() and len(text) <= 200 else shown(text, 200)
