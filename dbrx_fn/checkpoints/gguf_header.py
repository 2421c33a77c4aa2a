"""What a GGUF file says before its tensors' data: metadata, and what tensors lie where.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Everything is checked here, since MLX's own
reader (MLX 0.32.4) ends the process where a damaged file's counts or offsets are wrong, or a number has 64 bits.
"""

import math
import os
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dbrx_fn.checkpoints.gguf_types import NAMES, REFUSED, TYPES, BlockType
from dbrx_fn.errors import CheckpointError
from dbrx_fn.files.json_file import LARGEST_VOCABULARY, POINTER, refuse_pointer, shown

_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
# llama.cpp's own limits are these two and four dimensions.
_LONGEST_KEY = 2**16 - 1
_LONGEST_TENSOR_NAME = 64
_MOST_DIMENSIONS = 4
# Far above what any file holds, and far below what would cost noticeable time or memory.
_LONGEST_STRING = 2**26
_MOST_KEYS = 2**16
_MOST_KEY_BYTES = 2**24
_MOST_TENSORS = 2**17
_MOST_ARRAY_ITEMS = 2**22
_LONGEST_STRING_KEPT = 2**10
_MOST_ITEMS_KEPT = 2**20
# MLX counts the elements of an axis in 32-bit integers.
_INT32 = 2**31

_BOOL, _STRING, _ARRAY = 7, 8, 9
# Metadata's number types, as `struct` knows them.
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", _BOOL: "<B", 10: "<Q", 11: "<q", 12: "<d"}


@dataclass(frozen=True)
class Entry:
    """One tensor as its file has it: `shape` with the innermost axis last, `start` in bytes from the file's."""

    file: Path
    name: str
    type: BlockType
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Contents:
    """What a file says before its tensors' data.

    `metadata`: its numbers and short strings. `None` stands for anything else.
    `whole`: those lists and strings of any length that were asked for.
    `entries`: the tensors in the file's order.
    """

    metadata: Mapping[str, float | str | None]
    whole: Mapping[str, str | list[Any]]
    entries: tuple[Entry, ...]


def read_contents(file: Path, whole: Collection[str] = ()) -> Contents:
    """Reads and checks everything before one file's tensors, and that the tensors are all there.

    Args:
        file: the GGUF file.
        whole: keys of metadata whose lists and long strings are kept.

    Raises:
        CheckpointError: if the file is missing, damaged, or holds what can't be read; it names the tensor.
    """
    if file.exists() and not file.is_file():
        raise CheckpointError(f"{file} isn't a file: name the .gguf file itself.")
    try:
        with file.open("rb") as opened:
            return _Reader(file, opened, whole).contents()
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error.strerror or error}.") from None


