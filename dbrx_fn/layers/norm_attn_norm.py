"""The first half of a block: norm, attention, residual, norm; and why it hands on two streams.

A pre-norm transformer block is usually written as two alike sublayers, x + attn(norm_1(x)) and x + ffn(norm_2(x)).
DBRX's reference cuts the same arithmetic elsewhere, so that `norm_2` belongs to the attention's half:

    h = x + attn(norm_1(x))         the residual stream
    return h, norm_2(h)             the experts add to the first and read the second

The block then computes `h + moe(norm_2(h))`. Both streams must be handed on since neither can be had from the other
cheaply: the sum is taken over unnormalized activations, the experts (and their router) want normalized ones. The cut
comes from MosaicML's llm-foundry (`fuse_norm_attn_norm`), where it kept everything before the experts in one module
that could be fused, sharded and checkpointed apart from the mixture of experts; the parameters' names
(`norm_attn_norm.attn.Wqkv`) still show it.
"""

from typing import Any

import mlx.core as mx
from jaxtyping import Float

from dbrx_fn.cache import Keys, Window
from dbrx_fn.compile import compiled
from dbrx_fn.config import Config
from dbrx_fn.layers.attn import attn
from dbrx_fn.layers.norm import layer_norm

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
