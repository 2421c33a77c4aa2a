"""Clip, rotation, the cache's new keys and values, and attention over them, as one kernel of the CPU."""

import math

import mlx.core as mx

from dbrx_fn.ops.kernels.cpu.library import Output, Twin, has_kernels, launch


def fits(projected: mx.array, keys: mx.array, values: mx.array) -> bool:
    """Whether the kernel takes these projections and this cache."""
    are_float32 = projected.dtype == keys.dtype == values.dtype == mx.float32
    return has_kernels() and are_float32 and keys.shape == values.shape


def attend(
    projected: mx.array,
    cosines: mx.array,
    sines: mx.array,
    index: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    clip: float | None,
    twin: Twin,
) -> list[mx.array]:
    """What each new token attends to, and the cache with the new tokens' keys and values.

    Args:
        projected: float32 `[batch time (heads + 2 * kv_heads) * head_dim]`.
        cosines, sines: `Positions`'.
        index: int32 `[batch time]`, the slots of the new tokens, one after the other in each row. A token sees all
            slots up to its own. Padding may have slots behind the cache, which aren't written.
        keys, values: float32 `[batch kv_heads capacity head_dim]`.
        clip: the largest absolute value of an entry of `projected`.
        twin: stock operations of these six arrays.

    Returns:
        float32 `[batch time heads * head_dim]`; keys; values.
    """
    batch, time, width = projected.shape
    _, kv_heads, capacity, head_dim = keys.shape
    heads = width // head_dim - 2 * kv_heads
    outputs = [
        Output((batch, time, heads * head_dim), mx.float32),
        Output(keys.shape, mx.float32, taken=4),
        Output(values.shape, mx.float32, taken=5),
    ]
    return launch(
        "attend",
        [projected, cosines, sines, index, keys, values],
        outputs,
        numbers=[batch, time, heads, kv_heads, head_dim, capacity, cosines.shape[0]],
        constants=[math.inf if clip is None else clip, head_dim**-0.5],
        twin=twin,
    )
