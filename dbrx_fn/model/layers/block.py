"""One transformer block: the attention half and the expert half, joined by the residual stream."""

import mlx.core as mx
from jaxtyping import Float, Int32, UInt32

from dbrx_fn.model.cache import LayerCache
from dbrx_fn.model.config import LayerConfig
from dbrx_fn.model.layers import cached_block
from dbrx_fn.model.layers.moe import moe
from dbrx_fn.model.layers.norm_attn_norm import Stream, norm_attn_norm
from dbrx_fn.model.layers.router import Routing
from dbrx_fn.model.params import compiled_under
from dbrx_fn.model.positions import Positions, pick
from dbrx_fn.model.tree import BlockParams
from dbrx_fn.ops.twin import with_kernel


@compiled_under("transformer.blocks.0")
@with_kernel(cached_block.cached_block, fits=cached_block.fits, gradients=False)
def block(
    params: BlockParams,
    x: Stream,
    cache: LayerCache | None,
    positions: Positions,
    jitter_key: UInt32[mx.array, "2"] | None = None,
    wanted: Int32[mx.array, " batch"] | None = None,
    *,
    config: LayerConfig,
) -> tuple[Float[mx.array, "batch time_or_1 d_model"], LayerCache | None, Routing]:
    """`h = x + attn(norm_1(x))`, then `h + moe(norm_2(h))`.

    Args:
        params: one layer's parameters.
        x: the residual stream.
        cache: this layer's keys and values, if there is a cache.
        positions: the tokens' positions.
        jitter_key: for the router's jitter. No jitter, if not given.
        wanted: the one token of each row whose results are wanted. All tokens', if not given.
        config: sizes and constants.

    Returns:
        The residual stream after this layer, the layer's cache with all new tokens, and its routing. With `wanted` the
        stream is `[batch 1 d_model]`, and the routing that of these tokens.

    Raises:
        CheckpointError: if the parameters don't fit the config. All layers share this code, so the error names
            the first block's leaves.
    """
    residual, normed, after = norm_attn_norm(params["norm_attn_norm"], x, cache, positions, config=config)
    if wanted is not None:
        residual, normed = pick(residual, wanted), pick(normed, wanted)
    mixed, routing = moe(
        params["ffn"], normed, jitter_key, config=config.ffn, cached=cache is not None, shard=config.shard
    )
    return residual + mixed, after, routing
