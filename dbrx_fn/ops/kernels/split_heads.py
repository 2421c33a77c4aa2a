"""Queries, keys and values of many tokens, from their projection: clamp, rotary embedding and the split into heads.

Stock operations take seven launches, some of them through float32 in memory.
"""

import math

import mlx.core as mx
from jaxtyping import BFloat16, Float32, Int32

from dbrx_fn.ops.kernels.cuda_module import Kernel, launch
from dbrx_fn.runtime.compile import typed

_THREADS = 256


@typed
def split_heads(
    projected: BFloat16[mx.array, "batch time all_heads"],
    offsets: Int32[mx.array, " batch_or_more"],
    inverse_frequencies: Float32[mx.array, "{head_dim}//2"],
    *,
    kv_n_heads: int,
    head_dim: int,
    clip: float | None,
) -> tuple[
    BFloat16[mx.array, "batch time n_heads {head_dim}"],
    BFloat16[mx.array, "batch {kv_n_heads} time {head_dim}"],
    BFloat16[mx.array, "batch {kv_n_heads} time {head_dim}"],
]:
    """What `project_qkv` returns, from the product of the normalized tokens with `Wqkv`.

    Args:
        projected: all query heads, then the key heads, then the value heads.
        offsets: the position of each row's first new token. More numbers may follow.
        inverse_frequencies: of the rotary embedding (`dbrx_fn.model.layers.rotary`).
        kv_n_heads: number of key heads, and of value heads.
        head_dim: entries per head, a multiple of 16.
        clip: the bound of the clamp; `None` means no clamp.
    """
    batch, time, width = projected.shape
    n_heads = width // head_dim - 2 * kv_n_heads
    q, k, v = launch(
        Kernel("split_heads", (("HEAD_DIM", head_dim), ("THREADS", _THREADS))),
        [projected, offsets, inverse_frequencies],
        [
            ((batch, time, n_heads, head_dim), mx.bfloat16),
            *[((batch, kv_n_heads, time, head_dim), mx.bfloat16)] * 2,
        ],
        blocks=(batch * time, 1, 1),
        threads=_THREADS,
        scalars=(time, n_heads, kv_n_heads, math.inf if clip is None else float(clip)),
    )
    return q, k, v
