"""Clamp, rotary embedding and the split into heads, in one pass over what `Wqkv` made.

Stock operations read and write it three to four times, in as many launches, of which decoding has the time for none.
"""

import math

import mlx.core as mx
from jaxtyping import BFloat16, Int32

from dbrx_fn.compile import typed
from dbrx_fn.kernels.cuda_module import Kernel, launch

_THREADS = 128
_MULTIPROCESSORS = 132


def fits(*, head_dim: int, dtype: mx.Dtype) -> bool:
    """Whether the kernel has these sizes."""
    return dtype == mx.bfloat16 and head_dim in (32, 64, 128, 256)


@typed
def rotate_qkv(
    qkv: BFloat16[mx.array, "batch time qkv"],
    offsets: Int32[mx.array, " batch_or_more"],
    *,
    kv_n_heads: int,
    head_dim: int,
    clip: float | None,
    theta: float,
) -> tuple[
    BFloat16[mx.array, "batch n_heads time {head_dim}"],
    BFloat16[mx.array, "batch {kv_n_heads} time {head_dim}"],
    BFloat16[mx.array, "batch {kv_n_heads} time {head_dim}"],
]:
    """Queries, keys and values, `[batch heads time head_dim]`, clamped to ± `clip`, the first two turned.

    Args:
        qkv: all heads of the queries, then of the keys, then of the values, `[batch time qkv]`.
        offsets: position of each row's first token, and perhaps more numbers behind.
        kv_n_heads: heads of keys, and of values; the others are queries'.
        head_dim: entries of a head.
        clip: none, if `None`.
        theta: base of the rotary frequencies.
    """
    batch, time, width = qkv.shape
    n_heads = width // head_dim - 2 * kv_n_heads
    # Few tokens are spread over the machine's multiprocessors; of many, a block has all heads.
    at_once = _THREADS // (head_dim // 16)
    splits = min(-(-width // (head_dim * at_once)), max(1, _MULTIPROCESSORS // (batch * time)))
    q, k, v = launch(
        Kernel("rotate_qkv", (("HEAD_DIM", head_dim), ("THREADS", _THREADS))),
        [qkv, offsets],
        [((batch, heads, time, head_dim), mx.bfloat16) for heads in (n_heads, kv_n_heads, kv_n_heads)],
        blocks=(time, batch, splits),
        threads=_THREADS,
        scalars=(n_heads, kv_n_heads, math.inf if clip is None else float(clip), math.log2(theta)),
    )
    return q, k, v
