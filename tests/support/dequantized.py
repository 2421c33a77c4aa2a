"""Quantized matrices as float64, by NumPy alone: what each format's bits mean."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dbrx_fn.ops.formats import Format

Floats = NDArray[np.float64]
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def dequantized(parts: Mapping[str, NDArray[Any]], form: Format) -> Floats:
    """`weight` uint32 `[... packed]`, `scales` `[... group]` and perhaps `biases` -> `[... inner]`."""
    stored = unpacked(parts["weight"], form.bits)
    scales = parts["scales"]
    if form.mode == "affine":
        factors, values = scales.astype(np.float64), stored.astype(np.float64)
        values = values.reshape(*scales.shape, form.group_size) * factors[..., None] + parts["biases"][..., None]
        affine: Floats = values.reshape(stored.shape)
        return affine
    factors = e4m3(scales) if form.mode == "nvfp4" else 2.0 ** (scales.astype(np.float64) - 127)
    values = e4m3(stored) if form.mode == "mxfp8" else np.where(stored < 8, 1, -1) * _E2M1[stored % 8]
    grouped: Floats = values.reshape(*scales.shape, form.group_size) * factors[..., None]
    return grouped.reshape(stored.shape)


def unpacked(words: NDArray[Any], bits: int) -> NDArray[np.int64]:
    """A row's words are one stream of bits, the lowest first; each number is the next `bits` of it."""
    in_bytes = np.ascontiguousarray(words.astype("<u4")).view(np.uint8)
    stream = np.unpackbits(in_bytes, axis=-1, bitorder="little").astype(np.int64)
    numbers: NDArray[np.int64] = (stream.reshape(*words.shape[:-1], -1, bits) << np.arange(bits)).sum(axis=-1)
    return numbers


def e4m3(codes: NDArray[Any]) -> Floats:
    """8-bit floats: a sign, four bits of exponent with a bias of 7, three of fraction."""
    codes = codes.astype(np.int64)
    exponent, fraction = codes >> 3 & 15, codes & 7
    size = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7.0))
    return np.where(codes & 128, -1, 1) * size
