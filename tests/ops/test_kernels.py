"""The kernels for Hopper GPUs compute what the stock operations do, as exactly; these tests need such a GPU."""

import logging
from dataclasses import replace
from functools import partial
from inspect import unwrap
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from numpy.typing import NDArray

from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.config import AttnConfig, Config, FFNConfig
from dbrx_fn.model.params import init_params
from dbrx_fn.model.quantization import Quantization, dequantize, quantize
from dbrx_fn.model.transformer import forward
from dbrx_fn.ops.experts import mix_experts
from dbrx_fn.ops.formats import Format
from dbrx_fn.ops.kernels import experts, layer_norm, linears, norm_router, segments
from dbrx_fn.ops.kernels.cuda_module import on_hopper
from dbrx_fn.ops.linear import expert_linear, linear
from dbrx_fn.runtime.device import as_if
from tests.support import oracle
from tests.support.kernel_operands import dense, error, matrix, normal
from tests.support.trees import as_float64

pytestmark = pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU")

AFFINE = [Format(bits, group_size) for bits in (4, 8) for group_size in (32, 64, 128)]
FORMATS = [None, *AFFINE, Format(4, 32, "mxfp4")]
every_format = pytest.mark.parametrize("form", FORMATS, ids=str)
# Of the same products in another order, an error can be a little larger by chance.
LIMIT = 1.1

D_MODEL = 256


