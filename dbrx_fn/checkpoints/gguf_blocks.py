"""Entries of GGUF's quantized tensors: unpacked from blocks, exactly, into a format of MLX or into floats.

The blocks' layouts: `block_*` in ggml's src/ggml-common.h, and their meaning `dequantize_row_*` in its
src/ggml-quants.c. The types without a format are left to the package `gguf`, which unpacks them with NumPy.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dbrx_fn.checkpoints.gguf_types import BlockType

Bytes = NDArray[np.uint8]
Floats = NDArray[np.floating[Any]]


def leaf_of_blocks(blocks: Bytes, kind: BlockType, leaf: str) -> NDArray[Any]:
    """A leaf of the type's format.

    Args:
        blocks: `[block byte]`.
        kind: the blocks' type. It has a format.
        leaf: `weight`, `scales` or `biases`.

    Returns:
        `[block item]`: uint32 for `weight`. For the others the type's dtype, or uint8 for the scales of MXFP4.
    """
    assert kind.form is not None
    if leaf == "weight":
        return _packed(_ENTRIES[kind.name](blocks), kind.form.bits)
    # A scale at the end of float16's range makes an infinite bias.
    with np.errstate(all="ignore"):
        scales, biases = _SCALES[kind.name](blocks)
    return scales if leaf == "scales" else biases


def floats_of_blocks(blocks: Bytes, kind: BlockType) -> NDArray[np.float32]:
    """The entries of any quantized type, float32 `[block item]`, by the package `gguf`."""
    # Imported here, since it is an extra.
    from gguf import GGMLQuantizationType, quants

    # One row of all blocks, since the package computes few rows at a time. A damaged file's scales may be NaN.
    with np.errstate(all="ignore"):
        floats: NDArray[np.float32] = quants.dequantize(blocks.reshape(1, -1), GGMLQuantizationType[kind.name])
    return floats.reshape(len(blocks), -1)


def _packed(entries: NDArray[Any], bits: int) -> NDArray[np.uint32]:
    """Packs entries as MLX does: their bits follow each other, the lowest first."""
    if bits == 4:
        entries = entries[:, ::2] | entries[:, 1::2] << 4
    elif bits != 8:
        single = np.unpackbits(entries[..., None], axis=-1, count=bits, bitorder="little")
        entries = np.packbits(single.reshape(len(entries), -1), axis=-1, bitorder="little")
    return np.ascontiguousarray(entries).view(np.uint32)


def _halves(packed: Bytes, run: int = 16) -> NDArray[Any]:
    """Half bytes: the lower ones of each `run` bytes, and then the upper ones."""
    shifts = np.array([[0], [4]], np.uint8)
    halves: NDArray[Any] = packed.reshape(len(packed), -1, 1, run) >> shifts
    return (halves & 15).reshape(len(packed), -1)


def _bits(packed: Bytes) -> Bytes:
    return np.unpackbits(packed, axis=1, bitorder="little")


def _quarters(packed: Bytes) -> NDArray[Any]:
    shifts = np.arange(0, 8, 2, dtype=np.uint8)
    quarters: NDArray[Any] = packed[..., None] >> shifts
    return (quarters & 3).reshape(len(packed), -1)


def _q5_k(blocks: Bytes) -> NDArray[Any]:
    # Bit n of the byte at place i is the fifth bit of the entry i of the n-th 32.
    fifth: NDArray[Any] = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    entries: NDArray[Any] = _halves(blocks[:, 48:], 32) | fifth.reshape(len(blocks), -1) << 4
    return entries


# `kvalues_iq4nl`, with the offset of 128 that the format's bias takes back.
_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]) + 128
_IQ4_ENTRIES = _IQ4.astype(np.uint8)

_ENTRIES: Mapping[str, Callable[[Bytes], NDArray[Any]]] = {
    "Q4_0": lambda blocks: _halves(blocks[:, 2:]),
    "Q4_1": lambda blocks: _halves(blocks[:, 4:]),
    "Q5_0": lambda blocks: _halves(blocks[:, 6:]) | _bits(blocks[:, 2:6]) << 4,
    "Q5_1": lambda blocks: _halves(blocks[:, 8:]) | _bits(blocks[:, 4:8]) << 4,
    "Q8_0": lambda blocks: np.bitwise_xor(blocks[:, 2:], 0x80),
    "Q4_K": lambda blocks: _halves(blocks[:, 16:], 32),
    "Q5_K": _q5_k,
    "IQ4_NL": lambda blocks: _IQ4_ENTRIES[_halves(blocks[:, 2:])],
    "IQ4_XS": lambda blocks: _IQ4_ENTRIES[_halves(blocks[:, 8:])],
    "MXFP4": lambda blocks: _halves(blocks[:, 1:]),
    "Q1_0": lambda blocks: _bits(blocks[:, 2:]),
    "Q2_0": lambda blocks: _quarters(blocks[:, 2:]),
}
"""The entries of each type as the format's whole numbers, `[block item]`."""


def _half(blocks: Bytes, start: int) -> NDArray[np.float16]:
    return blocks[:, start : start + 2].copy().view(np.float16)


def _offset(by: float, times: float = 1) -> Callable[[Bytes], tuple[Floats, Floats]]:
    """Of types whose blocks have one scale and entries around zero."""
    return lambda blocks: (_half(blocks, 0) * np.float16(times), _half(blocks, 0) * np.float16(-by))


def _own(blocks: Bytes) -> tuple[Floats, Floats]:
    return _half(blocks, 0), _half(blocks, 2)


def _of_k(blocks: Bytes) -> tuple[Floats, Floats]:
    """Eight 6-bit scales and minima in 12 bytes: four each in the first eight, then the lower halves of the rest."""
    first, second, rest = np.split(blocks[:, 4:16], 3, axis=1)
    scales = np.concatenate([first & 63, (rest & 15) | (first >> 2 & 48)], axis=1)
    minima = np.concatenate([second & 63, (rest >> 4) | (second >> 2 & 48)], axis=1)
    scale, minimum = _half(blocks, 0).astype(np.float32), _half(blocks, 2).astype(np.float32)
    return scale * scales, -(minimum * minima)


def _of_iq4_xs(blocks: Bytes) -> tuple[Floats, Floats]:
    """Eight 6-bit scales with an offset of 32: their upper two bits in 2 bytes, their lower halves in 4."""
    scales = _halves(blocks[:, 4:8], run=1) | _quarters(blocks[:, 2:4]) << 4
    whole = _half(blocks, 0).astype(np.float32) * (scales.astype(np.float32) - 32)
    return whole, whole * -128


_SCALES: Mapping[str, Callable[[Bytes], tuple[NDArray[Any], NDArray[Any]]]] = {
    "Q4_0": _offset(8),
    "Q4_1": _own,
    "Q5_0": _offset(16),
    "Q5_1": _own,
    "Q8_0": _offset(128),
    "Q4_K": _of_k,
    "Q5_K": _of_k,
    "IQ4_NL": _offset(128),
    "IQ4_XS": _of_iq4_xs,
    "MXFP4": lambda blocks: (blocks[:, :1], blocks[:, :0]),
    "Q1_0": _offset(1, times=2),
    "Q2_0": _offset(1),
}
"""The scales and biases of each type, `[block group]`."""
