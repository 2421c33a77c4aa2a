"""Faster forms of operations that MLX's CPU back end computes slowly.

MLX's wheels for Linux compute `exp`, and everything made of it, one number at a time with a call of `fmaf` per term. A
power is one call of libm and three times as fast (`docs/performance.md`).
"""

import math
import sys
from typing import cast

import mlx.core as mx

from dbrx_fn.runtime.blas import FAST_BLAS
from dbrx_fn.runtime.device import backend

_BLOCK = 32
"""Number of queries that attend at once."""


def on_linux_cpu() -> bool:
    """Whether this file's operations are needed. MLX's CPU back end on a Mac is fast."""
    return backend() == "cpu" and sys.platform == "linux"


def exp(x: mx.array) -> mx.array:
    """e^x for float32. The base's relative error is 3e-8, so the result's is about that of rounding x once more."""
    return mx.power(mx.array(math.e, mx.float32), x)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + e^-x), in x's dtype."""
    return cast(mx.array, _sigmoid(x))


@mx.custom_function
def _sigmoid(x: mx.array) -> mx.array:
    return (1 / (1 + exp(-x.astype(mx.float32)))).astype(x.dtype)


@_sigmoid.vjp
def _sigmoid_vjp(primal: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    # The derivative of the formula above is NaN where e^-x is infinite.
    return cotangent * output * (1 - output)


def layer_norm(weight: mx.array, x: mx.array, eps: float) -> mx.array:
    """`mx.fast.layer_norm` without a bias, with means computed as products with a constant column.

    MLX adds numbers one after the other. A product adds several partial sums side by side, which is faster and more
    exact (`docs/performance.md`).
    """
    rows = x.astype(mx.float32)
    centered = rows - _mean(rows)
    normal = centered * mx.rsqrt(_mean(centered * centered) + eps)
    return (normal * weight.astype(mx.float32)).astype(x.dtype)


def _mean(rows: mx.array) -> mx.array:
    width = rows.shape[-1]
    if FAST_BLAS is not None:
        return rows @ mx.full((width, 1), 1 / width)
    # MLX's own BLAS adds one after the other too, so the sum is made of short sums.
    short = rows.reshape(*rows.shape[:-1], -1, math.gcd(width, 64)).sum(axis=-1)
    return short.sum(axis=-1, keepdims=True) / width


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None, *, wraps: bool) -> mx.array:
    """`mx.fast.scaled_dot_product_attention`, one block of queries at a time.

    A block skips the keys that none of its queries sees. That saves nearly half of a whole prompt's scores. The
    softmax's division comes after the product with `v`, where there are fewer numbers. `docs/performance.md` has the
    times.

    Args:
        q: `[batch heads time head_dim]`.
        k, v: `[batch kv_heads seen head_dim]`.
        scale: factor of the scores.
        mask: `[batch 1 time seen]`, added to the scores. Causal, if not given.
        wraps: whether some queries' positions lie past the last key. Else query t sees no key after `seen - time + t`.
    """
    time, seen = q.shape[2], k.shape[2]
    if mask is None:
        positions = mx.arange(time)
        mask = mx.where(positions <= positions[:, None], 0, mx.finfo(mx.float32).min)[None, None]
    parts = []
    for start in range(0, time, _BLOCK):
        stop = min(start + _BLOCK, time)
        last = seen if wraps else seen - time + stop
        parts.append(
            _attention(q[:, :, start:stop], k[:, :, :last], v[:, :, :last], scale, mask[:, :, start:stop, :last])
        )
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)


def _attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array) -> mx.array:
    batch, heads, time, head_dim = q.shape
    kv_heads = k.shape[1]
    # The queries that share a key head are rows of one matrix.
    rows = (q.astype(mx.float32) * scale).reshape(batch, kv_heads, -1, head_dim)
    scores = (rows @ k.astype(mx.float32).swapaxes(-1, -2)).reshape(batch, kv_heads, -1, time, k.shape[2])
    scores = scores + mask[:, :, None]
    weights = exp(scores - mx.stop_gradient(scores.max(axis=-1, keepdims=True)))
    mixed = weights.reshape(batch, kv_heads, rows.shape[2], -1) @ v.astype(mx.float32)
    mixed = mixed.reshape(batch, heads, time, head_dim) / weights.sum(axis=-1).reshape(batch, heads, time, 1)
    return mixed.astype(q.dtype)