@pytest.fixture(params=["", "of twice the height"])
def height(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices too are multiplied as large ones are, of 4 bits."""
    if request.param:
        monkeypatch.setattr(segments, "_TALL_FROM", 0)


@every_format
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 32, 33, 64, 128, 129, 256, 257, 700])
@pytest.mark.usefixtures("height")
def test_products_with_a_matrix(form: Format | None, rows: int, measured: Any) -> None:
    params, x = matrix(form, 0, 384, D_MODEL), normal(1, rows, D_MODEL)
    assert linears.fits(params, x)
    expected = as_float64(x) @ dense(params, D_MODEL).T
    ratio = error(linears.linear(params, x), expected) / error(unwrap(linear)(params, x), expected)
    assert measured("kernel's error over its twin's, one matrix", ratio) <= LIMIT
    residual = normal(2, rows, 384)
    assert error(linears.linear(params, x, residual), expected + as_float64(residual)) <= 6e-3


@pytest.mark.parametrize("rows", [9, 32, 40, 64])
@pytest.mark.parametrize("inner", [1024, 3072])
def test_medium_products_whose_inner_axis_is_divided(rows: int, inner: int, measured: Any) -> None:
    params, x = matrix(Format(4, 64), 0, 384, inner), normal(1, rows, inner)
    expected = as_float64(x) @ dense(params, inner).T
    ratio = error(linears.linear(params, x), expected) / error(unwrap(linear)(params, x), expected)
    assert measured("kernel's error over its twin's, one matrix", ratio) <= LIMIT


@pytest.mark.parametrize("inner", [256, 1024])
@pytest.mark.parametrize("rows", [9, 64, 100])
def test_a_row_of_a_medium_product_keeps_its_bits(rows: int, inner: int) -> None:
    params, x = matrix(Format(4, 64), 0, 384, inner), normal(1, rows, inner)
    others = mx.where(mx.arange(rows)[:, None] == 5, x, normal(2, rows, inner))
    assert mx.array_equal(linears.linear(params, x)[5], linears.linear(params, others)[5])


@pytest.mark.parametrize("tokens", [16, 40, 100, 300])
def test_a_token_of_mixed_experts_keeps_its_bits(tokens: int) -> None:
    """Wherever its neighbours go. Its rows then have other slots, and products have other widths."""
    shapes = {"w1": (6, 384, D_MODEL), "v1": (6, 384, D_MODEL), "w2": (6, D_MODEL, 384)}
    params: Any = {name: matrix(Format(4, 64), seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}
    kept = mx.arange(tokens)[:, None] == 11
    x, weights = normal(7, tokens, D_MODEL), normal(8, tokens, 2)
    found = []
    for most in (6, 3, 1):
        top_experts = mx.random.randint(0, most, (tokens, 2), key=mx.random.key(most)).astype(mx.uint32)
        top_experts = mx.where(kept, mx.array([0, 4], mx.uint32), top_experts)
        neighbours = mx.where(kept, x, normal(most, tokens, D_MODEL))
        found.append(experts.mix_experts(params, neighbours, weights, top_experts)[11])
    assert mx.array_equal(found[0], found[1])
    assert mx.array_equal(found[0], found[2])


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("tokens", [17, 24, 64, 130])
@pytest.mark.parametrize(("d_model", "ffn_hidden"), [(512, 1024), (1536, 512)])
def test_experts_whose_rows_are_read_in_long_stretches(
    d_model: int, ffn_hidden: int, tokens: int, group_size: int, measured: Any
) -> None:
    shapes = {"w1": (6, ffn_hidden, d_model), "v1": (6, ffn_hidden, d_model), "w2": (6, d_model, ffn_hidden)}
    form = Format(4, group_size)
    params: Any = {name: matrix(form, seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}
    x, weights = normal(7, tokens, d_model), normal(8, tokens, 2)
    top_experts = mx.random.randint(0, 6, (tokens, 2), key=mx.random.key(9)).astype(mx.uint32)
    w1, v1, w2 = (dense(params[name], shape[-1]) for name, shape in shapes.items())
    expected = oracle.moe(
        as_float64(x), as_float64(weights), np.array(top_experts), w1, v1, w2, oracle.ACTIVATIONS["silu"]
    )
    found = error(mix_experts(params, x, weights, top_experts, activation="silu", cached=True), expected)
    twin = error(unwrap(mix_experts)(params, x, weights, top_experts, activation="silu"), expected)
    assert measured("kernels' error over their twin's, experts", found / twin) <= LIMIT


@pytest.mark.parametrize("form", [Format(4, 64), Format(8, 64), Format(4, 32, "mxfp4")], ids=str)
@pytest.mark.parametrize("rows", [9, 32, 100, 300])
def test_a_norm_packs_its_rows_as_their_product_reads_them(form: Format, rows: int) -> None:
    params, weight, x = matrix(form, 0, 384, D_MODEL), normal(3, D_MODEL), normal(1, rows, D_MODEL)
    if linears.is_short(params, x):
        pytest.skip("short segments normalize in their own kernel")
    expected = linears.linear(params, layer_norm.layer_norm(weight, x, eps=1e-5))
    assert mx.array_equal(linears.normed_linear(weight, params, x, eps=1e-5), expected)


@every_format
@pytest.mark.parametrize("tokens", [1, 2, 5, 19, 100, 200, 900])
@pytest.mark.usefixtures("height")
def test_mixed_experts(form: Format | None, tokens: int, measured: Any) -> None:
    shapes = {"w1": (6, 384, D_MODEL), "v1": (6, 384, D_MODEL), "w2": (6, D_MODEL, 384)}
    params: Any = {name: matrix(form, seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}
    x = normal(7, tokens, D_MODEL)
    weights = mx.random.uniform(shape=(tokens, 2), key=mx.random.key(8)).astype(mx.bfloat16)
    # An expert that gets nothing, one that gets most, and tokens that name one twice.
    top_experts = mx.random.randint(1, 6, (tokens, 2), key=mx.random.key(9)).astype(mx.uint32)
    top_experts = mx.where(mx.arange(tokens)[:, None] % 3 == 0, 2, top_experts).astype(mx.uint32)
    assert experts.fits(params, x.dtype, activation="silu", top_k=2, tokens=x.shape[0])
    w1, v1, w2 = (dense(params[name], shape[-1]) for name, shape in shapes.items())
    expected = oracle.moe(
        as_float64(x), as_float64(weights), np.array(top_experts), w1, v1, w2, oracle.ACTIVATIONS["silu"]
    )
    found = error(mix_experts(params, x, weights, top_experts, activation="silu", cached=True), expected)
    twin = error(unwrap(mix_experts)(params, x, weights, top_experts, activation="silu"), expected)
    assert measured("kernels' error over their twin's, experts", found / twin) <= LIMIT


@pytest.mark.parametrize("form", FORMATS[1:], ids=str)
@pytest.mark.parametrize("rows", [64, 128])
def test_segments_with_their_experts(form: Format, rows: int, measured: Any) -> None:
    """An expert has none, some have fewer than a kernel's segment takes, and one has more."""
    params, of_segments = matrix(form, 0, 6, 384, D_MODEL), [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 3, 3, 4, 4, 4, 5]
    x, segment_experts = normal(1, len(of_segments), rows, D_MODEL), mx.array(of_segments, mx.int32)
    assert linears.fits_segments(params, x)
    exact = dense(params, D_MODEL)[of_segments]
    expected = as_float64(x) @ exact.swapaxes(1, 2)
    with as_if(kernels=False):
        twin = error(expert_linear(params, x, segment_experts), expected)
    found = error(expert_linear(params, x, segment_experts), expected)
    assert measured("kernel's error over its twin's, segments", found / twin) <= LIMIT
    cotangent = normal(2, *expected.shape)
    (gradient,) = mx.vjp(lambda x: [expert_linear(params, x, segment_experts)], [x], [cotangent])[1]
    assert error(gradient, as_float64(cotangent) @ exact) <= 1e-2


@every_format
@pytest.mark.parametrize("ffn_hidden", [384, 512])
def test_one_token_s_experts_and_the_stream(form: Format | None, ffn_hidden: int, measured: Any) -> None:
    shapes = {"w1": (6, ffn_hidden, D_MODEL), "v1": (6, ffn_hidden, D_MODEL), "w2": (6, D_MODEL, ffn_hidden)}
    params: Any = {name: matrix(form, seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}
    x, residual, weights = normal(7, 1, D_MODEL), normal(8, 1, D_MODEL), normal(9, 1, 3)
    top_experts = mx.array([[5, 0, 2]], mx.uint32)
    w1, v1, w2 = (dense(params[name], shape[-1]) for name, shape in shapes.items())
    said = oracle.moe(as_float64(x), as_float64(weights), np.array(top_experts), w1, v1, w2, oracle.ACTIVATIONS["silu"])
    expected = as_float64(residual) + said
    found = error(experts.mix_experts(params, x, weights, top_experts, residual), expected)
    twin = error(residual + unwrap(mix_experts)(params, x, weights, top_experts, activation="silu"), expected)
    assert measured("kernels' error over their twin's, experts", found / twin) <= LIMIT


@pytest.mark.parametrize("form", [None, Format(4, 64)], ids=str)
def test_gradients_are_the_twins(form: Format | None) -> None:
    shapes = {"w1": (6, 384, D_MODEL), "v1": (6, 384, D_MODEL), "w2": (6, D_MODEL, 384)}
    params: Any = {name: matrix(form, seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}
    x, weights = normal(7, 200, D_MODEL), normal(8, 200, 2)
    top_experts = mx.random.randint(0, 6, (200, 2), key=mx.random.key(9)).astype(mx.uint32)
    assert experts.fits(params, x.dtype, activation="silu", top_k=2, tokens=x.shape[0])

    def gradients(function: Any) -> list[mx.array]:
        def scalar(x: mx.array, weights: mx.array, w1: mx.array) -> mx.array:
            tree = {**params, "w1": {**params["w1"], "weight": w1}} if form is None else params
            mixed: mx.array = function(tree, x, weights, top_experts, activation="silu")
            return (mixed.astype(mx.float32) ** 2).sum()

        wanted = (0, 1, 2) if form is None else (0, 1)
        return list(mx.grad(scalar, argnums=wanted)(x, weights, params["w1"]["weight"]))

    by_kernels, by_stock = gradients(partial(mix_experts, cached=True)), gradients(unwrap(mix_experts))
    for found, expected in zip(by_kernels, by_stock, strict=True):
        assert error(found, as_float64(expected)) <= 1e-2
    one, rows = matrix(form or Format(4, 64), 3, 384, D_MODEL), normal(4, 50, D_MODEL)
    found = mx.grad(lambda x: linear(one, x).astype(mx.float32).sum())(rows)
    assert error(found, np.broadcast_to(dense(one, D_MODEL).sum(axis=0), rows.shape)) <= 1e-2


MODEL = Config(
    d_model=256,
    n_heads=4,
    n_layers=2,
    vocab_size=128,
    attn=AttnConfig(kv_n_heads=2, clip_qkv=2.0),
    ffn=FFNConfig(ffn_hidden_size=256, moe_num_experts=4, moe_top_k=4),
    dtype="bfloat16",
    initializer_range=0.1,
)


def test_nothing_is_traced_per_token(caplog: pytest.LogCaptureFixture) -> None:
    params = quantize(init_params(MODEL, mx.random.key(0)), MODEL)
    cache = init_cache(MODEL, 1, 256)
    with caplog.at_level(logging.DEBUG, logger="dbrx_fn.compile"):
        for length in (9, 1):
            _, cache = forward(params, mx.ones((1, length), mx.int32), cache)
        caplog.clear()
        for _ in range(20):
            _, cache = forward(params, mx.ones((1, 1), mx.int32), cache)
    assert not caplog.records


@pytest.mark.parametrize("time", [1, 4, 7, 40, 300])
def test_a_row_s_bits_don_t_depend_on_its_neighbours(time: int) -> None:
    params = quantize(init_params(MODEL, mx.random.key(0)), MODEL)
    tokens = mx.random.randint(0, 128, (3, 60 + time), key=mx.random.key(1))
    others = mx.where(mx.arange(3)[:, None] == 1, tokens, 127 - tokens)

    def logits(tokens: mx.array) -> mx.array:
        _, cache = forward(params, tokens[:, :60], init_cache(MODEL, 3, 512), lengths=[60, 41, 7])
        return forward(params, tokens[:, 60:], cache)[0][1]

    assert mx.array_equal(logits(tokens), logits(others))


@pytest.mark.parametrize("lengths", [[300], [300, 7, 1, 290], [20, 17]], ids=str)
@pytest.mark.parametrize("form", [None, Format(4, 64)], ids=str)
def test_last_tokens_alone_have_the_numbers_that_they_have_among_all(form: Format | None, lengths: list[int]) -> None:
    params = init_params(MODEL, mx.random.key(0))
    if form is not None:
        params = quantize(params, MODEL, Quantization(*[form] * 4))
    tokens = mx.random.randint(0, 128, (len(lengths), max(lengths)), key=mx.random.key(1))
    cache = init_cache(MODEL, len(lengths), 512)
    every, cache_of_all = forward(params, tokens, cache, lengths=lengths)
    last, cache_of_last = forward(params, tokens, cache, lengths=lengths, last_only=True)
    for row, length in enumerate(lengths):
        assert error(last[row, 0], as_float64(every[row, length - 1])) <= 3e-2
        for held in ("keys", "values"):
            pairs = zip(getattr(cache_of_all, held), getattr(cache_of_last, held), strict=True)
            assert all(mx.array_equal(one[row, :, :length], other[row, :, :length]) for one, other in pairs)


@pytest.mark.parametrize("together", [1, 2, 5])
@pytest.mark.parametrize("lengths", [[50], [50, 33, 41], [*range(34, 51)]], ids=len)
@pytest.mark.parametrize("form", [None, Format(4, 64), Format(8, 64), Format(4, 32, "mxfp4")], ids=str)
def test_the_model_is_as_exact_as_by_stock_operations(
    form: Format | None, lengths: list[int], together: int, monkeypatch: pytest.MonkeyPatch, measured: Any
) -> None:
    """A prompt, then tokens one at a time or several, for sequences of different lengths, and for one."""
    params = init_params(MODEL, mx.random.key(0))
    if form is not None:
        params = quantize(params, MODEL, Quantization(*[form] * 4))
    batch = len(lengths)
    tokens = mx.random.randint(0, 128, (batch, 60), key=mx.random.key(1))

    def logits(params: Any, config: Config) -> NDArray[np.float64]:
        some, cache = forward(params, tokens[:, :50], init_cache(config, batch, 256), lengths=lengths)
        pieces = [as_float64(some)[:, : min(lengths)]]
        for n in range(50, 60, together):
            some, cache = forward(params, tokens[:, n : n + together], cache)
            pieces.append(as_float64(some))
        return np.concatenate(pieces, axis=1)

    taken: list[bool] = []
    kernel = norm_router.norm_router

    def noted(*arrays: Any, **static: Any) -> Any:
        taken.append(True)
        return kernel(*arrays, **static)

    monkeypatch.setattr(norm_router, "norm_router", noted)
    # Configs of their own, so that each is traced here.
    found = logits(params, replace(MODEL, ffn=replace(MODEL.ffn, moe_loss_weight=2.0)))
    assert any(taken)
    with as_if(kernels=False):
        twin = logits(params, replace(MODEL, ffn=replace(MODEL.ffn, moe_loss_weight=1.0)))
    mx.set_default_device(mx.cpu)
    try:
        exact = dequantize(params, MODEL) if form is not None else params
        precise = tree_map(lambda leaf: leaf.astype(mx.float32), exact)
        expected = logits(precise, replace(MODEL, dtype="float32"))
    finally:
        mx.set_default_device(mx.gpu)
    errors = [np.linalg.norm(values - expected) for values in (found, twin)]
    assert measured("the model's error over that of stock operations", errors[0] / errors[1]) <= LIMIT
