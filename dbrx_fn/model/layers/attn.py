"""Grouped-query attention with clipped projections and rotary positions.

One matrix, `Wqkv`, makes all queries, keys and values; `clip_qkv` then clamps every one of their entries, to [-8, 8]
in the released model. That is a guard for training at scale: attention scores are products of two such vectors, and
entries that run away show as spikes in the loss. The clamp stops runaway entries (not large scores as such: it bounds
them by head_dim * clip² / sqrt(head_dim), 724 here) for one elementwise operation and no parameters, where
normalizing queries and keys would cost both. MosaicML added it to its GPT in 2023
(https://github.com/mosaicml/examples/pull/197, with what was tried), from where it came to MPT and llm-foundry, with
which DBRX was trained. At inference it isn't optional: the clamp is part of the function that was trained.

Rotary positions are `dbrx_fn.model.layers.rotary`'s. Grouped queries (https://arxiv.org/abs/2305.13245): `n_heads /
kv_n_heads` query heads share one key and value head, so the cache is that many times smaller.
"""

from typing import Any

import mlx.core as mx
from jaxtyping import Float

from dbrx_fn.model.cache import Keys, Window, write
from dbrx_fn.model.config import Config
from dbrx_fn.model.layers.rotary import turn
from dbrx_fn.ops.attention import attention
from dbrx_fn.ops.linear import linear
from dbrx_fn.runtime.compile import compiled


@compiled
def attn(
    params: dict[str, Any],
    x: Float[mx.array, "batch time d_model"],
    keys: Keys,
    values: Keys,
    window: Window,
    *,
    config: Config,
) -> tuple[Float[mx.array, "batch time d_model"], Keys, Keys]:
    """Attends from each new token to itself and all before it, in the cache and in `x`.

    Args:
        params: `Wqkv.weight` `[qkv d_model]` (rows: query heads, key heads, value heads) and `out_proj.weight`.
        x: normalized activations.
        keys: this layer's cached keys; of capacity 0, `x` is all there is.
        values: this layer's cached values.
        window: where `x` stands in the cache (`dbrx_fn.model.cache.window`).
        config: sizes and `clip_qkv`.

    Returns:
        The attention's output, and keys and values with the new tokens' written in.
    """
    batch, time, _ = x.shape
    qkv = linear(params["Wqkv"], x)
    if config.attn.clip_qkv is not None:
        qkv = mx.clip(qkv, -config.attn.clip_qkv, config.attn.clip_qkv)
    heads = qkv.reshape(batch, time, -1, config.head_dim).swapaxes(1, 2)
    turning = config.n_heads + config.attn.kv_n_heads
    q, k = mx.split(turn(heads[:, :turning], window["cosines"], window["sines"]), [config.n_heads], axis=1)
    v = heads[:, turning:]
    if window["slots"] is not None:
        keys = write(keys, k, window["slots"], window["kept"])
        values = write(values, v, window["slots"], window["kept"])
        k, v = keys, values
    mask = window["mask"]
    if mask is not None:
        k, v = (held[:, :, : mask.shape[-1]] for held in (k, v))
    mixed = attention(q, k, v, mask, wraps=window["kept"] is not None)
    out = linear(params["out_proj"], mixed.swapaxes(1, 2).reshape(batch, time, -1))
    return out, keys, values
