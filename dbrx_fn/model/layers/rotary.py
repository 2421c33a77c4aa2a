"""Rotary positions (https://arxiv.org/abs/2104.09864): pairs of entries turn by angles that grow with position.

Entry i of a head turns together with entry i + head_dim/2, the half-rotation form. The angles are made once for all
layers, and as in training: in float32, rounded where they were rounded there. At position 32,000 the last bit of a
frequency is an angle of 2e-3, and `mx.fast.rope` makes its frequencies otherwise.
"""

import functools

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Float32, Int32

from dbrx_fn.runtime.compile import typed


@functools.cache
def inverse_frequencies(head_dim: int, theta: float) -> mx.array:
    """float32 `[head_dim/2]`: radians by which each pair turns from one position to the next.

    1 / theta^(2i / head_dim), where exponent, power and quotient are each rounded to float32, as in
    `DbrxRotaryEmbedding` of the reference
    (https://huggingface.co/databricks/dbrx-instruct/blob/main/modeling_dbrx.py). torch's own power can be off by a bit
    (for 1 in 70 pairs, and other ones with AVX2 than with AVX-512); here it is rounded correctly. For DBRX's theta
    and head_dim all agree.
    """
    # Thetas beyond float32's range are infinite there too.
    with np.errstate(all="ignore"):
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        powers = np.power(np.float64(np.float32(theta)), exponents.astype(np.float64)).astype(np.float32)
        return mx.array(np.float32(1) / powers)


@typed
def turns(
    positions: Int32[mx.array, "batch time"], *, head_dim: int, theta: float
) -> tuple[Float32[mx.array, "batch 1 time 1 half"], Float32[mx.array, "batch 1 time 2 half"]]:
    """What `turn` multiplies by at these positions: cosines, and sines as they count for a pair's first and second."""
    angles = positions[:, None, :, None, None].astype(mx.float32) * inverse_frequencies(head_dim, theta)
    sines = mx.sin(angles)
    return mx.cos(angles), mx.concatenate([-sines, sines], axis=-2)


@typed
def turn(
    heads: Float[mx.array, "batch heads time head_dim"],
    cosines: Float32[mx.array, "_ 1 time 1 half"],
    sines: Float32[mx.array, "_ 1 time 2 half"],
) -> Float[mx.array, "batch heads time head_dim"]:
    """Turns each pair of entries; computed in float32. `cosines` and `sines` are of all rows at once, or of each."""
    pairs = heads.reshape(*heads.shape[:-1], 2, -1).astype(mx.float32)
    turned = pairs * cosines + pairs[..., ::-1, :] * sines
    return turned.astype(heads.dtype).reshape(heads.shape)
