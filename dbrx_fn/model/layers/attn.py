"""Grouped-query attention with clipped projections and rotary positions.

One matrix, `Wqkv`, makes all queries, keys and values. `clip_qkv` then clamps each of their entries, to [-8, 8] in the
released model. The clamp keeps training stable: attention scores are products of two such vectors, and runaway entries
show as spikes in the loss. It bounds a score by head_dim * clip² / sqrt(head_dim), which is 724 in the released model.
It needs no parameters and no reduction, unlike the normalization of queries and keys. MosaicML introduced it
(https://github.com/mosaicml/examples/pull/197). Inference needs it too, since the model was trained with it.
`docs/architecture.md` has the history.

Rotary positions are in `rotary.py`. With grouped queries (https://arxiv.org/abs/2305.13245), `n_heads / kv_n_heads`
query heads share one key and value head, and the cache is smaller by that factor.
"""

import mlx.core as mx
from jaxtyping import Float

from dbrx_fn.model.cache import LayerCache, write
from dbrx_fn.model.config import LayerConfig
from dbrx_fn.model.layers.rotary import turn
from dbrx_fn.model.positions import Positions
from dbrx_fn.model.tree import AttnParams
from dbrx_fn.ops.attention import attention
from dbrx_fn.ops.collectives import all_sum, sum_gradients
from dbrx_fn.ops.linear import linear
from dbrx_fn.runtime.compile import compiled


@compiled
def attn(
    params: AttnParams,
    x: Float[mx.array, "batch time d_model"],
    cache: LayerCache | None,
    positions: Positions,
    *,
    config: LayerConfig,
) -> tuple[Float[mx.array, "batch time d_model"], LayerCache | None]:
    """Attends from each new token to itself and to all tokens before it, in the cache and in `x`.

    Args:
        params: the projections.
        x: normalized activations.
        cache: this layer's keys and values. Without one, tokens attend to `x` only.
        positions: the tokens' positions.
        config: sizes and `clip_qkv`.

    Returns:
        The attention's output, and the cache with the new tokens' keys and values.
    """
    batch, time, _ = x.shape
    qkv = linear(params["Wqkv"], sum_gradients(x, config.shard.size))
    if config.attn.clip_qkv is not None:
        qkv = mx.clip(qkv, -config.attn.clip_qkv, config.attn.clip_qkv)
    heads = qkv.reshape(batch, time, -1, config.head_dim).swapaxes(1, 2)
    turning = config.local_heads + config.local_kv_heads
    turned = turn(heads[:, :turning], positions["cosines"], positions["sines"])
    q, k, v = turned[:, : config.local_heads], turned[:, config.local_heads :], heads[:, turning:]
    slots = positions["slots"]
    if cache is None or slots is None:
        mixed = attention(q, k, v, None, wraps=False)
    else:
        keys = write(cache[0], k, slots["index"], slots["kept"])
        values = write(cache[1], v, slots["index"], slots["kept"])
        cache = keys, values
        seen = slots["mask"].shape[-1]
        mixed = attention(q, keys[:, :, :seen], values[:, :, :seen], slots["mask"], wraps=slots["kept"] is not None)
    projected = linear(params["out_proj"], mixed.swapaxes(1, 2).reshape(batch, time, -1))
    return all_sum(projected, config.shard.size), cache
