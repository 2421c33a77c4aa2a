"""One of the model's layers: attention's half and the experts' half, joined by the residual stream."""

from typing import Any

import mlx.core as mx
from jaxtyping import UInt32

from dbrx_fn.model.cache import Keys, Window
from dbrx_fn.model.config import Config
from dbrx_fn.model.layers import decode_block
from dbrx_fn.model.layers.moe import moe
from dbrx_fn.model.layers.norm_attn_norm import Stream, norm_attn_norm
from dbrx_fn.model.layers.router import Routing
from dbrx_fn.model.params import check_part
from dbrx_fn.runtime.compile import compiled


@compiled
def block(
    params: dict[Any, Any],
    x: Stream,
    keys: Keys,
    values: Keys,
    window: Window,
    jitter_key: UInt32[mx.array, "2"] | None = None,
    *,
    config: Config,
) -> tuple[Stream, Keys, Keys, Routing]:
    """`h = x + attn(norm_1(x))`, then `h + moe(norm_2(h))`.

    Args:
        params: `norm_attn_norm` and `ffn`.
        x: the residual stream.
        keys: this layer's cached keys.
        values: this layer's cached values.
        window: where `x` stands in the cache.
        jitter_key: for the router's jitter; none, if not given.
        config: sizes and constants.

    Returns:
        The residual stream after this layer, the layer's new keys and values, and what its router said.

    Raises:
        CheckpointError: when it first meets parameters that don't fit the config, naming those of the first block.
    """
    check_part(params, config=config, under="transformer.blocks.0")
    if decode_block.fits(params, x, window, jitter_key, config):
        return decode_block.decode_block(params, x, keys, values, window, config=config)
    residual, normed, keys, values = norm_attn_norm(params["norm_attn_norm"], x, keys, values, window, config=config)
    mixed, routing = moe(params["ffn"], normed, jitter_key, config=config.ffn, cached=window["slots"] is not None)
    return residual + mixed, keys, values, routing
