"""Random weights that are the same on every machine: PCG64's bits, scaled by integers and powers of two.

MLX's random numbers and NumPy's distributions aren't guaranteed to be equal on every back end and in every version. A
bit generator's raw output is. Each weight is exact in bfloat16 and float16 too, so one reference serves all dtypes.
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from dbrx_fn.model.config import Config
from dbrx_fn.model.params import Leaf, param_spec
from dbrx_fn.ops.formats import Format

Array = NDArray[np.generic]

_SPREAD = 255 / math.sqrt(12)
"""Standard deviation of whole numbers from -127 to 127."""
_FINITE_E4M3 = 0xBFBFBFBF
"""A mask that clears the exponents' upper bit. Without it, 8-bit floats (e4m3) are at most 1.875 and never NaN."""
_ROOTS = {"mxfp4": 2.9, "mxfp8": 0.8, "nvfp4": 2.9}
"""The root mean square of a format's stored numbers, before scaling."""


def whole_numbers(seed: tuple[int, ...], below: int, *shape: int) -> NDArray[np.int64]:
    """Whole numbers from 0 to `below - 1`."""
    raw = np.random.PCG64(list(seed)).random_raw(math.prod(shape))
    return (raw % np.uint64(below)).astype(np.int64).reshape(shape)


def floats(seed: tuple[int, ...], fan_in: int, *shape: int) -> NDArray[np.float32]:
    """float32 of mean 0 and a variance near 1 / `fan_in`."""
    scale = 2.0 ** -round(math.log2(_SPREAD * math.sqrt(fan_in)))
    return ((whole_numbers(seed, 255, *shape) - 127) * scale).astype(np.float32)


def leaves(config: Config, formats: Mapping[str, Format], seed: int) -> dict[str, Array]:
    """A model's weights by the tree's paths, with floats in float32. The matrices in `formats` are quantized."""
    drawn: dict[str, Array] = {}
    for place, (path, leaf) in enumerate(param_spec(config).items()):
        own = (seed, place)
        if path in formats:
            parts = quantized(own, leaf, formats[path])
            drawn |= {path.removesuffix("weight") + name: part for name, part in parts.items()}
        elif leaf.is_norm:
            drawn[path] = (1 + (whole_numbers(own, 17, *leaf.shape) - 8) / 64).astype(np.float32)
        else:
            drawn[path] = floats(own, 1 if ".wte." in path else leaf.shape[-1], *leaf.shape)
    return drawn


def quantized(seed: tuple[int, ...], leaf: Leaf, form: Format) -> dict[str, Array]:
    """A quantized matrix of about the same variance, with random stored numbers and scales of a few bits."""
    parts = leaf.quantized(form)
    words = whole_numbers((*seed, 0), 2**32, *parts["weight"].shape).astype(np.uint32)
    steps = whole_numbers((*seed, 1), 4, *parts["scales"].shape)
    deviation = leaf.shape[-1] ** -0.5
    if form.mode == "affine":
        unit = 2.0 ** round(math.log2(deviation * math.sqrt(12) / 2**form.bits / 5.5))
        scales = ((4 + steps) * unit).astype(np.float32)
        return {"weight": words, "scales": scales, "biases": scales * np.float32(-(2 ** (form.bits - 1)))}
    exponent = round(math.log2(deviation / _ROOTS[form.mode]))
    if form.mode == "nvfp4":
        # Scales are e4m3: four bits of exponent, three of fraction.
        return {"weight": words, "scales": (8 * max(1, 7 + exponent) + steps).astype(np.uint8)}
    if form.mode == "mxfp8":
        words &= np.uint32(_FINITE_E4M3)
    # Scales are powers of two.
    return {"weight": words, "scales": (127 + exponent - steps % 2).astype(np.uint8)}
