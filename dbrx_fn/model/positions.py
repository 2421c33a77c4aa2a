"""Where a chunk of tokens stands: its rotary angles, and its slots in a cache. Made once for all layers."""

from typing import TypedDict

import mlx.core as mx
from jaxtyping import Int32

from dbrx_fn.model.cache import Cache
from dbrx_fn.model.config import LayerConfig
from dbrx_fn.model.layers.rotary import turns
from dbrx_fn.model.shapes import attended
from dbrx_fn.runtime.compile import compiled


class Slots(TypedDict):
    """Where each token goes in a cache, and what it sees there.

    `index`: int32 `[batch time]`, where its key and value are written.
    `kept`: bool `[batch time]`, which of those slots must keep what they hold; `None` where none must.
    `mask`: `[batch 1 time attended]`, added to attention scores: a token sees its own position and those before it,
        among the first `attended` of the cache.
    `starts`: int32 `[batch + 3]`, the position of each row's first new token, and zeros. MLX keeps CUDA arrays of up to
        8 bytes in the host's memory, where a kernel that reads them waits 6 to 17 us.
    """

    index: mx.array
    kept: mx.array | None
    mask: mx.array
    starts: mx.array


class Positions(TypedDict):
    """Where tokens stand.

    `cosines`, `sines`: by which queries and keys turn (`rotary.turns`), of each row or of all.
    `slots`: in the cache; `None` where there is none.
    """

    cosines: mx.array
    sines: mx.array
    slots: Slots | None


def positions_of(time: int, lengths: tuple[int, ...], cache: Cache | None, config: LayerConfig) -> Positions:
    """The positions of `time` tokens a row, of which the first `lengths` are real, behind what `cache` holds."""
    if cache is None:
        cosines, sines = turns(
            mx.arange(time, dtype=mx.int32)[None], head_dim=config.head_dim, theta=config.attn.rope_theta
        )
        return {"cosines": cosines, "sines": sines, "slots": None}
    last = max(cache.lengths) + time
    return _in_cache(
        mx.array(cache.lengths, mx.int32),
        mx.array(lengths, mx.int32),
        time=time,
        capacity=cache.capacity,
        attended=attended(time, last, cache.capacity),
        wraps=last > cache.capacity,
        config=config,
    )


@compiled
def _in_cache(
    starts: Int32[mx.array, " batch"],
    lengths: Int32[mx.array, " batch"],
    *,
    time: int,
    capacity: int,
    attended: int,
    wraps: bool,
    config: LayerConfig,
) -> Positions:
    """Positions behind the `starts` tokens that each row holds.

    Padding is written behind a row's real tokens, where the next ones will overwrite it. Where a row has no room for
    its padding (`wraps`), the padding goes round to the row's start and writes there what is there already.
    The mask is additive, which on CUDA costs less than half of what a boolean one does.
    """
    float_type = getattr(mx, config.dtype)
    batch, starts = starts.size, mx.pad(starts, (0, 3))
    # Of the longer array, so that one token's slot too lies in the GPU's memory.
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