class _Reader:
    """Reads a file's header in order. Nothing is read, skipped or kept before it is known to lie inside the file."""

    def __init__(self, file: Path, opened: BinaryIO, whole: Collection[str]) -> None:
        self._file = file
        self._wanted = whole
        self._whole: dict[str, str | list[Any]] = {}
        self._whole_bytes = 0
        self._opened = opened
        self._size = os.fstat(opened.fileno()).st_size
        self._at = 0
        self._array_items = 0
        self._key_bytes = 0

    def contents(self) -> Contents:
        tensors, keys = self._counts()
        metadata = dict(self._key_value() for _ in range(keys))
        if len(metadata) < keys:
            raise self._damaged("a metadata key is there twice")
        alignment = self._alignment(metadata)
        infos = [self._tensor_info() for _ in range(tensors)]
        return Contents(metadata, self._whole, self._placed(infos, alignment))

    def _counts(self) -> tuple[int, int]:
        magic = self._opened.read(len(POINTER))
        refuse_pointer(self._file, magic)
        self._opened.seek(0)
        if self._size < 4 or self._take(4, "magic") != b"GGUF":
            raise self._refused("isn't a GGUF file, which begins with the letters GGUF")
        version = self._integer("<I", "version")
        if version and version % 2**16 == 0:
            raise self._refused("is big-endian: convert it with gguf-convert-endian, of the package gguf")
        if version not in _VERSIONS:
            raise self._refused(f"is GGUF of version {version}, and only 2 and 3 are read: convert the model again")
        tensors, keys = self._integer("<Q", "count of tensors"), self._integer("<Q", "count of metadata")
        if tensors > _MOST_TENSORS or keys > _MOST_KEYS:
            raise self._damaged(f"it claims {tensors} tensors and {keys} metadata")
        return tensors, keys

    def _key_value(self) -> tuple[str, float | str | None]:
        key = self._text(_LONGEST_KEY, "metadata's key")
        self._key_bytes += len(key)
        if self._key_bytes > _MOST_KEY_BYTES:
            raise self._damaged(f"its metadata's keys have more than {_MOST_KEY_BYTES} characters")
        what = f"metadata {shown(key)}"
        return key, self._value(key, self._integer("<I", f"type of {what}"), what)

    def _value(self, key: str, kind: int, what: str) -> float | str | None:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind], what, is_bool=kind == _BOOL)
        if kind == _STRING:
            string = self._string(_LONGEST_STRING, what)
            if key in self._wanted:
                self._whole[key] = self._kept(string, what)
            return self._short(string)
        if kind != _ARRAY:
            raise self._damaged(f"{what} is of type {kind}, which GGUF doesn't have")
        items = self._array(self._integer("<I", what), self._integer("<Q", what), what, key in self._wanted)
        if items is not None:
            self._whole[key] = items
        return None

    def _array(self, kind: int, count: int, what: str, is_kept: bool) -> list[Any] | None:
        self._array_items += count
        if self._array_items > _MOST_ARRAY_ITEMS or (is_kept and count > _MOST_ITEMS_KEPT):
            raise self._damaged(f"{what} claims {count} items")
        if kind in _NUMBERS:
            numbers = self._take(count * struct.calcsize(_NUMBERS[kind]), what)
            return [number for (number,) in struct.iter_unpack(_NUMBERS[kind], numbers)] if is_kept else None
        if kind != _STRING:
            raise self._refused(f"has {what} as an array of type {kind}, which isn't read: convert the model again")
        strings = (self._string(_LONGEST_STRING, what) for _ in range(count))
        if is_kept:
            return [self._kept(string, what) for string in strings]
        for _ in strings:
            pass
        return None

    def _kept(self, string: bytes, what: str) -> str:
        self._whole_bytes += len(string)
        if self._whole_bytes > LARGEST_VOCABULARY:
            raise self._refused(f"has more than {LARGEST_VOCABULARY} bytes of vocabulary: take another file")
        try:
            return string.decode()
        except UnicodeDecodeError:
            raise self._damaged(f"{what} isn't UTF-8") from None

    def _alignment(self, metadata: Mapping[str, float | str | None]) -> int:
        value = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(value, int) or value < 8 or value.bit_count() != 1:
            raise self._damaged(f"general.alignment is {shown(value)} where it must be a power of 2, at least 8")
        return value

    def _tensor_info(self) -> tuple[str, BlockType, tuple[int, ...], int]:
        """Name, type, shape and place in the data section."""
        name = self._text(_LONGEST_TENSOR_NAME, "tensor's name")
        what = f"tensor {name!r}"
        dimensions = self._integer("<I", what)
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self._damaged(f"the {what} has {dimensions} dimensions")
        # The file lists the innermost first.
        shape = tuple(self._integer("<Q", what) for _ in range(dimensions))[::-1]
        if not all(0 < size < _INT32 for size in shape):
            raise self._damaged(f"the {what} has the shape {shape}")
        number = self._integer("<I", what)
        if number not in TYPES:
            unread = REFUSED.get(number, f"of the unknown type {number}")
            raise self._refused(f"has the {what} as {unread}, and only {NAMES} are read: quantize to one of these")
        kind = TYPES[number]
        if shape[-1] % kind.items:
            raise self._damaged(f"the {what} is {kind.name} with rows of {shape[-1]}, not of whole blocks")
        return name, kind, shape, self._integer("<Q", what)

    def _placed(self, infos: list[tuple[str, BlockType, tuple[int, ...], int]], alignment: int) -> tuple[Entry, ...]:
        """The tensors with their places, which must follow each other as llama.cpp requires: no gap, no overlap."""
        data = _aligned(self._at, alignment)
        end = 0
        entries = []
        for name, kind, shape, offset in infos:
            due = _aligned(end, alignment)
            if offset != due:
                raise self._damaged(f"the tensor {name!r} lies at offset {offset} where it must be at {due}")
            entries.append(Entry(self._file, name, kind, shape, data + offset))
            end = offset + math.prod(shape) // kind.items * kind.size
        if data + end > self._size:
            raise self._damaged(f"its tensors need {data + end} bytes and it has {self._size}")
        return tuple(entries)

    def _number(self, code: str, what: str, *, is_bool: bool) -> float:
        value: float = struct.unpack(code, self._take(struct.calcsize(code), what))[0]
        if is_bool and value > 1:
            raise self._damaged(f"{what} is {value} where it must be true or false")
        return bool(value) if is_bool else value

    def _integer(self, code: str, what: str) -> int:
        return int(self._number(code, what, is_bool=False))

    def _text(self, longest: int, what: str) -> str:
        try:
            return self._string(longest, what).decode()
        except UnicodeDecodeError:
            raise self._damaged(f"a {what} isn't UTF-8") from None

    def _short(self, string: bytes) -> str | None:
        return string.decode(errors="replace") if len(string) <= _LONGEST_STRING_KEPT else None

    def _string(self, longest: int, what: str) -> bytes:
        length = self._integer("<Q", what)
        if length > longest:
            raise self._damaged(f"the length of {what} is {length}")
        return self._take(length, what)

    def _take(self, count: int, what: str) -> bytes:
        if count > self._size - self._at:
            raise self._damaged(f"{what} runs past its end, at {self._size} bytes")
        self._at += count
        return self._opened.read(count)

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._file} is damaged or cut short: {what}; copy it again from where it came.")

    def _refused(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._file} {what}.")


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
