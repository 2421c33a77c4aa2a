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

from collections.abc import Sequence

import mlx.core as mx
from jaxtyping import Float

from dbrx_fn.model.cache import LayerCache, write
from dbrx_fn.model.config import LayerConfig
from dbrx_fn.model.layers.rotary import turn
from dbrx_fn.model.positions import Positions, Slots
from dbrx_fn.model.tree import AttnParams
from dbrx_fn.ops.attention import attention
from dbrx_fn.ops.collectives import all_sum, sum_gradients
from dbrx_fn.ops.kernels.cpu import attend as kernel
from dbrx_fn.ops.kernels.cpu.library import Twin
from dbrx_fn.ops.linear import linear
from dbrx_fn.ops.twin import with_kernel
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
    projected = linear(params["Wqkv"], sum_gradients(x, config.shard.size))
    mixed, cache = attend(projected, cache, positions, config=config)
    return all_sum(linear(params["out_proj"], mixed), config.shard.size), cache


def _kernel(
    projected: mx.array, cache: LayerCache | None, positions: Positions, *, config: LayerConfig
) -> tuple[mx.array, LayerCache | None]:
    slots = positions["slots"]
    assert cache is not None
    assert slots is not None
    batch, time, _ = projected.shape
    # Not `index`, which wraps around for padding that has no room.
    index = slots["starts"][:batch, None] + mx.arange(time, dtype=mx.int32)
    arrays = positions["cosines"], positions["sines"], index
    clip, twin = config.attn.clip_qkv, Twin(_stock, (config,))
    mixed, keys, values = kernel.attend(projected, *arrays, *cache, clip=clip, twin=twin)
    return mixed, (keys, values)


def _has_kernel(projected: mx.array, cache: LayerCache | None, positions: Positions, *, config: LayerConfig) -> bool:
    slots = positions["slots"]
    return cache is not None and slots is not None and kernel.fits(projected, *cache)


@with_kernel(_kernel, fits=_has_kernel, gradients=False)
def attend(
    projected: Float[mx.array, "batch time projections"],
    cache: LayerCache | None,
    positions: Positions,
    *,
    config: LayerConfig,
) -> tuple[Float[mx.array, "batch time d_model"], LayerCache | None]:
    """Clips, splits and rotates the projections, writes keys and values into the cache, and attends."""
    batch, time, _ = projected.shape
    if config.attn.clip_qkv is not None:
        projected = mx.clip(projected, -config.attn.clip_qkv, config.attn.clip_qkv)
    heads = projected.reshape(batch, time, -1, config.head_dim).swapaxes(1, 2)
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
    return mixed.swapaxes(1, 2).reshape(batch, time, -1), cache


def _stock(inputs: Sequence[mx.array], config: LayerConfig) -> list[mx.array]:
    """`attend` by stock operations, which is what a twin runs. The mask spans the entire cache."""
    projected, cosines, sines, index, keys, values = inputs
    visible = mx.arange(keys.shape[2], dtype=mx.int32) <= index[:, None, :, None]
    mask = mx.where(visible, 0.0, mx.finfo(mx.float32).min)
    capacity = keys.shape[2]
    slots: Slots = {"index": index % capacity, "kept": index >= capacity, "mask": mask, "starts": index[:, 0]}
    positions: Positions = {"cosines": cosines, "sines": sines, "slots": slots}
    mixed, cache = attend(projected, (keys, values), positions, config=config)
    assert cache is not None
    return [mixed, *cache]
