"""Operations on the rows of a cache: choose, repeat, reorder, replace and shorten them.

    cache = take_rows(cache, [0] * 8)           # one prompt, eight answers
    cache = take_rows(cache, [2, 2, 0])         # beam search continues row 2 twice and row 0 once
    cache = put_rows(cache, [5], other)         # a new sequence takes row 5's place
    cache = rewind(cache, [100, 97])            # forget what each row holds after its first 100 and 97 tokens

Each function returns a new cache and leaves the old one unchanged. Rows never attend to each other, so a row's place in
the batch doesn't matter.
"""

import operator
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from dbrx_fn.errors import CacheError
from dbrx_fn.model.cache import Cache, check_memory


def take_rows(cache: Cache, rows: Sequence[int]) -> Cache:
    """A new cache of the given rows, in this order. A row may be taken several times, or not at all.

    Args:
        cache: arrays `[batch kv_heads capacity head_dim]`.
        rows: at least one, each from 0 to `cache.batch_size - 1`.

    Returns:
        A cache with arrays `[len(rows) kv_heads capacity head_dim]`. Its rows are copies: each takes memory of its own.

    Raises:
        CacheError: if `rows` is empty or names a row that isn't there, or the new cache won't fit in memory.
    """
    chosen = _checked_rows(cache, rows)
    check_memory(cache.config, len(chosen), cache.capacity)
    index = mx.array(chosen, mx.int32)

    def take(arrays: tuple[mx.array, ...]) -> tuple[mx.array, ...]:
        return tuple(mx.take(array, index, axis=0) for array in arrays)

    lengths = tuple(cache.lengths[row] for row in chosen)
    return replace(cache, lengths=lengths, keys=take(cache.keys), values=take(cache.values))


def put_rows(cache: Cache, rows: Sequence[int], other: Cache) -> Cache:
    """`cache` with some rows replaced: row i of `other` becomes row `rows[i]`.

    Args:
        cache: arrays `[batch kv_heads capacity head_dim]`.
        rows: one for each row of `other`, all different, each from 0 to `cache.batch_size - 1`.
        other: a cache of the same config. Its capacity may differ, if its tokens fit into `cache`.

    Returns:
        A cache of `cache`'s batch size and capacity.

    Raises:
        CacheError: if the configs differ, if `rows` isn't one distinct row for each of `other`'s, or if a row holds
            more tokens than `cache` has room for (`grow_cache` makes room).
    """
    places = _checked_rows(cache, rows)
    if len(places) != other.batch_size or len(set(places)) != len(places):
        raise CacheError(
            f"rows is {list(places)} where {other.batch_size} different rows are expected, one for each row of the"
            " other cache."
        )
    if other.config != cache.config:
        raise CacheError("The two caches were made for different configs: make both with init_cache of the same one.")
    longest = max(other.lengths)
    if longest > cache.capacity:
        raise CacheError(
            f"A row of {longest} tokens doesn't fit a cache of {cache.capacity} positions: make room with"
            f" grow_cache(cache, {longest}) first."
        )
    index = mx.array(places, mx.int32)
    shared = min(cache.capacity, other.capacity)

    def put(held: tuple[mx.array, ...], new: tuple[mx.array, ...]) -> tuple[mx.array, ...]:
        return tuple(_with_rows(a, index, b[:, :, :shared]) for a, b in zip(held, new, strict=True))

    lengths = list(cache.lengths)
    for place, length in zip(places, other.lengths, strict=True):
        lengths[place] = length
    return replace(
        cache, lengths=tuple(lengths), keys=put(cache.keys, other.keys), values=put(cache.values, other.values)
    )


def rewind(cache: Cache, lengths: Sequence[int]) -> Cache:
    """`cache` cut back to the first `lengths` tokens of each row.

    Nothing is copied, and nothing waits for the device. The dropped keys and values stay in the arrays until later
    tokens overwrite them. Attention gives them weight 0, so only a NaN among them spreads.

    Args:
        cache: the cache to shorten.
        lengths: one for each row, from 0 to the row's current length.

    Raises:
        CacheError: if `lengths` has another number of entries, or one is out of that range.
    """
    kept = _whole_numbers(lengths)
    if len(kept) != cache.batch_size or any(
        not 0 <= new <= held for new, held in zip(kept, cache.lengths, strict=True)
    ):
        raise CacheError(
            f"lengths is {lengths} where a whole number for each row is expected, at most its current length:"
            f" {list(cache.lengths)}."
        )
    return replace(cache, lengths=kept)


def resize(cache: Cache, capacity: int) -> Cache:
    """`cache` with exactly `capacity` positions in each row, more or fewer than before.

    Raises:
        CacheError: if a row holds more tokens than that, or the new cache won't fit in memory.
    """
    if capacity < max(cache.lengths):
        raise CacheError(f"A row holds {max(cache.lengths)} tokens and can't be cut to {capacity} positions.")
    if capacity == cache.capacity:
        return cache
    check_memory(cache.config, cache.batch_size, capacity)
    more = [(0, 0), (0, 0), (0, max(0, capacity - cache.capacity)), (0, 0)]

    def resized(arrays: tuple[mx.array, ...]) -> tuple[mx.array, ...]:
        # A slice alone would keep the longer array in memory.
        return tuple(mx.contiguous(mx.pad(array, more)[:, :, :capacity]) for array in arrays)

    return replace(cache, keys=resized(cache.keys), values=resized(cache.values))


def _with_rows(held: mx.array, index: mx.array, new: mx.array) -> mx.array:
    """`held` with its rows in `index` replaced by `new` `[rows kv_heads time head_dim]` and zeros behind it.

    Nothing of the old row is left: attention gives its positions weight 0, but 0 times NaN is NaN.
    """
    changed = mx.array(held)
    changed[index] = mx.pad(new, [(0, 0), (0, 0), (0, held.shape[2] - new.shape[2]), (0, 0)])
    return changed


def _checked_rows(cache: Cache, rows: Sequence[int]) -> tuple[int, ...]:
    chosen = _whole_numbers(rows)
    if not chosen or any(not 0 <= row < cache.batch_size for row in chosen):
        raise CacheError(
            f"rows is {rows} where at least one whole number from 0 to {cache.batch_size - 1} is expected: the cache"
            f" has {cache.batch_size} rows."
        )
    return chosen


def _whole_numbers(numbers: Sequence[int]) -> tuple[int, ...]:
    """The numbers as Python ints, or an empty tuple if one isn't whole."""
    try:
        return tuple(map(operator.index, numbers))
    except TypeError:
        return ()
