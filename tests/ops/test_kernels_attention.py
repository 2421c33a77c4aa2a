"""The kernels around attention against NumPy in float64, and no worse than MLX's own operations."""

from inspect import unwrap
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from dbrx_fn.model.config import NORM_EPS
from dbrx_fn.model.layers.rotary import inverse_frequencies, turn, turns
from dbrx_fn.ops.formats import Format, Linear
from dbrx_fn.ops.kernels import chunk_attention, decode_attention, linears, project_qkv, split_heads
from dbrx_fn.ops.kernels.cuda_module import on_hopper
from dbrx_fn.ops.linear import linear
from dbrx_fn.ops.norm import layer_norm
from tests.support.kernel_operands import dense, error, matrix, normal
from tests.support.trees import as_float64

pytestmark = pytest.mark.skipif(not on_hopper(), reason="the kernels are for Hopper GPUs")

Array = NDArray[np.float64]
THETA = 5e5


def offsets_of(batch: int) -> mx.array:
    """Positions of rows' first tokens. The first row's is near the context's end."""
    drawn = mx.random.randint(0, 32_000, (batch,), mx.int32, mx.random.key(3))
    return mx.where(mx.arange(batch) == 0, 32_767 - 700, drawn).astype(mx.int32)


@pytest.mark.parametrize("clip", [None, 8.0, 1.0])
@pytest.mark.parametrize("form", [None, Format(4, 64), Format(4, 128), Format(8, 32), Format(4, 32, "mxfp4")], ids=str)
@pytest.mark.parametrize(
    ("batch", "time", "n_heads", "kv_n_heads", "head_dim", "d_model"),
    [
        (1, 1, 48, 8, 128, 6144),
        (1, 1, 5, 5, 128, 640),
        (1, 1, 4, 1, 32, 2304),
        (3, 1, 12, 2, 128, 512),
        (9, 1, 6, 2, 64, 256),
        (32, 1, 6, 2, 64, 256),
        (1, 4, 48, 8, 128, 6144),
        (1, 17, 6, 2, 64, 256),
        (3, 5, 6, 2, 64, 256),
        (4, 8, 12, 2, 128, 256),
        (1, 700, 6, 2, 64, 256),
        (3, 70, 12, 2, 128, 256),
    ],
)
def test_queries_keys_and_values(
    batch: int,
    time: int,
    n_heads: int,
    kv_n_heads: int,
    head_dim: int,
    d_model: int,
    form: Format | None,
    clip: float | None,
    measured: Any,
) -> None:
    all_heads = n_heads + 2 * kv_n_heads
    x, weight = normal(0, batch, time, d_model, scale=2) + 3, normal(1, d_model, scale=0.2) + 1
    wqkv = matrix(form, 2, all_heads * head_dim, d_model, scale=3 * d_model**-0.5)
    offsets, frequencies = offsets_of(batch), inverse_frequencies(head_dim, THETA)
    static: Any = {"kv_n_heads": kv_n_heads, "head_dim": head_dim, "clip": clip}
    normed = mx.fast.layer_norm(x, weight, None, NORM_EPS)
    found = {}
    if batch * time <= linears.FEW_ROWS:
        of_few = project_qkv.project_qkv(weight, wqkv, x, offsets, frequencies, eps=NORM_EPS, **static)
        found["in one launch"] = of_few
    if head_dim % 16 == 0:
        projected = linear(wqkv, layer_norm(weight, x, eps=NORM_EPS))
        found["split"] = split_heads.split_heads(projected, offsets, frequencies, **static)

    positions = offsets[:, None] + mx.arange(time, dtype=mx.int32)
    expected, twin = in_float64(x, weight, wqkv, positions, **static), by_stock(wqkv, normed, positions, **static)
    for how, (q, k, v) in found.items():
        heads = mx.concatenate([q.swapaxes(1, 2), k, v], axis=1)
        assert heads.shape == expected.shape
        ratio = error(heads, expected) / error(twin, expected)
        assert measured(f"kernel's error over stock operations', queries, keys and values, {how}", ratio) <= 1.1


def by_stock(
    wqkv: Linear, normed: mx.array, positions: mx.array, *, kv_n_heads: int, head_dim: int, clip: float | None
) -> mx.array:
    """`[batch heads time head_dim]`: queries, keys and values by MLX's operations."""
    qkv = unwrap(linear)(wqkv, normed)
    if clip is not None:
        qkv = mx.clip(qkv, -clip, clip)
    heads = qkv.reshape(*normed.shape[:2], -1, head_dim).swapaxes(1, 2)
    turned = turn(heads, *turns(positions, head_dim=head_dim, theta=THETA))
    return mx.concatenate([turned[:, :-kv_n_heads], heads[:, -kv_n_heads:]], axis=1)


