"""Grouped-query attention over given keys and values."""

import mlx.core as mx
from jaxtyping import Float

from dbrx_fn.ops import cpu
from dbrx_fn.runtime.compile import typed


@typed
def attention(
    q: Float[mx.array, "batch heads time head_dim"],
    k: Float[mx.array, "batch kv_heads seen head_dim"],
    v: Float[mx.array, "batch kv_heads seen head_dim"],
    mask: Float[mx.array, "batch 1 time seen"] | None,
    *,
    wraps: bool,
) -> Float[mx.array, "batch heads time head_dim"]:
    """Scaled dot-product attention, scores scaled by 1 / sqrt(head_dim).

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: added to the scores. Causal, if not given.
        wraps: whether some queries' positions lie past the last key. Else query t sees no key after `seen - time + t`.
    """
    scale = q.shape[-1] ** -0.5
    if cpu.on_linux_cpu():
        return cpu.attention(q, k, v, scale, mask, wraps=wraps)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal" if mask is None else mask)
