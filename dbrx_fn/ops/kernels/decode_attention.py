"""Attention of a few new tokens per row. Its cost grows with the cached tokens, not with the cache's capacity.

MLX's attention reads a mask and the whole capacity. These kernels read the lengths on the device. The first spreads the
positions over the GPU, the second merges the parts.
"""

import math

import mlx.core as mx
from jaxtyping import BFloat16, Int32

from dbrx_fn.ops.kernels.cuda_module import Kernel, launch, multiprocessors
from dbrx_fn.runtime.compile import typed

FEW_TOKENS = 16
"""Up to this many new tokens per row, this is faster than `chunk_attention`."""

# Warps per block; blocks that a multiprocessor runs at once; splits that the second kernel can merge.
_WARPS = 4
_BLOCKS = 3
_MOST_SPLITS = 64


def fits(*, head_dim: int, dtype: mx.Dtype) -> bool:
    """Whether the kernel supports these sizes."""
    return dtype == mx.bfloat16 and head_dim in (64, 128)


@typed
def decode_attention(
    q: BFloat16[mx.array, "batch time n_heads head_dim"],
    keys: BFloat16[mx.array, "batch kv_heads capacity head_dim"],
    values: BFloat16[mx.array, "batch kv_heads capacity head_dim"],
    offsets: Int32[mx.array, " batch_or_more"],
) -> BFloat16[mx.array, "batch time mixed"]:
    """Attends from each row's new token t to positions 0 to `offsets + t`. Returns `[batch time n_heads * head_dim]`.

    Args:
        q: queries after the rotary embedding.
        keys: the cache, with the new tokens' keys.
        values: the cache, with the new tokens' values.
        offsets: the position of each row's first new token. More numbers may follow.
    """
    batch, time, n_heads, head_dim = q.shape
    _, kv_n_heads, capacity, _ = keys.shape
    group = n_heads // kv_n_heads
    columns = kv_n_heads * -(-time * group // 8)
    splits = _splits(batch * columns, capacity)
    defines, single = (("HEAD_DIM", head_dim), ("WARPS", _WARPS)), time == 1
    parts, stats = launch(
        Kernel("decode_attention", (*defines, ("GROUP", group), ("SINGLE", int(single)))),
        [q, keys, values, offsets],
        [((batch, time, n_heads, splits, size), mx.float32) for size in (head_dim, 2)],
        blocks=(splits, columns, batch),
        threads=32 * _WARPS,
        scalars=(capacity, *(() if single else (time, kv_n_heads)), head_dim**-0.5 * math.log2(math.e)),
    )
    (out,) = launch(
        Kernel("decode_attention_combine", defines),
        [parts, stats, offsets],
        [((batch, time, n_heads * head_dim), mx.bfloat16)],
        blocks=(n_heads, time, batch),
        threads=256,
        scalars=(splits, capacity),
    )
    return out


def _splits(blocks: int, capacity: int) -> int:
    """How many splits the positions have, given the number of blocks in each split.

    As many as fill the GPU with blocks, if the positions suffice. At least four, since otherwise one long row among
    many short ones would use only a few multiprocessors.
    """
    return min(max(4, _BLOCKS * multiprocessors() // blocks), -(-capacity // (16 * _WARPS)), _MOST_SPLITS)
