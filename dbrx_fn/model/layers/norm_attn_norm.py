"""The first half of a block: norm, attention, residual, norm; and why it hands on two streams.

A pre-norm transformer block is usually written as two alike sublayers, x + attn(norm_1(x)) and x + ffn(norm_2(x)).
DBRX's reference cuts the same arithmetic elsewhere, so that `norm_2` belongs to the attention's half:

    h = x + attn(norm_1(x))         the residual stream
    return h, norm_2(h)             the experts add to the first and read the second

The block then computes `h + moe(norm_2(h))`. The sum needs `h` as it is, and `h` can't be had back from its normalized
form; the experts and their router read that form, and it is made here because its weight lives in this half. The cut
is llm-foundry's `fuse_norm_attn_norm` (https://github.com/mosaicml/llm-foundry/pull/1102), where everything before the
experts is one module that activation checkpointing can take as its unit. Nothing is fused by it in the arithmetic, but
the parameters' names (`norm_attn_norm.attn.Wqkv`) follow it.
"""

from typing import Any

import mlx.core as mx
from jaxtyping import Float

from dbrx_fn.model.cache import Keys, Window
from dbrx_fn.model.config import Config
from dbrx_fn.model.layers.attn import attn
from dbrx_fn.ops.norm import layer_norm
from dbrx_fn.runtime.compile import compiled

Stream = Float[mx.array, "batch time d_model"]


@compiled
def norm_attn_norm(
    params: dict[str, Any], x: Stream, keys: Keys, values: Keys, window: Window, *, config: Config
) -> tuple[Stream, Stream, Keys, Keys]:
    """Residual attention with its norms.

    Args:
        params: `norm_1.weight`, `attn`, `norm_2.weight`.
        x: the residual stream.
        keys: this layer's cached keys.
        values: this layer's cached values.
        window: where `x` stands in the cache.
        config: sizes and constants.

    Returns:
        The residual stream, its normalized form for the experts, and the layer's new keys and values.
    """
    attended, keys, values = attn(params["attn"], layer_norm(params["norm_1"], x), keys, values, window, config=config)
    residual = x + attended
    return residual, layer_norm(params["norm_2"], residual), keys, values
