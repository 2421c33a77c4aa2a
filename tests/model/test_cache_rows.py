"""Rows of a cache: chosen, repeated, reordered, replaced, shortened, and still what each row alone would be.

Products of matrices may round a row differently in a batch of another size (OpenBLAS on some CPUs). So the rows are
made and continued one at a time here, where the same numbers must come out bit for bit.
"""

import functools
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dbrx_fn.errors import CacheError
from dbrx_fn.model.cache import Cache, grow_cache, init_cache
from dbrx_fn.model.cache_rows import put_rows, rewind, take_rows
from dbrx_fn.model.config import DBRX, AttnConfig, Config, Dtype, FFNConfig
from dbrx_fn.model.params import init_params
from dbrx_fn.model.transformer import forward
from dbrx_fn.model.tree import Params
from tests.support.trees import as_float64, relative_error

CONFIG = Config(
    d_model=24,
    n_heads=4,
    n_layers=2,
    vocab_size=30,
    attn=AttnConfig(kv_n_heads=2),
    ffn=FFNConfig(ffn_hidden_size=8, moe_num_experts=3, moe_top_k=2),
    initializer_range=0.2,
    dtype="float32",
)
LONGEST = 8
CAPACITY = 2 * LONGEST + 4
TOKENS = st.lists(st.integers(0, CONFIG.vocab_size - 1), max_size=LONGEST)


@functools.cache
def params(dtype: Dtype = "float32") -> Params:
    return init_params(replace(CONFIG, dtype=dtype), mx.random.key(0))


def told(tokens: tuple[int, ...] | list[int], dtype: Dtype = "float32", capacity: int = CAPACITY) -> Cache:
    """A cache of one row that was told these tokens, one at a time."""
    cache = init_cache(replace(CONFIG, dtype=dtype), 1, capacity)
    for token in tokens:
        _, cache = forward(params(dtype), mx.array([[token]]), cache)
    return cache


def next_logits(cache: Cache) -> NDArray[np.float64]:
    """Of a further token for a cache of one row."""
    return as_float64(forward(params(cache.config.dtype), mx.array([[7]]), cache)[0])


def assert_row_is(cache: Cache, row: int, alone: Cache) -> None:
    """A row, taken out of a cache, is bit for bit a cache of one row, and goes on as that does."""
    taken = take_rows(cache, [row])
    assert taken.lengths == alone.lengths
    held = alone.lengths[0]
    for actual, expected in zip(taken.keys + taken.values, alone.keys + alone.values, strict=True):
        assert mx.array_equal(actual[:, :, :held], expected[:, :, :held])
        assert actual.dtype == expected.dtype
    as_wide = put_rows(init_cache(cache.config, 1, cache.capacity), [0], alone)
    np.testing.assert_array_equal(next_logits(taken), next_logits(as_wide))


def batch_of(*rows: list[int], dtype: Dtype = "float32") -> Cache:
    cache = init_cache(replace(CONFIG, dtype=dtype), len(rows), CAPACITY)
    for place, tokens in enumerate(rows):
        cache = put_rows(cache, [place], told(tokens, dtype))
    return cache


@settings(max_examples=40)
@given(data=st.data(), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_any_words_in_any_order_leave_each_row_what_it_would_be_alone(data: st.DataObject, dtype: Dtype) -> None:
    rows = data.draw(st.lists(TOKENS, min_size=1, max_size=3), "rows")
    cache = batch_of(*rows, dtype=dtype)
    for _ in range(data.draw(st.integers(1, 4), "words")):
        word = data.draw(st.sampled_from([take_rows, put_rows, rewind]), "word")
        places = st.integers(0, len(rows) - 1)
        if word is take_rows:
            chosen = data.draw(st.lists(places, min_size=1, max_size=4), "chosen")
            cache, rows = take_rows(cache, chosen), [rows[row] for row in chosen]
        elif word is put_rows:
            into = data.draw(st.lists(places, min_size=1, unique=True), "into")
            new = [data.draw(TOKENS, "new") for _ in into]
            cache = put_rows(cache, into, batch_of(*new, dtype=dtype))
            for place, tokens in zip(into, new, strict=True):
                rows[place] = tokens
        else:
            lengths = [data.draw(st.integers(0, len(tokens)), "length") for tokens in rows]
            cache, rows = rewind(cache, lengths), [tokens[:n] for tokens, n in zip(rows, lengths, strict=True)]
    for place, tokens in enumerate(rows):
        assert_row_is(cache, place, told(tokens, dtype))


@settings(max_examples=25)
@given(held=TOKENS, new=TOKENS, data=st.data())
def test_a_rewound_row_takes_other_tokens_as_if_it_had_never_known_any(
    held: list[int], new: list[int], data: st.DataObject
) -> None:
    kept = data.draw(st.integers(0, len(held)), "kept")
    cache = rewind(told(held), [kept])
    for token in new:
        _, cache = forward(params(), mx.array([[token]]), cache)
    assert_row_is(cache, 0, told(held[:kept] + new))


@settings(max_examples=25)
@given(rows=st.lists(TOKENS, min_size=1, max_size=3), data=st.data())
def test_a_batch_of_taken_rows_goes_on_as_each_row_alone(rows: list[list[int]], data: st.DataObject) -> None:
    """All rows at once, and several tokens at once: the same up to rounding."""
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4), "chosen")
    time = data.draw(st.integers(1, CAPACITY - LONGEST), "time")
    tokens = mx.random.randint(0, CONFIG.vocab_size, (len(chosen), time), key=mx.random.key(1))
    logits, after = forward(params(), tokens, take_rows(batch_of(*rows), chosen))
    assert after.lengths == tuple(len(rows[row]) + time for row in chosen)
    for place, row in enumerate(chosen):
        expected, _ = forward(params(), tokens[place : place + 1], told(rows[row]))
        assert relative_error(logits[place], expected[0]) < 1e-5


