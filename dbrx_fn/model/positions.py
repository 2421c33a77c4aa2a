"""The positions of a chunk of tokens: rotary angles and cache slots, computed once for all layers."""

from typing import TypedDict

import mlx.core as mx
from jaxtyping import Float, Int32

from dbrx_fn.model.cache import Cache
from dbrx_fn.model.config import LayerConfig
from dbrx_fn.model.layers.rotary import turns
from dbrx_fn.model.shapes import attended
from dbrx_fn.runtime.compile import compiled


class Slots(TypedDict):
    """The cache slot of each token, and the slots that it attends to.

    `index`: int32 `[batch time]`, the slots where keys and values are written.
    `kept`: bool `[batch time]`, true for slots that must keep their contents; `None` if there are none.
    `mask`: `[batch 1 time attended]`, added to attention scores. A token sees its own position and those before it,
        among the first `attended` of the cache.
    `starts`: int32 `[batch + 3]`, the position of each row's first new token, then three zeros. The zeros keep the
        array in the GPU's memory: MLX keeps CUDA arrays of up to 8 bytes in the host's, which kernels read slowly.
    """

    index: mx.array
    kept: mx.array | None
    mask: mx.array
    starts: mx.array


class Positions(TypedDict):
    """The positions of a chunk's tokens.

    `cosines`, `sines`: the rotation of queries and keys (`rotary.turns`), one for each row or one for all.
    `slots`: places in the cache; `None` without a cache.
    """

    cosines: mx.array
    sines: mx.array
    slots: Slots | None


def positions_of(
    time: int, lengths: tuple[int, ...], cache: Cache | None, config: LayerConfig, *, whole_cache: bool = False
) -> Positions:
    """The positions of `time` tokens per row after those in `cache`. The first `lengths` are real, the rest padding.

    With `whole_cache` tokens attend over the whole capacity, masked, instead of a span that holds the longest row.
    """
    if cache is None:
        cosines, sines = turns(
            mx.arange(time, dtype=mx.int32)[None], head_dim=config.head_dim, theta=config.attn.rope_theta
        )
        return {"cosines": cosines, "sines": sines, "slots": None}
    last = max(cache.lengths) + time
    return in_cache(
        mx.array(cache.lengths, mx.int32),
        mx.array(lengths, mx.int32),
        time=time,
        capacity=cache.capacity,
        attended=cache.capacity if whole_cache else attended(time, last, cache.capacity),
        wraps=last > cache.capacity,
        config=config,
    )


def pick(
    rows: Float[mx.array, "batch time *rest"], wanted: Int32[mx.array, " batch"]
) -> Float[mx.array, "batch 1 *rest"]:
    """One token of each row."""
    batch, time, *rest = rows.shape
    # Any number of axes would be as many of MLX's kernels.
    picked = mx.take_along_axis(rows.reshape(batch, time, -1), wanted[:, None, None], axis=1)
    return picked.reshape(batch, 1, *rest)


@compiled
def in_cache(
    starts: Int32[mx.array, " batch"],
    lengths: Int32[mx.array, " batch"],
    *,
    time: int,
    capacity: int,
    attended: int,
    wraps: bool,
    config: LayerConfig,
) -> Positions:
    """Positions of `time` tokens per row after the `starts` that each row holds. The first `lengths` are real.

    Padding is written behind a row's real tokens, where the next tokens overwrite it. If a row lacks room for its
    padding (`wraps`), the padding's slots wrap around to the row's start and rewrite the old contents there. The mask
    is additive, since a boolean one costs more than twice as much on CUDA (`docs/architecture.md`).
    """
    float_type = getattr(mx, config.dtype)
    batch, starts = starts.size, mx.pad(starts, (0, 3))
    # Made from the padded `starts`: then even a single token's slot lies in the GPU's memory.
    positions = (starts[:, None] + mx.arange(time, dtype=mx.int32))[:batch]
    visible = mx.arange(attended, dtype=mx.int32) <= positions[:, None, :, None]
    mask = mx.where(visible, mx.array(0, float_type), mx.array(mx.finfo(float_type).min, float_type))
    cosines, sines = turns(positions, head_dim=config.head_dim, theta=config.attn.rope_theta)
    index, kept = positions, None
    if wraps:
        index, kept = positions % capacity, mx.arange(time, dtype=mx.int32) >= lengths[:, None]
    return {
        "cosines": cosines,
        "sines": sines,
        "slots": {"index": index, "kept": kept, "mask": mask, "starts": starts},
    }
