"""Entries of GGUF's quantized tensors: unpacked from blocks, exactly, into a format of MLX or into floats.

The blocks' layouts: `block_*` in ggml's src/ggml-common.h, and their meaning `dequantize_row_*` in its
src/ggml-quants.c. The types without a format are left to the package `gguf`, which unpacks them with NumPy.
"""

import functools
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
        return np.ascontiguousarray(_WEIGHTS[kind.name](blocks)).view(np.uint32)
    scales, biases = _SCALES[kind.name]
    # A scale at the end of float16's range makes an infinite bias.
    with np.errstate(all="ignore"):
        return scales(blocks) if leaf == "scales" else biases(blocks)


def floats_of_blocks(blocks: Bytes, kind: BlockType) -> NDArray[np.float32]:
    """The entries of any quantized type, float32 `[block item]`, by the package `gguf`."""
    # Imported here, since it is an extra.
    from gguf import GGMLQuantizationType, quants

    # One row of all blocks, since the package computes few rows at a time. A damaged file's scales may be NaN.
    with np.errstate(all="ignore"):
        floats: NDArray[np.float32] = quants.dequantize(blocks.reshape(1, -1), GGMLQuantizationType[kind.name])
    return floats.reshape(len(blocks), -1)


def _cut(blocks: Bytes, start: int) -> Bytes:
    """The bytes of each block from `start` on, in contiguous memory."""
    # NumPy copies an item of many bytes faster than as many items.
    item = f"V{blocks.shape[1] - start}"
    return np.ascontiguousarray(blocks[:, start:].view(item)).view(np.uint8)


def _packed(entries: NDArray[Any], bits: int) -> Bytes:
    """Packs entries as MLX does: their bits follow each other, the lowest first.

    Args:
        entries: uint8 `[block item]` in contiguous memory, without other bits. They are overwritten.
        bits: of an entry, 5 or 2.
    """
    eights = entries.view(np.uint64)
    for count in (1, 2, 4):
        # Two fields of `count` entries each become one.
        lower = sum(2 ** (bits * count) - 1 << place for place in range(0, 64, 16 * count))
        upper = eights >> (8 - bits) * count
        upper &= lower << bits * count
        eights &= lower
        eights |= upper
    return eights.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(len(entries), -1)


