"""What MLX's CPU back end computes slowly, made of what it computes fast.

Its wheels for Linux compute `exp` one number at a time, with a call of `fmaf` for each term, and so everything that is
made of it; a power is one call of libm. Nanoseconds a number on one core (MLX 0.32.4):
    exp 8.3, sigmoid 12.8, softmax 8.8, tanh 12.4;  power 2.9;  x + y and x * y 0.23, x / y 0.30, -x 0.13.
"""

import math
import sys
from typing import cast

import mlx.core as mx

from dbrx_fn.runtime.blas import FAST_BLAS
from dbrx_fn.runtime.device import backend

_BLOCK = 32
"""Queries that attend at once."""


def on_linux_cpu() -> bool:
    """Whether this file's operations are needed. A Mac's CPU back end computes the same fast."""
    return backend() == "cpu" and sys.platform == "linux"


def exp(x: mx.array) -> mx.array:
    """e^x for float32. The base is 3e-8 from e, so the error is what another rounding of x would make."""
    return mx.power(mx.array(math.e, mx.float32), x)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + e^-x), in x's dtype."""
    return cast(mx.array, _sigmoid(x))


@mx.custom_function
def _sigmoid(x: mx.array) -> mx.array:
    return (1 / (1 + exp(-x.astype(mx.float32)))).astype(x.dtype)


@_sigmoid.vjp
def _sigmoid_vjp(primal: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    # Where e^-x is infinite, the derivative of the formula above is NaN.
    return cotangent * output * (1 - output)


def layer_norm(weight: mx.array, x: mx.array, eps: float) -> mx.array:
    """`mx.fast.layer_norm` without a bias, whose sums are products with a column of ones.

    MLX adds one number to the sum of all before, in order. Of 512 rows of 6144 numbers the result is then 6e-7 off and
    takes 26 ms; a product has many sums side by side, 8e-8 and 20 ms.
    """
    rows = x.astype(mx.float32)
    centered = rows - _mean(rows)
    normal = centered * mx.rsqrt(_mean(centered * centered) + eps)
    return (normal * weight.astype(mx.float32)).astype(x.dtype)


def _mean(rows: mx.array) -> mx.array:
    width = rows.shape[-1]
    if FAST_BLAS is not None:
        return rows @ mx.full((width, 1), 1 / width)
    # MLX's own BLAS adds in order too, so the sum is made of short ones.
    short = rows.reshape(*rows.shape[:-1], -1, math.gcd(width, 64)).sum(axis=-1)
    return short.sum(axis=-1, keepdims=True) / width


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None, *, wraps: bool) -> mx.array:
    """`mx.fast.scaled_dot_product_attention`, block of queries by block.

    What no query of a block may see isn't computed, which for a whole prompt is nearly half; and the product with `v`
    is divided by the sum of the weights, not the weights. Milliseconds for 8 heads of 64, 2 of them keys', on 2 cores:
        512 tokens: MLX's 21, this in one block 22, in blocks of 128 8.0, of 64 6.9, of 32 6.7;
        2048: 388, 397, 142, 133, 105.

    Args:
        q: `[batch heads time head_dim]`.
        k, v: `[batch kv_heads seen head_dim]`.
        scale: of the scores.
        mask: `[batch 1 time seen]`, to be added to the scores; causal if not given.
        wraps: whether queries stand past the last key. If not, query t sees none past `seen - time + t`.
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
    # The queries of one key head as rows of one matrix.
    rows = (q.astype(mx.float32) * scale).reshape(batch, kv_heads, -1, head_dim)
    scores = (rows @ k.astype(mx.float32).swapaxes(-1, -2)).reshape(batch, kv_heads, -1, time, k.shape[2])
    scores = scores + mask[:, :, None]
    weights = exp(scores - mx.stop_gradient(scores.max(axis=-1, keepdims=True)))
    mixed = weights.reshape(batch, kv_heads, rows.shape[2], -1) @ v.astype(mx.float32)
    mixed = mixed.reshape(batch, heads, time, head_dim) / weights.sum(axis=-1).reshape(batch, heads, time, 1)
    return mixed.astype(q.dtype)