def test_the_old_cache_stays_as_it_was() -> None:
    cache, other = batch_of([1, 2, 3], [4]), batch_of([5, 6])
    before = [np.array(array) for array in cache.keys + cache.values]
    made = [take_rows(cache, [1, 1, 0]), put_rows(cache, [0], other), rewind(cache, [1, 0])]
    for each in made:
        mx.eval(forward(params(), mx.array([[1]] * each.batch_size), each)[0])
    assert (cache.lengths, other.lengths) == ((3, 1), (2,))
    for array, old in zip(cache.keys + cache.values, before, strict=True):
        np.testing.assert_array_equal(np.array(array), old)


@pytest.mark.parametrize("capacity", [3, CAPACITY, 40])
def test_rows_may_come_from_a_cache_of_another_capacity(capacity: int) -> None:
    other = told([4, 5, 6], capacity=capacity)
    cache = put_rows(batch_of([1, 2], [3]), [1], other)
    assert (cache.capacity, cache.lengths) == (CAPACITY, (2, 3))
    assert_row_is(cache, 0, told([1, 2]))
    assert_row_is(cache, 1, other)


def test_a_cache_of_capacity_0_has_rows_as_well() -> None:
    cache = init_cache(CONFIG, 2, 0)
    assert take_rows(cache, [1, 1, 0]).keys[0].shape == (3, 2, 0, 6)
    assert put_rows(cache, [1], init_cache(CONFIG, 1, 0)).lengths == (0, 0)
    assert rewind(cache, [0, 0]).lengths == (0, 0)


@pytest.mark.parametrize("rows", [[], [2], [-1], [0, 2], [0.5], ["0"], [None], 1])
def test_rows_that_are_not_there(rows: list[int]) -> None:
    cache = init_cache(CONFIG, 2, 4)
    for call in (take_rows, lambda cache, rows: put_rows(cache, rows, init_cache(CONFIG, 1, 4))):
        with pytest.raises(CacheError, match="where at least one whole number from 0 to 1 is expected"):
            call(cache, rows)


def test_more_rows_than_fit_in_memory_are_refused() -> None:
    with pytest.raises(CacheError, match=r"A cache of 1000 times 1048576 tokens needs 160000\.0 GiB"):
        take_rows(replace(init_cache(DBRX, 1, 8), keys=_claimed(2**20)), [0] * 1000)


def _claimed(capacity: int) -> tuple[mx.array, ...]:
    """Keys of a capacity, which take no memory until they are used."""
    return (mx.zeros((1, DBRX.attn.kv_n_heads, capacity, DBRX.head_dim), mx.bfloat16),) * DBRX.n_layers


@pytest.mark.parametrize(("rows", "other"), [([0], 2), ([0, 1], 1), ([1, 1], 2)])
def test_each_row_that_is_put_needs_a_place_of_its_own(rows: list[int], other: int) -> None:
    with pytest.raises(CacheError, match=f"where {other} different rows are expected"):
        put_rows(init_cache(CONFIG, 2, 4), rows, init_cache(CONFIG, other, 4))


def test_rows_of_another_model_are_refused() -> None:
    with pytest.raises(CacheError, match="made for different configs"):
        put_rows(init_cache(CONFIG, 2, 4), [0], init_cache(replace(CONFIG, n_layers=3), 1, 4))


def test_a_row_too_long_for_the_cache_is_refused() -> None:
    with pytest.raises(CacheError, match=r"A row of 5 tokens doesn't fit a cache of 4 .* grow_cache\(cache, 5\)"):
        put_rows(init_cache(CONFIG, 2, 4), [0], told([1, 2, 3, 4, 5]))
    grown = put_rows(grow_cache(init_cache(CONFIG, 2, 4), 5), [0], told([1, 2, 3, 4, 5]))
    assert grown.lengths == (5, 0)


@pytest.mark.parametrize("lengths", [[], [1], [3, 2], [2, -1], [1, 1, 1], [0.5, 1], None])
def test_lengths_that_no_cache_can_be_rewound_to(lengths: list[int]) -> None:
    with pytest.raises(CacheError, match=r"each row is expected, at most its current length: \[2, 1\]"):
        rewind(batch_of([1, 2], [3]), lengths)


def test_a_row_that_held_nan_leaves_none_to_the_next() -> None:
    params = init_params(CONFIG, mx.random.key(0))
    damaged, fresh = init_cache(CONFIG, 2, CAPACITY), init_cache(CONFIG, 2, CAPACITY)
    # An id outside of the vocabulary makes its row NaN.
    _, damaged = forward(params, mx.array([[1] * LONGEST + [5_000_000] * 3, [2] * (LONGEST + 3)], mx.int32), damaged)
    _, other = forward(params, mx.array([[3, 4]], mx.int32), init_cache(CONFIG, 1, LONGEST))
    after_nan, after_nothing = (
        np.array(forward(params, mx.array([[5], [6]], mx.int32), put_rows(cache, [0], other))[0][0])
        for cache in (damaged, fresh)
    )
    np.testing.assert_array_equal(after_nan, after_nothing)
