"""Grouped-query attention with clipped projections and rotary positions.

One matrix, `Wqkv`, makes all queries, keys and values; `clip_qkv` then clamps every one of their entries, to [-8, 8]
in the released model. That is a guard for training at scale: attention scores are products of two such vectors, and
entries that run away show as spikes in the loss. The clamp stops runaway entries (not large scores as such: it bounds
them by head_dim * clip² / sqrt(head_dim), 724 here) for one elementwise operation and no parameters, where
normalizing queries and keys would cost both. MosaicML added it to its GPT in 2023
(https://github.com/mosaicml/examples/pull/197, with what was tried), from where it came to MPT and llm-foundry, with
which DBRX was trained. At inference it isn't optional: the clamp is part of the function that was trained.

Rotary positions are in `rotary.py`. Grouped queries (https://arxiv.org/abs/2305.13245): `n_heads / kv_n_heads` query
heads share one key and value head, so the cache is that many times smaller.
"""

import mlx.core as mx
from jaxtyping import Float

from dbrx_fn.model.cache import LayerCache, write
from dbrx_fn.model.config import LayerConfig
from dbrx_fn.model.layers.rotary import turn
from dbrx_fn.model.positions import Positions
from dbrx_fn.model.tree import AttnParams
from dbrx_fn.ops.attention import attention
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
    """Attends from each new token to itself and all before it, in the cache and in `x`.

    Args:
        params: the projections.
        x: normalized activations.
        cache: this layer's keys and values; without one, `x` is all there is.
        positions: where `x` stands.
        config: sizes and `clip_qkv`.

    Returns:
        The attention's output, and the cache with the new tokens' keys and values written in.
    """
    batch, time, _ = x.shape
    qkv = linear(params["Wqkv"], x)
    if config.attn.clip_qkv is not None:
        qkv = mx.clip(qkv, -config.attn.clip_qkv, config.attn.clip_qkv)
    heads = qkv.reshape(batch, time, -1, config.head_dim).swapaxes(1, 2)
    turning = config.n_heads + config.attn.kv_n_heads
    turned = turn(heads[:, :turning], positions["cosines"], positions["sines"])
    q, k, v = turned[:, : config.n_heads], turned[:, config.n_heads :], heads[:, turning:]
    slots = positions["slots"]
    if cache is None or slots is None:
        mixed = attention(q, k, v, None, wraps=False)
    else:
        keys = write(cache[0], k, slots["index"], slots["kept"])
        values = write(cache[1], v, slots["index"], slots["kept"])
        cache = keys, values
        seen = slots["mask"].shape[-1]
        mixed = attention(q, keys[:, :, :seen], values[:, :, :seen], slots["mask"], wraps=slots["kept"] is not None)
    return linear(params["out_proj"], mixed.swapaxes(1, 2).reshape(batch, time, -1)), cache
