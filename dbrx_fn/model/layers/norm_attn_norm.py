"""The first half of a block: norm, attention, residual, norm. It returns two streams.

A pre-norm transformer block is usually written as two sublayers of one form, x + attn(norm_1(x)) and
x + ffn(norm_2(x)). DBRX's reference computes the same but puts `norm_2` into the attention half:

    h = x + attn(norm_1(x))         the residual stream
    return h, norm_2(h)             the experts add to the first and read the second

The block then computes `h + moe(norm_2(h))`. It needs both streams, since `h` can't be recovered from its normalized
form. The split comes from llm-foundry's `fuse_norm_attn_norm` (https://github.com/mosaicml/llm-foundry/pull/1102),
where everything before the experts is one module, a unit of activation checkpointing. Nothing is fused in the
arithmetic. The parameters' names (`norm_attn_norm.attn.Wqkv`) follow the split.
"""

import mlx.core as mx
from jaxtyping import Float

from dbrx_fn.model.cache import LayerCache
from dbrx_fn.model.config import NORM_EPS, LayerConfig
from dbrx_fn.model.layers.attn import attn
from dbrx_fn.model.positions import Positions
from dbrx_fn.model.tree import NormAttnNormParams
from dbrx_fn.ops.norm import layer_norm
from dbrx_fn.runtime.compile import compiled

Stream = Float[mx.array, "batch time d_model"]


@compiled
def norm_attn_norm(
    params: NormAttnNormParams, x: Stream, cache: LayerCache | None, positions: Positions, *, config: LayerConfig
) -> tuple[Stream, Stream, LayerCache | None]:
    """Residual attention with its norms.

    Args:
        params: both norms, and the attention's.
        x: the residual stream.
        cache: this layer's keys and values, if there is a cache.
        positions: the tokens' positions.
        config: sizes and constants.

    Returns:
        The residual stream, its normalized form for the experts, and the layer's cache with the new tokens.
    """
    normed = layer_norm(params["norm_1"]["weight"], x, eps=NORM_EPS)
    attended, cache = attn(params["attn"], normed, cache, positions, config=config)
    residual = x + attended
    return residual, layer_norm(params["norm_2"]["weight"], residual, eps=NORM_EPS), cache
