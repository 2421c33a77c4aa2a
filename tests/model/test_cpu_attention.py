"""The CPU's kernel for attention over a cache, against a loop in float64 and against its stock twin."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.config import AttnConfig, Config, FFNConfig
from dbrx_fn.model.layers import attn
from dbrx_fn.model.positions import Positions, positions_of
from dbrx_fn.ops.kernels.cpu import attend as kernel
from dbrx_fn.ops.kernels.cpu.library import has_kernels, set_threads
from dbrx_fn.runtime.device import as_if

pytestmark = pytest.mark.skipif(not has_kernels(), reason="this machine has no kernels for its CPU")

CAPACITY = 300
Call = tuple[mx.array, tuple[mx.array, mx.array], Positions]


def config_of(kv_heads: int, group: int, head_dim: int) -> Config:
    return Config(
        d_model=kv_heads * group * head_dim,
        n_heads=kv_heads * group,
        n_layers=1,
        vocab_size=8,
        attn=AttnConfig(clip_qkv=1.5, kv_n_heads=kv_heads),
        ffn=FFNConfig(ffn_hidden_size=8, moe_num_experts=2, moe_top_k=1),
        dtype="float32",
    )


def call(config: Config, starts: tuple[int, ...], time: int) -> Call:
    """`time` new tokens behind `starts` old ones. Random numbers stand everywhere in the cache."""
    cache = replace(init_cache(config, len(starts), CAPACITY), lengths=starts)
    positions = positions_of(time, (time,) * len(starts), cache, config.layer)
    keys = mx.random.split(mx.random.key(time), 3)
    held = mx.random.normal(cache.keys[0].shape, key=keys[0]), mx.random.normal(cache.keys[0].shape, key=keys[1])
    width = (config.n_heads + 2 * config.attn.kv_n_heads) * config.head_dim
    return 2 * mx.random.normal((len(starts), time, width), key=keys[2]), held, positions


def test_values_of_another_dtype_than_the_keys_are_left_to_stock_operations() -> None:
    config = config_of(1, 2, 8)
    projected, (keys, values), positions = call(config, (20,), 3)
    assert not kernel.fits(projected, keys, values.astype(mx.float16))
    assert not kernel.fits(projected, keys, values[:, :, :8])
    mixed, held = attn.attend(projected, (keys, values.astype(mx.float16)), positions, config=config.layer)
    assert held is not None
    assert held[1].dtype == mx.float16
    expected, _ = attn.attend(projected, (keys, values), positions, config=config.layer)
    assert mx.allclose(mixed, expected, atol=1e-2)


def ours(args: Call, config: Config) -> list[mx.array]:
    assert kernel.fits(args[0], *args[1])
    mixed, cache = attn.attend(*args, config=config.layer)
    assert cache is not None
    return [mixed, *cache]


def stock(args: Call, config: Config) -> list[mx.array]:
    with as_if(kernels=False):
        mixed, cache = attn.attend(*args, config=config.layer)
        assert cache is not None
        return [mixed, *cache]


def exact(args: Call, config: Config, starts: tuple[int, ...]) -> np.ndarray:
    """What each token attends to, in float64, one query after the other."""
    projected, held, positions = args
    batch, time, _ = projected.shape
    kv_heads, width = config.attn.kv_n_heads, config.head_dim
    heads = np.clip(np.array(projected).astype(np.float64), -1.5, 1.5).reshape(batch, time, -1, 2, width // 2)
    cosines = np.array(positions["cosines"]).astype(np.float64)[:, 0, :, None]
    sines = np.array(positions["sines"]).astype(np.float64)[:, 0, :, None]
    turned = (heads * cosines + heads[..., ::-1, :] * sines).reshape(batch, time, -1, width)
    keys, values = (np.array(one).astype(np.float64) for one in held)
    out = np.zeros((batch, time, config.n_heads, width))
    for row, start in enumerate(starts):
        keys[row, :, start : start + time] = turned[row, :, config.n_heads : -kv_heads].swapaxes(0, 1)
        values[row, :, start : start + time] = heads.reshape(turned.shape)[row, :, -kv_heads:].swapaxes(0, 1)
        for t in range(time):
            for head in range(config.n_heads):
                own = head * kv_heads // config.n_heads
                scores = keys[row, own, : start + t + 1] @ turned[row, t, head] / width**0.5
                weights = np.exp(scores - scores.max())
                out[row, t, head] = weights / weights.sum() @ values[row, own, : start + t + 1]
    return out.reshape(batch, time, -1)


@settings(max_examples=40, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    half=st.integers(1, 40),
    starts=st.lists(st.integers(0, 120), min_size=1, max_size=3).map(tuple),
    time=st.integers(1, 150),
)
def test_it_is_attention_in_float64(kv_heads: int, group: int, half: int, starts: tuple[int, ...], time: int) -> None:
    config = config_of(kv_heads, group, 2 * half)
    args = call(config, starts, time)
    mixed, keys, values = ours(args, config)
    assert np.allclose(np.array(mixed), exact(args, config, starts), rtol=0, atol=3e-6)
    expected = stock(args, config)
    assert mx.allclose(keys, expected[1], rtol=1e-6, atol=1e-6)
    assert mx.array_equal(values, expected[2])


def test_its_error_is_no_larger_than_the_twin_s() -> None:
    config = config_of(2, 3, 64)
    args = call(config, (0, 100), 200)
    right = exact(args, config, (0, 100))
    errors = [np.linalg.norm(np.array(made[0]) - right) for made in (ours(args, config), stock(args, config))]
    assert errors[0] <= 1.1 * errors[1]


def test_a_token_s_bits_depend_on_those_before_it_only() -> None:
    config = config_of(2, 3, 64)
    whole, held, _ = call(config, (5, 90), 200)
    mixed, keys, values = ours((whole, held, call(config, (5, 90), 200)[2]), config)
    # The same tokens in two calls, and one of the rows alone.
    first, *between = ours((whole[:, :77], held, call(config, (5, 90), 77)[2]), config)
    rest, *after = ours((whole[:, 77:], (between[0], between[1]), call(config, (82, 167), 123)[2]), config)
    assert mx.array_equal(mx.concatenate([first, rest], axis=1), mixed)
    assert mx.array_equal(after[0], keys)
    assert mx.array_equal(after[1], values)
    alone = ours((whole[1:], (held[0][1:], held[1][1:]), call(config, (90,), 200)[2]), config)
    assert mx.array_equal(alone[0], mixed[1:])


def test_bits_are_the_same_for_any_number_of_threads() -> None:
    config = config_of(2, 3, 40)
    args = call(config, (3, 70), 130)
    made = []
    try:
        for threads in (1, 2, 3, 8):
            set_threads(threads)
            made.append([np.array(one).tobytes() for one in ours(args, config)])
    finally:
        set_threads(2)
    assert all(one == made[0] for one in made)


def test_a_cache_that_somebody_holds_keeps_its_contents() -> None:
    config = config_of(1, 2, 16)
    args = call(config, (9,), 4)
    before = [np.array(one) for one in args[1]]
    mx.eval(ours(args, config))
    assert all(np.array_equal(np.array(one), old) for one, old in zip(args[1], before, strict=True))


def test_gradients_are_the_twin_s() -> None:
    config = config_of(2, 2, 8)
    projected, held, positions = call(config, (4,), 6)

    def loss(projected: mx.array, keys: mx.array) -> mx.array:
        mixed, _ = attn.attend(projected, (keys, held[1]), positions, config=config.layer)
        return (mixed * mx.arange(mixed.shape[-1])).sum()

    found = mx.grad(loss, argnums=[0, 1])(projected, held[0])
    with as_if(kernels=False):
        expected = mx.grad(loss, argnums=[0, 1])(projected, held[0])
    assert all(mx.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, expected, strict=True))
