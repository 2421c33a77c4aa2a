"""One of the model's layers: attention's half and the experts' half, joined by the residual stream."""

from typing import Any

from dbrx_fn.cache import Keys, Window
from dbrx_fn.compile import compiled
from dbrx_fn.config import Config
from dbrx_fn.layers.moe import moe
from dbrx_fn.layers.norm_attn_norm import Stream, norm_attn_norm
from dbrx_fn.params import check_params


@compiled
def block(
    params: dict[str, Any], x: Stream, keys: Keys, values: Keys, window: Window, *, config: Config
) -> tuple[Stream, Keys, Keys]:
    """`h = x + attn(norm_1(x))`, then `h + moe(norm_2(h))`.

    Args:
        params: `norm_attn_norm` and `ffn`.
        x: the residual stream.
        keys: this layer's cached keys.
        values: this layer's cached values.
        window: where `x` stands in the cache.
        config: sizes and constants.

    Returns:
        The residual stream after this layer, and the layer's new keys and values.

    Raises:
        CheckpointError: when traced with parameters that don't fit the config, naming those of the first block.
    """
    # Any block's parameters get here once per shape that they come in, so this costs nothing per token.
    check_params(params, config, under="transformer.blocks.0")
    residual, normed, keys, values = norm_attn_norm(params["norm_attn_norm"], x, keys, values, window, config=config)
    return residual + moe(params["ffn"], normed, config=config.ffn), keys, values
