"""Arrays' bits in NumPy, to slice, transpose and write them unchanged."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

Raw = NDArray[Any]
"""A matrix's bits in NumPy. Floats of 16 bits are held as integers, since NumPy has no bfloat16."""

# A cache line holds 32 entries of 16 bits. NumPy's own copy of a transposed matrix loads a line for each entry, so
# copies in strips of that width are several times as fast (docs/checkpoints.md).
_STRIP = 32
_BITS: dict[int, type[np.unsignedinteger[Any]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def raw(array: mx.array) -> Raw:
    """An array's bits. They aren't copied if the array is contiguous and the device shares its memory."""
    viewed = array.view({1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.dtype.size])
    mx.eval(viewed)
    return np.array(viewed, copy=False)


def mapped(file: Path, start: int, shape: tuple[int, ...], dtype: mx.Dtype) -> Raw:
    """The bits of a tensor in a file, mapped into memory and read when they are used.

    This is faster than reading into new memory (docs/checkpoints.md).
    """
    bits = np.memmap(file, _BITS[dtype.size], "r", start, shape)
    return np.require(bits, requirements="A")


def of_raw(matrix: Raw, dtype: mx.Dtype) -> mx.array:
    """The array with these bits."""
    return mx.array(in_order(matrix)).view(dtype)


def in_order(matrix: Raw) -> Raw:
    """The matrix in row-contiguous memory. One that is already is returned unchanged."""
    if matrix.ndim != 2 or not matrix.T.flags.c_contiguous:
        return np.ascontiguousarray(matrix)
    out = np.empty(matrix.shape, matrix.dtype)
    for start in range(0, matrix.shape[1], _STRIP):
        out[:, start : start + _STRIP] = matrix[:, start : start + _STRIP]
    return out
