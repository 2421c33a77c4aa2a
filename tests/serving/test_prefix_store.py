"""Prefixes in memory: what is found is what was put, as much as fits, and the longest unused goes first."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_fn.errors import CacheError, InputError
from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.cache_rows import put_rows
from dbrx_fn.model.config import Dtype
from dbrx_fn.model.params import init_params
from dbrx_fn.model.transformer import forward
from dbrx_fn.serving.prefix_chunks import Prefix, restored
from dbrx_fn.serving.prefix_store import PrefixStore
from tests.support.prefixes import CHUNK, CHUNK_BYTES, CONFIG, TEXTS, Naive, assert_holds, cache_of


def opened(**given: Any) -> PrefixStore:
    return PrefixStore(CONFIG, "weights", chunk=CHUNK, **given)


@settings(max_examples=150, deadline=None)
@given(steps=st.lists(st.tuples(st.booleans(), TEXTS), max_size=12), most=st.integers(0, 12))
def test_it_finds_what_a_naive_store_finds_and_never_holds_more_than_it_may(
    steps: list[tuple[bool, list[int]]], most: int
) -> None:
    store, naive = opened(memory=most * CHUNK_BYTES + 7), Naive(most)
    for is_put, tokens in steps:
        if is_put:
            store.put(tokens, cache_of(tokens))
            naive.put(tokens)
        else:
            prefix = store.longest(tokens)
            assert prefix.length == naive.longest(tokens)
            assert_holds(prefix, tokens)
        assert store.statistics().memory_bytes == len(naive.used) * CHUNK_BYTES <= most * CHUNK_BYTES


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_restored_cache_has_the_bits_that_were_put(dtype: Dtype) -> None:
    config = replace(CONFIG, dtype=dtype)
    store = PrefixStore(config, "weights", chunk=CHUNK)
    tokens = [*range(11)]
    put = cache_of(tokens, dtype=dtype, config=config)
    store.put(tokens, put)
    prefix = store.longest(tokens)
    assert prefix.length == 8
    cache = restored(prefix, config, 16)
    assert (cache.lengths, cache.capacity, cache.config) == ((8,), 16, config)
    for actual, expected in zip(cache.keys + cache.values, put.keys + put.values, strict=True):
        assert actual.dtype == expected.dtype
        assert mx.array_equal(actual[:, :, :8], expected[:, :, :8])
        assert not actual[:, :, 8:].any()
    full = restored(prefix, config, 8)
    assert mx.array_equal(full.keys[1], put.keys[1][:, :, :8])


def test_nothing_found_is_an_empty_cache() -> None:
    cache = restored(opened().longest([1, 2, 3]), CONFIG, 16)
    assert (cache.lengths, cache.capacity) == ((0,), 16)


def test_the_last_token_is_never_found() -> None:
    """Its logits are still to be computed."""
    store, tokens = opened(), [*range(8)]
    store.put(tokens, cache_of(tokens))
    assert store.longest(tokens).length == 4
    assert store.longest([*tokens, 9]).length == 8
    assert store.longest([]).length == 0


def test_only_what_the_cache_holds_is_kept() -> None:
    store, tokens = opened(), [*range(12)]
    store.put(tokens, cache_of(tokens[:9]))
    assert store.longest([*tokens, 1]).length == 8


def test_a_row_of_a_batch_is_put_alone() -> None:
    store, tokens = opened(), [*range(9)]
    batch = put_rows(init_cache(CONFIG, 3, 20), [1, 2], put_rows(init_cache(CONFIG, 2, 20), [1], cache_of(tokens)))
    store.put(tokens, batch, row=2)
    prefix = store.longest(tokens)
    assert prefix.length == 8
    assert_holds(prefix, tokens)
    with pytest.raises(CacheError, match="row is 3 where a cache of 3 rows has 0 to 2"):
        store.put(tokens, batch, row=3)


def test_equal_chunks_behind_other_beginnings_are_others() -> None:
    store, one, other = opened(), [1, 1, 1, 1, 2, 2, 2, 2, 0], [3, 3, 3, 3, 2, 2, 2, 2, 0]
    store.put(one, cache_of(one))
    assert store.longest(other).length == 0
    store.put(other, cache_of(other))
    for tokens in (one, other):
        assert_holds(store.longest(tokens), tokens)
    assert store.statistics().memory_bytes == 4 * CHUNK_BYTES


def test_known_chunks_are_not_copied_again() -> None:
    store, tokens = opened(), [*range(9)]
    store.put(tokens, cache_of(tokens))
    before = store.longest(tokens).chunks
    store.put(tokens, cache_of(tokens))
    assert [*map(id, store.longest(tokens).chunks)] == [*map(id, before)]


def test_a_prefix_that_was_found_outlives_its_eviction() -> None:
    store, tokens, other = opened(memory=2 * CHUNK_BYTES), [*range(9)], [*range(10, 19)]
    store.put(tokens, cache_of(tokens))
    prefix = store.longest(tokens)
    store.put(other, cache_of(other))
    assert store.longest(tokens).length == 0
    assert_holds(prefix, tokens)
    said = store.statistics()
    assert (said.hits, said.misses, said.tokens, said.memory_evictions) == (1, 1, 8, 2)


def test_chunks_do_not_keep_the_cache_that_they_were_cut_from() -> None:
    config = replace(CONFIG, d_model=512)
    store = PrefixStore(config, "weights", chunk=64)
    mx.synchronize()
    before = mx.get_active_memory()
    cache = init_cache(config, 1, 4096)
    cache = replace(cache, lengths=(64,))
    mx.eval(cache.keys, cache.values)
    store.put([0] * 64, cache)
    mx.synchronize()
    size, held = cache.nbytes, store.statistics().memory_bytes
    assert mx.get_active_memory() - before >= size
    del cache
    assert held <= mx.get_active_memory() - before < held + size / 16
    store.close()
    assert mx.get_active_memory() - before < held / 2


def test_forward_goes_on_from_a_restored_prefix_with_the_same_bits() -> None:
    """In chunks of the store's size, and then one token at a time."""
    params, store = init_params(CONFIG, mx.random.key(1)), PrefixStore(CONFIG, "weights", chunk=16)
    tokens: list[int] = mx.random.randint(0, CONFIG.vocab_size, (50,), key=mx.random.key(2)).tolist()  # type: ignore[assignment]

    def continued(prefix: Prefix) -> list[mx.array]:
        cache, found = restored(prefix, CONFIG, 64), list[mx.array]()
        for start in range(prefix.length, 48, 16):
            logits, cache = forward(params, mx.array([tokens[start : start + 16]]), cache, chunk_size=16)
            found.append(logits)
        store.put(tokens, cache)
        for token in tokens[48:]:
            logits, cache = forward(params, mx.array([[token]]), cache)
            found.append(logits)
        return found

    alone = continued(store.longest(tokens))
    again = continued(store.longest(tokens[:40]))
    assert store.statistics().hits == 1
    assert len(again) == len(alone) - 2
    for actual, expected in zip(again, alone[2:], strict=True):
        assert mx.array_equal(actual, expected)


def test_what_can_not_work_is_refused() -> None:
    with pytest.raises(InputError, match="chunk is 0 where at least 1 is expected"):
        PrefixStore(CONFIG, "weights", chunk=0)
    with pytest.raises(InputError, match="memory is -1 where at least 0 is expected"):
        PrefixStore(CONFIG, "weights", memory=-1)
    store, tokens = opened(), [*range(9)]
    with pytest.raises(CacheError, match="made for another config than the store"):
        store.put(tokens, cache_of(tokens, config=replace(CONFIG, vocab_size=31)))
    store.put(tokens, cache_of(tokens))
    with pytest.raises(CacheError, match="A prefix of 8 tokens doesn't fit a cache of 7 positions"):
        restored(store.longest(tokens), CONFIG, 7)
