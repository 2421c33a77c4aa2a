"""The beginning of a GGUF file, version 3: metadata, and what tensors lie where.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dbrx_fn.checkpoints.gguf_types import TYPES, BlockType

ALIGNMENT = 32

Value = bool | int | float | str | Sequence[str] | Sequence[int]
"""A metadata's value. Whole numbers are 32 bits wide: without a sign alone, with one in a list."""

_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_NUMBERS = {kind: number for number, kind in TYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor to write, its innermost axis last."""

    name: str
    shape: tuple[int, ...]
    kind: BlockType

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        items: int = np.prod(self.shape, dtype=object)
        return items // self.kind.items * self.kind.size

    @property
    def padding(self) -> int:
        """Bytes between it and the next tensor."""
        return -self.nbytes % ALIGNMENT


def header(metadata: Mapping[str, Value], tensors: Sequence[TensorInfo]) -> bytes:
    """Everything before the data of the tensors, which then follow each other, each with its padding behind."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _value(value)]
    offset = 0
    for tensor in tensors:
        axes = tensor.shape[::-1]
        parts.append(_string(tensor.name) + struct.pack(f"<I{len(axes)}Q", len(axes), *axes))
        parts.append(struct.pack("<IQ", _NUMBERS[tensor.kind], offset))
        offset += tensor.nbytes + tensor.padding
    content = b"".join(parts)
    return content + bytes(-len(content) % ALIGNMENT)


def _string(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<IB", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if value and isinstance(value[0], int):
        return struct.pack(f"<IIQ{len(value)}i", _ARRAY, _INT32, len(value), *value)
    return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))
