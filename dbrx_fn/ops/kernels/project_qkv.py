"""Queries, keys and values in one kernel: norm, projection, clamp, rotary embedding and the split into heads.

With stock operations each of these is a launch of its own. The others together take about as long as the projection.
"""

import math

import mlx.core as mx
from jaxtyping import BFloat16, Float32, Int32

from dbrx_fn.ops.formats import Linear
from dbrx_fn.ops.kernels.cuda_module import Kernel, launch
from dbrx_fn.ops.kernels.layer_norm import layer_norm
from dbrx_fn.ops.kernels.segments import format_defines, leaves
from dbrx_fn.runtime.compile import typed

_ROWS = 16
"""Up to this many rows, the kernel reads the matrix once."""
_WARPS = 8


def fits(*, head_dim: int, dtype: mx.Dtype) -> bool:
    """Whether the kernel supports these sizes. Whether it supports the matrix is up to `linears.fits`."""
    return dtype == mx.bfloat16 and head_dim % 16 == 0


@typed
def project_qkv(
    weight: BFloat16[mx.array, " d_model"],
    matrix: Linear,
    x: BFloat16[mx.array, "batch time d_model"],
    offsets: Int32[mx.array, " batch_or_more"],
    inverse_frequencies: Float32[mx.array, "{head_dim}//2"],
    *,
    eps: float,
    kv_n_heads: int,
    head_dim: int,
    clip: float | None,
) -> tuple[
    BFloat16[mx.array, "batch time n_heads {head_dim}"],
    BFloat16[mx.array, "batch {kv_n_heads} time {head_dim}"],
    BFloat16[mx.array, "batch {kv_n_heads} time {head_dim}"],
]:
    """Queries, keys and values of each row's new tokens, clamped to ± `clip`. Queries and keys are rotated.

    Queries lie by token, as attention reads them. Keys and values lie by head, as in the cache.

    Args:
        weight: the norm's weight.
        matrix: `Wqkv`: all query heads, then the key heads, then the value heads.
        x: the residual stream, of few tokens.
        offsets: the position of each row's first new token. More numbers may follow.
        inverse_frequencies: of the rotary embedding (`dbrx_fn.model.layers.rotary`).
        eps: the norm's epsilon.
        kv_n_heads: number of key heads, and of value heads.
        head_dim: entries per head.
        clip: the bound of the clamp; `None` means no clamp.
    """
    batch, time, d_model = x.shape
    all_heads = matrix["weight"].shape[0] // head_dim
    n_heads = all_heads - 2 * kv_n_heads
    tokens = batch * time
    # A single token is normalized by every block again. Several are normalized once, in a launch of their own.
    alone = tokens == 1
    rows = 8 if tokens <= 8 else _ROWS
    defines = format_defines(matrix, d_model) | {
        "WARPS": _WARPS,
        # Blocks per multiprocessor. With four, DBRX's all run at once, if there are registers for that.
        "BLOCKS": 4 if alone else 3,
        "TILES": rows // 8,
        "HEAD_DIM": head_dim,
        "NORM_WIDTH": d_model if alone else 0,
        "SINGLE": int(time == 1),
    }
    q, k, v = launch(
        Kernel("project_qkv", tuple(defines.items())),
        [*([x, weight] if alone else [layer_norm(weight, x, eps=eps)]), *leaves(matrix), offsets, inverse_frequencies],
        [
            ((batch, time, n_heads, head_dim), mx.bfloat16),
            *[((batch, kv_n_heads, time, head_dim), mx.bfloat16)] * 2,
        ],
        blocks=(all_heads * head_dim // 16, -(-tokens // rows), 1),
        threads=32 * _WARPS,
        scalars=(
            tokens,
            *(() if time == 1 else (time,)),
            d_model,
            n_heads,
            kv_n_heads,
            math.inf if clip is None else float(clip),
            eps,
        ),
    )
    return q, k, v
