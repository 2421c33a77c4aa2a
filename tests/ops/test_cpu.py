"""What the CPU computes in a way of its own is what MLX computes, and what float64 does."""

import mlx.core as mx
import numpy as np
import pytest

from dbrx_fn.ops import cpu

pytestmark = pytest.mark.skipif(mx.default_device().type != mx.cpu, reason="nothing else runs it")


def test_sigmoid_and_its_derivative_are_those_of_float64() -> None:
    x = np.concatenate([np.linspace(-120, 120, 4001), [-3e38, 3e38, 0]]).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = 1 / (1 + np.exp(-x.astype(np.float64)))
    y = np.array(cpu.sigmoid(mx.array(x)))
    large = expected > 1e-37
    # The exponent's own rounding makes 2^-24 * |x| of it.
    assert np.max(np.abs(y - expected)[large] / expected[large] / (1 + np.abs(x[large]))) < 1e-7
    assert np.max(np.abs(y - expected)[~large]) < 1e-37
    slope = np.array(mx.grad(lambda a: cpu.sigmoid(a).sum())(mx.array(x)))
    assert np.max(np.abs(slope - expected * (1 - expected))) < 2e-7


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_sigmoid_keeps_the_dtype(dtype: mx.Dtype) -> None:
    x = mx.random.normal((1000,), key=mx.random.key(0)).astype(dtype)
    y = cpu.sigmoid(x)
    assert y.dtype == dtype
    assert mx.array_equal(y, mx.sigmoid(x.astype(mx.float32)).astype(dtype))


@pytest.mark.parametrize("seen", ["causal", "cached", "wraps"])
@pytest.mark.parametrize("time", [1, 2, 31, 32, 33, 100])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_and_its_gradients_are_those_of_mlx(seen: str, time: int, kv_heads: int) -> None:
    """Two rows at different positions: one with the cache nearly empty, one where there is no more room behind."""
    capacity = time if seen == "causal" else time + 30
    held = {"causal": [0, 0], "cached": [0, 30], "wraps": [5, 37]}[seen]
    positions = mx.array(held)[:, None] + mx.arange(time)
    visible = mx.arange(capacity) <= positions[:, None, :, None]
    mask = mx.where(visible, 0.0, mx.finfo(mx.float32).min)
    keys = mx.random.split(mx.random.key(7), 4)
    q = mx.random.normal((2, 6, time, 8), key=keys[0])
    k, v = (mx.random.normal((2, kv_heads, capacity, 8), key=key) for key in keys[1:3])
    weight = mx.random.normal((2, 6, time, 8), key=keys[3])

    def ours(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        given = None if seen == "causal" else mask
        return (weight * cpu.attention(q, k, v, 0.3, given, wraps=seen == "wraps")).sum()

    def mlx(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return (weight * mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)).sum()

    for made, expected in zip(
        *(mx.grad(function, argnums=[0, 1, 2])(q, k, v) for function in (ours, mlx)), strict=True
    ):
        assert mx.abs(made - expected).max() < 2e-6 * mx.maximum(1, mx.abs(expected).max())
    made, expected = ours(q, k, v), mlx(q, k, v)
    assert mx.abs(made - expected) < 1e-4


def test_attention_of_half_floats_adds_up_in_float32() -> None:
    q, k, v = (mx.random.normal((1, 2, 70, 8), key=key) for key in mx.random.split(mx.random.key(0), 3))
    q, k, v = (array.astype(mx.bfloat16) for array in (q, k, v))
    made = cpu.attention(q, k, v, 0.3, None, wraps=False)
    q, k, v = (array.astype(mx.float32) for array in (q, k, v))
    exact = cpu.attention(q, k, v, 0.3, None, wraps=False)
    assert made.dtype == mx.bfloat16
    assert mx.array_equal(made, exact.astype(mx.bfloat16))


@pytest.mark.parametrize("width", [24, 512, 6144])
def test_layer_norm_is_float64s(width: int) -> None:
    x = np.random.default_rng(width).standard_normal((7, width)).astype(np.float32) * 3 + 1
    weight = np.random.default_rng(0).standard_normal(width).astype(np.float32)
    centered = x.astype(np.float64) - x.astype(np.float64).mean(axis=1, keepdims=True)
    expected = centered / np.sqrt((centered**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    found = cpu.layer_norm(mx.array(weight), mx.array(x), 1e-5)
    assert np.abs(np.array(found) - expected).max() < 5e-6
    rounded = cpu.layer_norm(mx.array(weight), mx.array(x).astype(mx.bfloat16), 1e-5)
    assert rounded.dtype == mx.bfloat16
    assert np.abs(np.array(rounded.astype(mx.float32)) - expected).max() < 3e-2 * np.abs(expected).max()


def test_layer_norms_gradients_are_mlxs_own() -> None:
    x, weight = mx.random.normal((2, 5, 24), key=mx.random.key(0)), mx.random.normal((24,), key=mx.random.key(1))
    over = mx.random.normal((2, 5, 24), key=mx.random.key(2))
    ours = mx.grad(lambda w, x: (cpu.layer_norm(w, x, 1e-5) * over).sum(), argnums=[0, 1])(weight, x)
    stock = mx.grad(lambda w, x: (mx.fast.layer_norm(x, w, None, 1e-5) * over).sum(), argnums=[0, 1])(weight, x)
    for found, expected in zip(ours, stock, strict=True):
        np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-5)
