"""The key and value cache: an immutable value with a static capacity. `forward` returns the next one.

Each layer has one array of keys and one of values, `[batch kv_heads capacity head_dim]`. The first `lengths[b]`
positions of row b are real. Lengths are plain ints: bounds are checked on the host before anything runs (MLX writes
past an array's end silently), and nothing waits for the device. Compiled code gets the lengths as an array, so a new
length needs no new trace. A new capacity needs one, so capacities grow in buckets.

Writing a token doesn't copy the cache if nobody holds the old one, since MLX then reuses its buffers. So rebind:
`logits, cache = forward(params, tokens, cache)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
from jaxtyping import Bool, Float, Int32

from dbrx_fn.errors import CacheError
from dbrx_fn.files.json_file import shown
from dbrx_fn.model.config import Config
from dbrx_fn.model.shapes import capacity_bucket
from dbrx_fn.runtime.arguments import checked
from dbrx_fn.runtime.compile import typed
from dbrx_fn.runtime.device import backend, memory_size
from dbrx_fn.runtime.memory import check_buffer

Keys = Float[mx.array, "batch kv_heads capacity head_dim"]


LayerCache = tuple[Keys, Keys]
"""One layer's keys and values."""


@dataclass(frozen=True, eq=False)
class Cache:
    """Keys and values of the tokens that a batch of sequences has seen, for one config.

    `lengths`: number of tokens in each row.
    `keys`, `values`: one array per layer, `[batch kv_heads capacity head_dim]`. Keys are stored after the rotary
        embedding. To evaluate a cache: `mx.eval(cache.keys, cache.values)`.
    """

    config: Config
    lengths: tuple[int, ...]
    keys: tuple[mx.array, ...]
    values: tuple[mx.array, ...]

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        """Number of positions in each row."""
        return self.keys[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes that keys and values take."""
        return sum(array.nbytes for array in self.keys + self.values)


@checked
def init_cache(config: Config, batch_size: int = 1, capacity: int = 512) -> Cache:
    """An empty cache with room for `capacity` tokens in each of `batch_size` rows, in `config.dtype`.

    A cache of capacity 0 remembers nothing, as in training and scoring.

    Raises:
        CacheError: if `batch_size` is not positive, `capacity` is negative, or the cache won't fit in memory.
    """
    if batch_size < 1 or capacity < 0:
        raise CacheError(
            f"A cache can't have batch_size {shown(batch_size)} and capacity {shown(capacity)}: give at least 1 and at"
            " least 0."
        )
    shape = (batch_size, config.layer.local_kv_heads, capacity, config.head_dim)
    dtype = getattr(mx, config.dtype)
    check_memory(config, batch_size, max(capacity, 1))

    def empty() -> tuple[mx.array, ...]:
        return tuple(mx.zeros(shape, dtype) for _ in range(config.n_layers))

    return Cache(config, (0,) * batch_size, empty(), empty())


@checked
def grow_cache(cache: Cache, length: int) -> Cache:
    """The same cache with room for at least `length` tokens in each row (`capacity_bucket`).

    A cache that has the room already is returned unchanged.

    Raises:
        CacheError: if it won't fit in memory.
    """
    if length <= cache.capacity:
        return cache
    capacity = capacity_bucket(length)
    check_memory(cache.config, cache.batch_size, capacity)
    more = [(0, 0), (0, 0), (0, capacity - cache.capacity), (0, 0)]

    def grow(arrays: tuple[mx.array, ...]) -> tuple[mx.array, ...]:
        return tuple(mx.pad(array, more) for array in arrays)

    return replace(cache, keys=grow(cache.keys), values=grow(cache.values))


def check_memory(config: Config, batch_size: int, capacity: int) -> None:
    """Raises `CacheError` if such a cache won't fit in memory."""
    if max(batch_size, capacity) >= 2**31:
        raise CacheError(f"A cache can't have {shown(max(batch_size, capacity))} rows or tokens: give below 2**31.")
    one = batch_size * config.layer.local_kv_heads * capacity * config.head_dim * getattr(mx, config.dtype).size
    needed = 2 * config.n_layers * one
    if needed > memory_size():
        raise CacheError(
            f"A cache of {batch_size} times {capacity} tokens needs {needed / 2**30:.1f} GiB and this machine has"
            f" {memory_size() / 2**30:.1f} GiB: make it shorter or smaller."
        )
    keys = f"Of a cache of {batch_size} times {capacity} tokens, a layer's keys"
    check_buffer(keys, one, "make it shorter or smaller", CacheError)


def extended(cache: Cache, lengths: Sequence[int], layers: Sequence[LayerCache]) -> Cache:
    """The cache after `lengths` more tokens in each row; `layers` holds each layer's new keys and values."""
    after = tuple(held + new for held, new in zip(cache.lengths, lengths, strict=True))
    keys, values = zip(*layers, strict=True)
    return replace(cache, lengths=after, keys=keys, values=values)


@typed
def write(
    held: Keys,
    new: Float[mx.array, "batch kv_heads time head_dim"],
    index: Int32[mx.array, "batch time"],
    kept: Bool[mx.array, "batch time"] | None,
) -> Keys:
    """Writes each row's `new` keys (or values) at `index`. Slots where `kept` is true keep their old contents."""
    # CUDA writes one number a thread, so wide numbers are written faster.
    wide = backend() == "cuda" and new.shape[3] % 4 == 0
    dtype = held.dtype
    if wide:
        held, new = held.view(mx.uint64), new.view(mx.uint64)
    index = mx.broadcast_to(index[:, None, :, None], new.shape)
    if kept is not None:
        new = mx.where(kept[:, None, :, None], mx.take_along_axis(held, index, axis=2), new)
    written = mx.put_along_axis(held, index, new, axis=2)
    return written.view(dtype) if wide else written