def in_float64(
    x: mx.array,
    weight: mx.array,
    wqkv: Linear,
    positions: mx.array,
    *,
    kv_n_heads: int,
    head_dim: int,
    clip: float | None,
) -> Array:
    centered = as_float64(x) - as_float64(x).mean(axis=-1, keepdims=True)
    normed = centered / np.sqrt((centered**2).mean(axis=-1, keepdims=True) + NORM_EPS) * as_float64(weight)
    heads = (normed @ dense(wqkv, x.shape[-1]).T).reshape(*x.shape[:2], -1, head_dim).swapaxes(1, 2)
    if clip is not None:
        heads = np.clip(heads, -clip, clip)
    first, second = np.split(heads, 2, axis=-1)
    # Angles are float32, rounded, as the model was trained with.
    frequencies = np.array(inverse_frequencies(head_dim, THETA))
    angles = (np.array(positions).astype(np.float32)[:, None, :, None] * frequencies).astype(np.float64)
    cosines, sines = np.cos(angles), np.sin(angles)
    turned = np.concatenate([first * cosines - second * sines, first * sines + second * cosines], axis=-1)
    return np.concatenate([turned[:, :-kv_n_heads], heads[:, -kv_n_heads:]], axis=1)


@pytest.mark.parametrize("time", [1, 2, 3, 8, 16, 40, 129, 300])
@pytest.mark.parametrize(
    ("held", "n_heads", "kv_n_heads", "head_dim", "capacity"),
    [
        ([0], 48, 8, 128, 512),
        ([1], 48, 8, 128, 512),
        ([600], 48, 8, 128, 1024),
        ([3700], 12, 2, 128, 4096),
        ([600, 0, 255], 12, 2, 128, 960),
        ([700, 32, 16], 8, 2, 64, 1024),
        ([300], 20, 1, 128, 601),
        ([128, 1, 15], 3, 3, 64, 4096),
    ],
)
def test_attention_to_a_cache(
    time: int, held: list[int], n_heads: int, kv_n_heads: int, head_dim: int, capacity: int, measured: Any
) -> None:
    batch, group = len(held), n_heads // kv_n_heads
    q = normal(0, batch, time, n_heads, head_dim, scale=2)
    keys, values = (normal(seed, batch, kv_n_heads, capacity, head_dim) for seed in (1, 2))
    offsets = mx.array(held, mx.int32)
    # What is behind a row's tokens must not be read.
    there = (mx.arange(capacity) < offsets[:, None] + time)[:, None, :, None]
    known_keys, known_values = (mx.where(there, array, mx.nan) for array in (keys, values))

    seen = mx.arange(capacity) <= (offsets[:, None] + mx.arange(time))[..., None]
    mask = mx.where(seen[:, None], mx.array(0, mx.bfloat16), mx.array(mx.finfo(mx.bfloat16).min, mx.bfloat16))
    by_head = q.swapaxes(1, 2)
    twin = mx.fast.scaled_dot_product_attention(by_head, keys, values, scale=head_dim**-0.5, mask=mask)
    twin = twin.swapaxes(1, 2).reshape(batch, time, -1)

    q64, keys64, values64 = (as_float64(array) for array in (q, keys, values))
    expected: Array = np.zeros((batch, time, n_heads, head_dim))
    for row, start in enumerate(held):
        hidden = np.arange(start + time) > start + np.arange(time)[:, None]
        for head in range(n_heads):
            kept = slice(start + time)
            scores = q64[row, :, head] @ keys64[row, head // group, kept].T * head_dim**-0.5
            scores[hidden] = -np.inf
            shares = np.exp(scores - scores.max(axis=1, keepdims=True))
            mixed = shares @ values64[row, head // group, kept]
            expected[row, :, head] = mixed / shares.sum(axis=1, keepdims=True)
    expected = expected.reshape(batch, time, -1)

    kernels = [chunk_attention.chunk_attention]
    if time <= 40:
        kernels.append(decode_attention.decode_attention)
    for kernel in kernels:
        found = kernel(q, known_keys, known_values, offsets)
        assert found.shape == expected.shape
        # Of a single position both are exact.
        ratio = error(found, expected) / max(error(twin, expected), 1e-9)
        assert measured(f"kernel's error over stock operations', {kernel.__name__}", ratio) <= 1.1
