"""Blocks of GGUF's quantized types, made of floats or of a format of MLX that is the same.

Floats are quantized bit for bit as by ggml's `quantize_row_*_ref` (src/ggml-quants.c).
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from dbrx_fn.checkpoints.gguf_types import BlockType
from dbrx_fn.ops.formats import Format

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_AT_ONCE = 2**15
_OFFSETS = {"Q4_0": 8, "Q8_0": 128}


def blocks_of_floats(matrix: Floats, kind: BlockType) -> Bytes:
    """Quantizes a matrix `[outer inner]`. Returns `[block byte]`."""
    rows = matrix.reshape(-1, kind.items)
    blocks = np.empty((len(rows), kind.size), np.uint8)
    # NaN and infinite weights make blocks without a meaning, as in ggml; a block of zeros has no reciprocal scale.
    with np.errstate(all="ignore"):
        for start in range(0, len(rows), _AT_ONCE):
            blocks[start : start + _AT_ONCE] = _QUANTIZE[kind.name](rows[start : start + _AT_ONCE])
    return blocks


def same_type(form: Format, scales: mx.array, biases: mx.array) -> str | None:
    """The name of the type that holds a matrix of this format exactly, or `None`.

    The types have float16 scales. Their entries are around zero in Q8_0 and Q4_0, and have a bias of their own in Q4_1.
    """
    if form.mode != "affine" or form.group_size != 32 or form.bits not in (4, 8):
        return None
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)

    def are_float16(floats: mx.array) -> bool:
        return bool(mx.array_equal(floats.astype(mx.float16).astype(mx.float32), floats))

    if not are_float16(scales):
        return None
    name = "Q8_0" if form.bits == 8 else "Q4_0"
    if mx.array_equal(biases, scales * -_OFFSETS[name]):
        return name
    return "Q4_1" if form.bits == 4 and are_float16(biases) else None


def blocks_of_leaves(kind: BlockType, weight: mx.array, scales: mx.array, biases: mx.array) -> Bytes:
    """The blocks `[block byte]` of a matrix whose `same_type` is this one."""
    packed = np.array(weight).view(np.uint8)
    heads = [scales, biases] if kind.name == "Q4_1" else [scales]
    head = np.concatenate([np.array(part.astype(mx.float16)).reshape(-1, 1).view(np.uint8) for part in heads], axis=1)
    if kind.name == "Q8_0":
        return np.concatenate([head, packed.reshape(-1, 32) ^ 0x80], axis=1)
    entries = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1, 32)
    return np.concatenate([head, _halves(entries)], axis=1)


def _halves(entries: NDArray[Any]) -> Bytes:
    """Half bytes: the first 16 entries in the lower halves, the others in the upper."""
    halves: Bytes = entries[:, :16] | entries[:, 16:] << 4
    return halves


def _float16(floats: Floats) -> Bytes:
    return floats.astype(np.float16).view(np.uint8)


def _reciprocal(scale: Floats) -> Floats:
    return np.where(scale == 0, np.float32(0), 1 / scale)


def _rounded(floats: Floats) -> Floats:
    """To the nearest whole number, halves away from zero, as C's `roundf`."""
    size = np.abs(floats)
    below = np.floor(size)
    rounded: Floats = np.sign(floats) * (below + np.floor(2 * (size - below)))
    return rounded


def _whole(floats: Floats) -> Bytes:
    return np.clip(floats.astype(np.uint8), 0, 15)


def _q8_0(rows: Floats) -> Bytes:
    scale = np.abs(rows).max(axis=1, keepdims=True) / 127
    entries = _rounded(rows * _reciprocal(scale)).astype(np.int8)
    return np.concatenate([_float16(scale), entries.view(np.uint8)], axis=1)


def _q4_0(rows: Floats) -> Bytes:
    largest: Floats = np.take_along_axis(rows, np.abs(rows).argmax(axis=1, keepdims=True), axis=1)
    scale: Floats = largest / np.float32(-8)
    entries = _whole(rows * _reciprocal(scale) + np.float32(8.5))
    return np.concatenate([_float16(scale), _halves(entries)], axis=1)


def _q4_1(rows: Floats) -> Bytes:
    least = rows.min(axis=1, keepdims=True)
    scale = (rows.max(axis=1, keepdims=True) - least) / 15
    entries = _whole((rows - least) * _reciprocal(scale) + np.float32(0.5))
    return np.concatenate([_float16(scale), _float16(least), _halves(entries)], axis=1)


_QUANTIZE: Mapping[str, Callable[[Floats], Bytes]] = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1}
"""The quantized types that can be written."""
