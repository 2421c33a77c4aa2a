"""Rotary position embedding (https://arxiv.org/abs/2104.09864): pairs of entries rotate by their position's angles.

Entry i of a head rotates with entry i + head_dim/2 (the "NeoX" form). The angles are computed once for all layers. They
are rounded as in training: in float32, at the same steps. `mx.fast.rope` computes its frequencies differently, and at
position 32,000 the last bit of a frequency changes the angle by 2e-3.
"""

import functools

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Float32, Int32

from dbrx_fn.runtime.compile import typed


@functools.cache
def inverse_frequencies(head_dim: int, theta: float) -> mx.array:
    """float32 `[head_dim/2]`: the angle, in radians, by which each pair rotates from one position to the next.

    1 / theta^(2i / head_dim), with exponent, power and quotient each rounded to float32, as in the reference's
    `DbrxRotaryEmbedding` (https://huggingface.co/databricks/dbrx-instruct/blob/main/modeling_dbrx.py). The power is
    rounded correctly here, while torch's can be off by a bit. Both agree for DBRX's theta and head_dim.
    """
    # A theta beyond float32's range is infinite in the reference too.
    with np.errstate(all="ignore"):
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        powers = np.power(np.float64(np.float32(theta)), exponents.astype(np.float64)).astype(np.float32)
        return mx.array(np.float32(1) / powers)


@typed
def turns(
    positions: Int32[mx.array, "batch time"], *, head_dim: int, theta: float
) -> tuple[Float32[mx.array, "batch 1 time 1 half"], Float32[mx.array, "batch 1 time 2 half"]]:
    """The factors of `turn` at these positions: cosines, and sines signed for a pair's first and second entry."""
    angles = positions[:, None, :, None, None].astype(mx.float32) * inverse_frequencies(head_dim, theta)
    sines = mx.sin(angles)
    return mx.cos(angles), mx.concatenate([-sines, sines], axis=-2)


@typed
def turn(
    heads: Float[mx.array, "batch heads time head_dim"],
    cosines: Float32[mx.array, "_ 1 time 1 half"],
    sines: Float32[mx.array, "_ 1 time 2 half"],
) -> Float[mx.array, "batch heads time head_dim"]:
    """Rotates each pair of entries, in float32. `cosines` and `sines` are for all rows at once, or one for each row."""
    pairs = heads.reshape(*heads.shape[:-1], 2, -1).astype(mx.float32)
    turned = pairs * cosines + pairs[..., ::-1, :] * sines
    return turned.astype(heads.dtype).reshape(heads.shape)