def _packed_halves(packed: Bytes, run: int = 16) -> NDArray[Any]:
    """What `_packed(_halves(packed, run), 4)` is, without a byte for each entry.

    Args:
        packed: `[block byte]` in contiguous memory.
        run: as in `_halves`.
    """
    words = packed.reshape(-1).view(np.uint16)
    out = np.empty((packed.size // run, 2, run // 16), np.uint64)
    for place, shift in enumerate((0, 4)):
        pairs = words >> shift
        pairs &= 0x0F0F
        pairs |= pairs >> 4
        out[:, place] = pairs.astype(np.uint8).view(np.uint64).reshape(-1, run // 16)
    return out.view(np.uint8).reshape(packed.shape)


def _halves(packed: Bytes, run: int = 16) -> NDArray[Any]:
    """Half bytes: the lower ones of each `run` bytes, and then the upper ones."""
    shifts = np.array([[0], [4]], np.uint8)
    halves: NDArray[Any] = packed.reshape(len(packed), -1, 1, run) >> shifts
    return (halves & 15).reshape(len(packed), -1)


def _bits(packed: Bytes) -> Bytes:
    return np.unpackbits(packed, axis=1, bitorder="little")


def _q5_k(blocks: Bytes) -> NDArray[Any]:
    # Bit n of the byte at place i is the fifth bit of the entry i of the n-th 32.
    fifth: NDArray[Any] = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    entries: NDArray[Any] = _halves(blocks[:, 48:], 32) | fifth.reshape(len(blocks), -1) << 4
    return entries


# `kvalues_iq4nl`, with the offset of 128 that the format's bias takes back.
_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]) + 128
_IQ4_ENTRIES = _IQ4.astype(np.uint8)

_WEIGHTS: Mapping[str, Callable[[Bytes], NDArray[Any]]] = {
    "Q4_0": lambda blocks: _packed_halves(_cut(blocks, 2)),
    "Q4_1": lambda blocks: _packed_halves(_cut(blocks, 4)),
    "Q5_0": lambda blocks: _packed(_halves(blocks[:, 6:]) | _bits(blocks[:, 2:6]) << 4, 5),
    "Q5_1": lambda blocks: _packed(_halves(blocks[:, 8:]) | _bits(blocks[:, 4:8]) << 4, 5),
    "Q8_0": lambda blocks: _cut(blocks, 2) ^ 0x80,
    "Q4_K": lambda blocks: _packed_halves(_cut(blocks, 16), 32),
    "Q5_K": lambda blocks: _packed(_q5_k(blocks), 5),
    "IQ4_NL": lambda blocks: _IQ4_ENTRIES[_halves(blocks[:, 2:])],
    "IQ4_XS": lambda blocks: _IQ4_ENTRIES[_halves(blocks[:, 8:])],
    "MXFP4": lambda blocks: _packed_halves(_cut(blocks, 1)),
    "Q1_0": lambda blocks: _packed(_bits(blocks[:, 2:]), 2),
    "Q2_0": lambda blocks: _cut(blocks, 2),
}
"""The bytes of each type's `weight`, `[block byte]`: the format's whole numbers, packed as MLX packs them."""


_Scales = tuple[Callable[[Bytes], NDArray[Any]], Callable[[Bytes], NDArray[Any]]]


def _half(blocks: Bytes, start: int) -> NDArray[np.float16]:
    return blocks[:, start : start + 2].view(np.float16)


@functools.cache
def _products(factor: float) -> NDArray[np.float16]:
    """The products of a factor and each float16, by the bits of the latter.

    To look one up takes a tenth of the time that NumPy takes to round one to float16.
    """
    return np.arange(2**16, dtype=np.uint16).view(np.float16) * np.float16(factor)


def _times(factor: float) -> Callable[[Bytes], NDArray[np.float16]]:
    return lambda blocks: _products(factor)[_half(blocks, 0).view(np.uint16)]


def _offset(by: float, times: float = 1) -> _Scales:
    """Of types whose blocks have one scale and entries around zero."""
    return _times(times), _times(-by)


_OWN: _Scales = lambda blocks: _half(blocks, 0), lambda blocks: _half(blocks, 2)


def _k_scales(blocks: Bytes) -> Floats:
    """Eight 6-bit scales in 12 bytes: four in the first four, then the lower halves of the rest in the last four."""
    first, _, rest = np.split(blocks[:, 4:16], 3, axis=1)
    scales = np.concatenate([first & 63, (rest & 15) | (first >> 2 & 48)], axis=1)
    whole: Floats = _half(blocks, 0).astype(np.float32) * scales
    return whole


def _k_biases(blocks: Bytes) -> Floats:
    """As the scales, from the second four bytes and the upper halves of the last four."""
    _, second, rest = np.split(blocks[:, 4:16], 3, axis=1)
    minima = np.concatenate([second & 63, (rest >> 4) | (second >> 2 & 48)], axis=1)
    whole: Floats = _half(blocks, 2).astype(np.float32) * minima
    return np.negative(whole, out=whole)


def _iq4_xs_scales(blocks: Bytes) -> Floats:
    """Eight 6-bit scales with an offset of 32: their upper two bits in 2 bytes, their lower halves in 4."""
    shifts = np.arange(0, 8, 2, dtype=np.uint8)
    upper = (blocks[:, 2:4, None] >> shifts & 3).reshape(len(blocks), -1)
    scales = _halves(blocks[:, 4:8], run=1) | upper << 4
    whole: Floats = _half(blocks, 0).astype(np.float32) * (scales.astype(np.float32) - 32)
    return whole


_SCALES: Mapping[str, _Scales] = {
    "Q4_0": _offset(8),
    "Q4_1": _OWN,
    "Q5_0": _offset(16),
    "Q5_1": _OWN,
    "Q8_0": _offset(128),
    "Q4_K": (_k_scales, _k_biases),
    "Q5_K": (_k_scales, _k_biases),
    "IQ4_NL": _offset(128),
    "IQ4_XS": (_iq4_xs_scales, lambda blocks: _iq4_xs_scales(blocks) * -128),
    "MXFP4": (lambda blocks: blocks[:, :1], lambda blocks: blocks[:, :0]),
    "Q1_0": _offset(1, times=2),
    "Q2_0": _offset(1),
}
"""What makes the scales and the biases of each type, `[block group]`."""
