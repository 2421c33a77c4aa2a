"""The small kernels against NumPy in float64, and no worse than what MLX's own operations make of the same operands."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.config import NORM_EPS, AttnConfig, Config, FFNConfig
from dbrx_fn.model.params import init_params
from dbrx_fn.model.quantization import Quantization, quantize
from dbrx_fn.model.transformer import forward
from dbrx_fn.ops.formats import Format
from dbrx_fn.ops.kernels import combine, norm_router
from dbrx_fn.ops.kernels import layer_norm as layer_norm_kernel
from dbrx_fn.ops.kernels.cuda_module import on_gpu
from dbrx_fn.ops.kernels.read_memory import read_memory, wave
from tests.support.kernel_operands import normal
from tests.support.trees import as_float64, relative_error

pytestmark = pytest.mark.skipif(not on_gpu(), reason="needs a GPU that takes the kernels")

Array = NDArray[np.float64]


def integers(seed: int, below: int, *shape: int) -> mx.array:
    return mx.random.randint(0, below, shape, mx.int32, mx.random.key(seed))


def assert_no_worse(ours: mx.array, twin: mx.array, expected: Array) -> None:
    assert ours.shape == expected.shape
    assert relative_error(ours, expected) <= 1.1 * relative_error(twin, expected) + 1e-4


@pytest.mark.parametrize(("rows", "width"), [(1, 6144), (7, 256), (130, 2048), (2, 8192)])
def test_layer_norm(rows: int, width: int) -> None:
    x, weight = normal(0, rows, width) + 3, normal(1, width)
    assert layer_norm_kernel.fits(weight, x)
    stock = mx.fast.layer_norm(x, weight, None, NORM_EPS)
    expected = as_float64(x) - as_float64(x).mean(axis=1, keepdims=True)
    expected = expected / np.sqrt((expected**2).mean(axis=1, keepdims=True) + NORM_EPS) * as_float64(weight)
    assert_no_worse(layer_norm_kernel.layer_norm(weight, x, eps=NORM_EPS), stock, expected)


@pytest.mark.parametrize("order", [None, 1.0, 2.0])
@pytest.mark.parametrize(
    ("tokens", "d_model", "experts", "top_k"),
    [(1, 6144, 16, 4), (3, 6144, 16, 4), (135, 6144, 16, 4), (5, 256, 16, 4), (133, 512, 32, 8), (7, 768, 5, 5)],
)
def test_norm_router(tokens: int, d_model: int, experts: int, top_k: int, order: float | None) -> None:
    x = normal(0, tokens, d_model, scale=2) + 1
    weight = normal(1, d_model, scale=0.2) + 1
    router = normal(2, experts, d_model, scale=2 * d_model**-0.5)
    normed, expert_weights, logits, top_experts = norm_router.norm_router(
        x, weight, router, eps=NORM_EPS, top_k=top_k, order=order
    )

    x64, weight64, router64 = (as_float64(array) for array in (x, weight, router))
    centered = x64 - x64.mean(axis=1, keepdims=True)
    expected = centered / np.sqrt((centered**2).mean(axis=1, keepdims=True) + NORM_EPS) * weight64
    twin = mx.fast.layer_norm(x, weight, None, NORM_EPS)
    assert_no_worse(normed, twin, expected)
    assert_no_worse(logits, twin @ router.T, expected @ router64.T)
    assert relative_error(logits, as_float64(normed) @ router64.T) < 2e-6

    # Other logits can choose others, so that the rest is by its own.
    own = as_float64(logits)
    odds = np.exp(own - own.max(axis=1, keepdims=True))
    chosen = np.sort(np.argsort(-own, axis=1, kind="stable")[:, :top_k], axis=1)
    np.testing.assert_array_equal(np.array(top_experts), chosen)
    shares = np.take_along_axis(odds / odds.sum(axis=1, keepdims=True), chosen, axis=1)
    if order is not None:
        shares = shares / np.linalg.norm(shares, ord=order, axis=1, keepdims=True)
    np.testing.assert_allclose(as_float64(expert_weights[:tokens]), shares, rtol=2**-8)


@pytest.mark.parametrize("tokens", [1, 3, 135])
def test_a_row_without_numbers_chooses_experts_that_there_are_and_changes_no_other(tokens: int) -> None:
    x, weight, router = normal(0, tokens, 512), normal(1, 512), normal(2, 16, 512)
    broken = mx.where((mx.arange(tokens) % 3 == 0)[:, None], mx.array(mx.nan, mx.bfloat16), x)
    found = norm_router.norm_router(broken, weight, router, eps=NORM_EPS, top_k=4, order=1.0)
    expected = norm_router.norm_router(x, weight, router, eps=NORM_EPS, top_k=4, order=1.0)
    for row in range(tokens):
        if row % 3:
            assert all(mx.array_equal(one[row], other[row]) for one, other in zip(found, expected, strict=True))
            continue
        normed, expert_weights, logits, top_experts = (one[row] for one in found)
        assert all(mx.isnan(one).all() for one in (normed, expert_weights, logits))
        assert np.array(top_experts).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("form", [None, Format(4, 64), Format(4, 32, "mxfp4")], ids=str)
@pytest.mark.parametrize("time", [1, 9, 200])
def test_an_id_outside_of_the_vocabulary_is_a_matter_of_its_row(time: int, form: Format | None) -> None:
    config = Config(
        d_model=256,
        n_heads=4,
        n_layers=2,
        vocab_size=40,
        attn=AttnConfig(clip_qkv=8.0, kv_n_heads=2),
        ffn=FFNConfig(ffn_hidden_size=256, moe_num_experts=16, moe_top_k=4),
        dtype="bfloat16",
    )
    params = init_params(config, mx.random.key(0))
    if form is not None:
        params = quantize(params, config, Quantization(form, form, form, form))
    known = integers(1, 40, 3, time)
    outside = mx.where((mx.arange(3) == 1)[:, None], mx.array(5_000_000, mx.int32), known)
    (found, cache), (expected, known_cache) = (
        forward(params, tokens, init_cache(config, 3, 512)) for tokens in (outside, known)
    )
    after, _ = forward(params, known[:, :1], cache)
    known_after, _ = forward(params, known[:, :1], known_cache)
    for logits, sound in ((found, expected), (after, known_after)):
        assert mx.isnan(logits[1]).all()
        assert mx.array_equal(logits[::2], sound[::2])


def test_equal_logits_choose_the_first() -> None:
    x, row = normal(0, 2, 512), normal(1, 1, 512)
    _, expert_weights, _, top_experts = norm_router.norm_router(
        x, mx.ones(512, mx.bfloat16), mx.broadcast_to(row, (16, 512)), eps=NORM_EPS, top_k=4, order=1.0
    )
    assert top_experts.tolist() == [[0, 1, 2, 3]] * 2
    assert expert_weights[:2].tolist() == [[0.25] * 4] * 2


@pytest.mark.parametrize(
    ("tokens", "d_model", "top_k", "slots"), [(1, 6144, 4, 4), (3, 6144, 4, 100), (129, 264, 1, 200), (64, 512, 3, 200)]
)
def test_combine(tokens: int, d_model: int, top_k: int, slots: int) -> None:
    down, residual = normal(0, slots, d_model), normal(1, tokens, d_model)
    pair_slots = integers(2, slots, tokens, top_k)
    expert_weights = mx.random.uniform(shape=(tokens, top_k), key=mx.random.key(3)).astype(mx.bfloat16)
    ours = combine.combine(down, pair_slots, expert_weights, residual)

    twin = residual + (down[pair_slots] * expert_weights[..., None]).sum(axis=1)
    rows: Any = as_float64(down)[np.array(pair_slots)]
    expected = as_float64(residual) + (rows * as_float64(expert_weights)[..., None]).sum(axis=1)
    assert_no_worse(ours, twin, expected)


@pytest.mark.parametrize(("waves", "times"), [(1, 1), (3, 5), (2, 2)])
def test_all_memory_is_read(waves: int, times: int) -> None:
    words = integers(0, 2**31 - 1, waves * wave() // 4).view(mx.uint32)
    read = np.bitwise_xor.reduce(np.array(read_memory(words, times)))
    assert read == (np.bitwise_xor.reduce(np.array(words)) if times % 2 else 0)
