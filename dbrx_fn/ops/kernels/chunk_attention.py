"""Attention of many new tokens per row, as in prompts. It computes only what the causal mask leaves.

MLX's attention with a mask computes all positions up to a power of two. This kernel reads the lengths on the device.
"""

import math

import mlx.core as mx
from jaxtyping import BFloat16, Int32

from dbrx_fn.ops.kernels.cuda_module import Kernel, launch, multiprocessors
from dbrx_fn.runtime.compile import typed

# As in chunk_attention.cu.
_TOKENS, _KEYS, _STAGES = 128, 128, 2
# The most parts of a head's positions; heads that a block of the second kernel merges.
_MOST_SPLITS, _WARPS = 8, 8


@typed
def chunk_attention(
    q: BFloat16[mx.array, "batch time n_heads head_dim"],
    keys: BFloat16[mx.array, "batch kv_heads capacity head_dim"],
    values: BFloat16[mx.array, "batch kv_heads capacity head_dim"],
    offsets: Int32[mx.array, " batch_or_more"],
) -> BFloat16[mx.array, "batch time mixed"]:
    """What `decode_attention` returns, faster for many tokens. The arguments are the same."""
    batch, time, n_heads, head_dim = q.shape
    _, kv_n_heads, capacity, _ = keys.shape
    tasks = -(-time // _TOKENS) * batch * n_heads
    splits = _splits(tasks)
    out = (batch, time, n_heads * head_dim)
    made = launch(
        Kernel(
            "chunk_attention",
            (("HEAD_DIM", head_dim), ("GROUP", n_heads // kv_n_heads), ("SPLIT", int(splits > 1))),
        ),
        [q, keys, values, offsets],
        [(out, mx.bfloat16)]
        if splits == 1
        else [((batch, time, n_heads, splits, size), mx.float32) for size in (head_dim, 2)],
        blocks=(min(tasks * splits, multiprocessors()), 1, 1),
        threads=384,
        scalars=(capacity, batch, time, n_heads, splits, head_dim**-0.5 * math.log2(math.e)),
        shared_memory=_TOKENS * head_dim * 2 + 2 * _STAGES * _KEYS * head_dim * 2 + 32 * _STAGES,
    )
    if splits == 1:
        return made[0]
    return launch(
        Kernel("chunk_attention_combine", (("HEAD_DIM", head_dim), ("WARPS", _WARPS))),
        [*made, offsets],
        [(out, mx.bfloat16)],
        blocks=(-(-n_heads // _WARPS), time, batch),
        threads=32 * _WARPS,
        scalars=(capacity, time, n_heads, splits),
    )[0]


def _splits(tasks: int) -> int:
    """The number of parts of a task that keeps most multiprocessors busy. Enough tasks stay whole."""
    if tasks > multiprocessors():
        return 1
    return min(range(1, _MOST_SPLITS + 1), key=lambda splits: -(-tasks * splits // multiprocessors()) / splits)
