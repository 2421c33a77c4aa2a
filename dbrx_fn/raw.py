"""Arrays' bits, as NumPy holds them: to slice, turn and write what isn't to be changed."""

from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

Raw = NDArray[Any]
"""A matrix's bits as NumPy holds them: floats of 16 bits, which it doesn't all know, as integers."""

# A cache line holds 32 entries of 16 bits. NumPy's own copy of a transposed matrix takes a line for each entry:
# 10752 x 6144 of 16 bits at 0.3 GB/s, and in such strips at 1.7 (128 rows: 0.8).
_STRIP = 32


def raw(array: mx.array) -> Raw:
    """An array's bits, without a copy where it is contiguous and the device shares its memory."""
    bits = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.dtype.size]
    viewed = array.view(bits)
    mx.eval(viewed)
    return np.array(viewed, copy=False)


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
