"""Arrays' bits in NumPy, to slice, transpose and write them unchanged."""

import os
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
_SHORTEST_RUN = 512
"""Runs of fewer bytes are read together with the bytes between them, since each read is a call of the system."""
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
    return np.require(bits_in_file(file, start, shape, dtype), requirements="A")


def bits_in_file(file: Path, start: int, shape: tuple[int, ...], dtype: mx.Dtype) -> Raw:
    """As `mapped`, but perhaps not aligned to the size of its entries."""
    return np.memmap(file, _BITS[dtype.size], "r", start, shape)


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


def read_part(file: Path, start: int, whole: Raw, part: Raw) -> Raw:
    """Reads the entries of a part of a tensor, and hardly any others, into new memory.

    Args:
        file: the tensor's file.
        start: the offset of the tensor's bytes in it.
        whole: the tensor, mapped from the file. It is not read.
        part: a view of it: reshaped, transposed or sliced in any way.

    Raises:
        OSError: if the file can't be read.
        ValueError: if it ends too early.
    """
    order = sorted(range(part.ndim), key=lambda axis: -part.strides[axis])
    shape, strides = (tuple(sizes[axis] for axis in order) for sizes in (part.shape, part.strides))
    outer, run = part.ndim, part.itemsize
    while outer and strides[outer - 1] == run:
        outer -= 1
        run *= shape[outer]
    span = run
    if run < _SHORTEST_RUN and outer:
        outer -= 1
        span = (shape[outer] - 1) * strides[outer] + run
    places = np.array(start + _address(part) - _address(whole))
    for size, stride in zip(shape[:outer], strides[:outer], strict=True):
        places = places[..., None] + np.arange(size) * stride
    out = np.empty(shape, part.dtype)
    targets = out.reshape(-1, *shape[outer:])
    with file.open("rb", buffering=0) as opened:
        for place, target in zip(places.reshape(-1).tolist(), targets, strict=True):
            if span == run:
                _read_into(opened.fileno(), memoryview(target.reshape(-1)).cast("B"), place)
            else:
                between = bytearray(span)
                _read_into(opened.fileno(), memoryview(between), place)
                target[...] = np.ndarray(shape[outer:], part.dtype, between, 0, strides[outer:])
    return out.transpose(np.argsort(order))


def _address(array: Raw) -> int:
    return int(array.__array_interface__["data"][0])


def _read_into(descriptor: int, target: memoryview, place: int) -> None:
    while target:
        count = os.preadv(descriptor, [target], place)
        if not count:
            raise ValueError("it ends too early")
        target, place = target[count:], place + count
