"""The cache's bounds, growth and sizes. What `forward` computes through it is in test_forward.py."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from dbrx_fn.errors import CacheError
from dbrx_fn.model.cache import Cache, grow_cache, init_cache, write
from dbrx_fn.model.config import DBRX, AttnConfig, Config, Dtype, FFNConfig
from dbrx_fn.model.params import init_params
from dbrx_fn.model.shapes import capacity_bucket
from dbrx_fn.model.transformer import forward
from dbrx_fn.model.tree import Params
from dbrx_fn.runtime.device import as_if
from tests.support.trees import as_float64

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


def params() -> Params:
    return init_params(CONFIG, mx.random.key(0))


def tokens(*rows: list[int]) -> mx.array:
    return mx.array(rows, mx.int32)


def same(first: Cache, second: Cache) -> bool:
    pairs = zip(first.keys + first.values, second.keys + second.values, strict=True)
    return first.lengths == second.lengths and all(np.array_equal(np.array(a), np.array(b)) for a, b in pairs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_empty_cache(dtype: Dtype) -> None:
    cache = init_cache(replace(CONFIG, dtype=dtype), 3, 17)
    assert cache.lengths == (0, 0, 0)
    assert (cache.batch_size, cache.capacity) == (3, 17)
    assert len(cache.keys) == len(cache.values) == 2
    for array in cache.keys + cache.values:
        assert array.shape == (3, 2, 17, 6)
        assert array.dtype == getattr(mx, dtype)
        assert not as_float64(array).any()
    assert cache.nbytes == 2 * 2 * 3 * 2 * 17 * 6 * (4 if dtype == "float32" else 2)


@pytest.mark.parametrize(("batch_size", "capacity"), [(0, 8), (-1, 8), (1, -1)])
def test_sizes_that_no_cache_has(batch_size: int, capacity: int) -> None:
    with pytest.raises(CacheError) as error:
        init_cache(CONFIG, batch_size, capacity)
    assert f"batch_size {batch_size} and capacity {capacity}" in str(error.value)


def test_a_cache_larger_than_memory_is_refused() -> None:
    """160 KiB a token in bfloat16."""
    with pytest.raises(CacheError, match=r"A cache of 1000 times 1048576 tokens needs 160000\.0 GiB"):
        init_cache(DBRX, 1000, 2**20)
    with pytest.raises(CacheError, match=r"A cache of 1 times 1073741824 tokens needs 163840\.0 GiB"):
        grow_cache(init_cache(DBRX, 1, 8), 2**30)


def test_a_cache_of_capacity_0_remembers_nothing() -> None:
    empty = init_cache(CONFIG, 1, 0)
    first, cache = forward(params(), tokens([1, 2, 3]), empty)
    second, cache = forward(params(), tokens([1, 2, 3]), cache)
    assert (cache.lengths, cache.capacity, cache.nbytes) == ((0,), 0, 0)
    np.testing.assert_array_equal(np.array(first), np.array(second))


def test_a_full_row_is_refused_and_nothing_is_written() -> None:
    _, cache = forward(params(), tokens([1, 2, 3, 4, 5], [6, 7, 8, 0, 0]), init_cache(CONFIG, 2, 8), lengths=[5, 3])
    before = [np.array(array) for array in cache.keys + cache.values]
    with pytest.raises(CacheError) as error:
        forward(params(), tokens([1, 2, 3, 4, 5], [6, 7, 8, 9, 0]), cache, lengths=[5, 2])
    message = str(error.value)
    assert "Row 0 of the cache holds 5 of 8 positions and 5 more don't fit" in message
    assert "grow_cache(cache, 10)" in message
    with pytest.raises(CacheError, match="Row 1 of the cache holds 3 of 8 positions and 6 more don't fit"):
        forward(params(), tokens([0] * 6, [1] * 6), cache, lengths=[1, 6])
    assert cache.lengths == (5, 3)
    for array, old in zip(cache.keys + cache.values, before, strict=True):
        np.testing.assert_array_equal(np.array(array), old)

    _, full = forward(params(), tokens([1, 2, 3, 4, 5], [6, 7, 8, 9, 1]), cache, lengths=[3, 5])
    assert full.lengths == (8, 8)
    with pytest.raises(CacheError, match="holds 8 of 8 positions and 1 more don't fit"):
        forward(params(), tokens([1], [1]), full, lengths=[0, 1])


def test_a_prompt_longer_than_the_cache_is_refused() -> None:
    with pytest.raises(CacheError, match="holds 0 of 8 positions and 9 more don't fit"):
        forward(params(), tokens(list(range(9))), init_cache(CONFIG, 1, 8), chunk_size=4)


def test_another_batch_size_is_refused() -> None:
    with pytest.raises(CacheError, match=r"tokens has 2 rows and the cache 3: make one with init_cache\(config, 2"):
        forward(params(), tokens([1], [2]), init_cache(CONFIG, 3, 8))


@pytest.mark.parametrize(
    ("length", "capacity"),
    [
        (1, 256),
        (255, 256),
        (256, 256),
        (257, 512),
        (1000, 1024),
        (8192, 8192),
        (8193, 10_240),
        (16_384, 16_384),
        (16_640, 20_480),
        (32_768, 32_768),
    ],
)
def test_capacities_come_in_buckets(length: int, capacity: int) -> None:
    assert capacity_bucket(length) == capacity


def test_growing_keeps_what_is_held() -> None:
    _, cache = forward(params(), tokens([1, 2, 3, 4, 5], [6, 7, 8, 0, 0]), init_cache(CONFIG, 2, 9), lengths=[5, 3])
    grown = grow_cache(cache, 10)
    assert (grown.capacity, grown.lengths, cache.capacity) == (256, (5, 3), 9)
    assert grown.config == cache.config
    for small, large in zip(cache.keys + cache.values, grown.keys + grown.values, strict=True):
        np.testing.assert_array_equal(np.array(large[:, :, :9]), np.array(small))
        assert large.dtype == small.dtype
    for step in (tokens([3, 4], [5, 6]), tokens([7], [8])):
        expected, cache = forward(params(), step, cache)
        actual, grown = forward(params(), step, grown)
        np.testing.assert_allclose(np.array(actual), np.array(expected), rtol=0, atol=1e-6 * np.abs(expected).max())


def test_a_cache_with_room_does_not_grow() -> None:
    cache = init_cache(CONFIG, 1, 9)
    assert grow_cache(cache, 9) is cache
    assert grow_cache(cache, 1) is cache


def test_a_row_of_length_0_stays_as_it_is() -> None:
    """Also where its padding goes round the end: here row 0 is full and row 1 is not."""
    _, cache = forward(params(), tokens([1] * 8, [2] * 8), init_cache(CONFIG, 2, 8), lengths=[8, 3])
    _, after = forward(params(), tokens([5, 6], [7, 8]), cache, lengths=[0, 2])
    assert after.lengths == (8, 5)
    for old, new in zip(cache.keys + cache.values, after.keys + after.values, strict=True):
        np.testing.assert_array_equal(np.array(new[0]), np.array(old[0]))
        np.testing.assert_array_equal(np.array(new[1, :, :3]), np.array(old[1, :, :3]))
        assert not np.array_equal(np.array(new[1, :, 3:5]), np.array(old[1, :, 3:5]))


def test_the_same_calls_make_the_same_cache() -> None:
    caches = [forward(params(), tokens([1, 2, 3]), init_cache(CONFIG, 1, 8))[1] for _ in range(2)]
    assert same(*caches)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("head_dim", [2, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_are_written_where_they_belong_by_each_back_end(dtype: Dtype, head_dim: int, kept: bool) -> None:
    """CUDA writes several entries at once. Each bit must arrive, NaN and infinity too."""
    float_type = getattr(mx, dtype)
    held, new = (
        mx.random.normal((2, 3, length, head_dim), key=mx.random.key(length)).astype(float_type) for length in (16, 5)
    )
    new = mx.where(mx.arange(5)[:, None] == 2, mx.array([mx.nan, mx.inf] * (head_dim // 2), float_type), new)
    places = [[3, 4, 5, 6, 7], [11, 12, 13, 14, 0]]
    index = mx.array(places, mx.int32)
    mask = mx.arange(5) >= mx.array([[5], [4]]) if kept else None
    expected = np.array(as_float64(held))
    for row, of_row in enumerate(places):
        for n, place in enumerate(of_row):
            if mask is None or not mask[row, n].item():
                expected[row, :, place] = as_float64(new)[row, :, n]
    for backend in ("cuda", "metal"):
        with as_if(backend=backend):
            written = write(held, new, index, mask)
        assert written.dtype == float_type
        np.testing.assert_array_equal(as_float64(written), expected)
