"""A token's queries, keys and values in one kernel: norm, projection, clamp, rotary embedding and the split into heads.

Stock operations take a launch for each of these and more, and the projection is not much longer than all of them.
"""

import math

import mlx.core as mx
from jaxtyping import BFloat16, Float32, Int32

from dbrx_fn.ops.formats import Linear
from dbrx_fn.ops.kernels.cuda_module import Kernel, launch
from dbrx_fn.ops.kernels.layer_norm import layer_norm
from dbrx_fn.ops.kernels.segments import format_defines, leaves
from dbrx_fn.runtime.compile import typed

_WARPS = 8


def fits(*, head_dim: int, dtype: mx.Dtype) -> bool:
    """Whether the kernel has these sizes, if there is a kernel for the matrix at all."""
    return dtype == mx.bfloat16 and head_dim % 16 == 0


@typed
def project_qkv(
    weight: BFloat16[mx.array, " d_model"],
    matrix: Linear,
    x: BFloat16[mx.array, "batch 1 d_model"],
    offsets: Int32[mx.array, " batch_or_more"],
    inverse_frequencies: Float32[mx.array, "{head_dim}//2"],
    *,
    eps: float,
    kv_n_heads: int,
    head_dim: int,
    clip: float | None,
) -> tuple[
    BFloat16[mx.array, "batch n_heads 1 {head_dim}"],
    BFloat16[mx.array, "batch {kv_n_heads} 1 {head_dim}"],
    BFloat16[mx.array, "batch {kv_n_heads} 1 {head_dim}"],
]:
    """Queries, keys and values of each row's new token, clamped to ± `clip`, the first two turned.

    Args:
        weight: of the norm.
        matrix: `Wqkv`: all heads of the queries, then of the keys, then of the values.
        x: the residual stream, of few rows.
        offsets: the token's position, of each row, and perhaps more numbers behind.
        inverse_frequencies: of the rotary positions (`dbrx_fn.model.layers.rotary`).
        eps: of the norm.
        kv_n_heads: heads of keys, and of values; the others are queries'.
        head_dim: entries of a head.
        clip: none, if `None`.
    """
    batch, _, d_model = x.shape
    all_heads = matrix["weight"].shape[0] // head_dim
    n_heads = all_heads - 2 * kv_n_heads
    # Several rows are normalized once, by a launch of their own: here each block would do it for all of them.
    alone = batch == 1
    rows = 8 if batch <= 8 else 16
    defines = format_defines(matrix, d_model) | {
        "WARPS": _WARPS,
        # All at once, where there are registers for that.
        "BLOCKS": 4 if alone else 3,
        "TILES": rows // 8,
        "HEAD_DIM": head_dim,
        "NORM_WIDTH": d_model if alone else 0,
    }
    q, k, v = launch(
        Kernel("project_qkv", tuple(defines.items())),
        [*([x, weight] if alone else [layer_norm(weight, x, eps=eps)]), *leaves(matrix), offsets, inverse_frequencies],
        [((batch, heads, 1, head_dim), mx.bfloat16) for heads in (n_heads, kv_n_heads, kv_n_heads)],
        blocks=(all_heads * head_dim // 16, -(-batch // rows), 1),
        threads=32 * _WARPS,
        scalars=(batch, d_model, n_heads, kv_n_heads, math.inf if clip is None else float(clip), eps),
    )
    return q, k, v
