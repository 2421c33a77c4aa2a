"""Arrays' bits, as NumPy holds them: to slice, turn and write what isn't to be changed."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

Raw = NDArray[Any]
"""A matrix's bits as NumPy holds them: floats of 16 bits, which it doesn't all know, as integers."""

# A cache line holds 32 entries of 16 bits. NumPy's own copy of a transposed matrix takes a line for each entry:
# 10752 x 6144 of 16 bits at 0.3 GB/s, and in such strips at 1.7 (128 rows: 0.8).
_STRIP = 32
_BITS: dict[int, type[np.unsignedinteger[Any]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def raw(array: mx.array) -> Raw:
    """An array's bits, without a copy where it is contiguous and the device shares its memory."""
    viewed = array.view({1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.dtype.size])
    mx.eval(viewed)
    return np.array(viewed, copy=False)


def mapped(file: Path, start: int, shape: tuple[int, ...], dtype: mx.Dtype) -> Raw:
    """The bits of a tensor in a file, read as they are used: memory that is reserved for them is the slowest part.

    4 GB are written anew in 8 to 12 s when MLX reads the tensors, and in 3.5 to 4.2 when they are mapped; `cp` takes
    3.7 to 4.5.
    """
    bits = np.memmap(file, _BITS[dtype.size], "r", start, shape)
    return np.require(bits, requirements="A")


def of_raw(matrix: Raw, dtype: mx.Dtype) -> mx.array:
    """The array that has these bits."""
    return mx.array(in_order(matrix)).view(dtype)


def in_order(matrix: Raw) -> Raw:
    """A matrix's entries row by row in memory; itself, if they are."""
    if matrix.ndim != 2 or not matrix.T.flags.c_contiguous:
        return np.ascontiguousarray(matrix)
    out = np.empty(matrix.shape, matrix.dtype)
    for start in range(0, matrix.shape[1], _STRIP):
        out[:, start : start + _STRIP] = matrix[:, start : start + _STRIP]
    return out
