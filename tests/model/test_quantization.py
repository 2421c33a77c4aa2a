"""Quantized trees: what they compute is what their dequantized twins compute, and what is wrong with one is said."""

import re
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from dbrx_fn.errors import CheckpointError, InputError
from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.config import Config
from dbrx_fn.model.layers.embedding import embedding
from dbrx_fn.model.params import check_params, check_part, nest, param_count, param_spec
from dbrx_fn.model.quantization import Quantization, dequantize, quantize, tree_formats
from dbrx_fn.model.transformer import forward
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.dispatch import segment_rows
from dbrx_fn.ops.formats import Format
from dbrx_fn.ops.linear import expert_linear, linear
from tests.support.checkpoints import QUANTIZABLE
from tests.support.trees import as_float64, case_of, relative_error

CASE = case_of(QUANTIZABLE, np.random.default_rng(0))
CONFIG, PARAMS = CASE.config, CASE.params
TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8]])

AFFINE = [Format(bits, group_size) for bits in (2, 3, 4, 5, 6, 8) for group_size in (32, 64, 128)]
FORMATS = [*AFFINE, Format(4, 32, "mxfp4"), Format(8, 32, "mxfp8"), Format(4, 16, "nvfp4")]
every_format = pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f.mode}-{f.bits}-{f.group_size}")
BAR = 5e-6


def everything(form: Format) -> Quantization:
    return Quantization(form, form, form, form, form)


def leaves(params: Params) -> dict[str, mx.array]:
    return dict(tree_flatten(params))


def packed(weight: mx.array, form: Format) -> Any:
    parts = mx.quantize(weight, group_size=form.group_size, bits=form.bits, mode=form.mode)
    return dict(zip(("weight", "scales", "biases"), parts, strict=False))


def unpacked(parts: Any, form: Format, dtype: mx.Dtype = mx.float32) -> mx.array:
    weight, scales, biases = (parts.get(name) for name in ("weight", "scales", "biases"))
    assert weight is not None
    assert scales is not None
    return mx.dequantize(
        weight, scales, biases, group_size=form.group_size, bits=form.bits, mode=form.mode, dtype=dtype
    )


def first_of(stacked: Any) -> Any:
    """The first expert's matrix."""
    return {name: leaf[0] for name, leaf in stacked.items()}


def normal(seed: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


# Layers


@every_format
def test_linear_maps_are_those_of_the_dequantized_weights(form: Format) -> None:
    parts = packed(normal(0, 3, 24, 256), form)
    one = first_of(parts)
    weights = as_float64(unpacked(parts, form))
    x = normal(1, 5, 2, 256)
    assert relative_error(linear(one, x), as_float64(x) @ weights[0].T) <= BAR
    segment_experts = mx.array([0, 0, 1, 2, 2])
    expected = as_float64(x) @ weights[[0, 0, 1, 2, 2]].swapaxes(1, 2)
    assert relative_error(expert_linear(parts, x, segment_experts), expected) <= BAR


@every_format
def test_gradients_of_activations_are_those_of_the_dequantized_weights(form: Format) -> None:
    parts = packed(normal(0, 3, 24, 256), form)
    dense: Any = {"weight": unpacked(parts, form)}
    first, dense_first = map(first_of, (parts, dense))
    segment_experts = mx.array([0, 0, 1, 2, 2])
    for rows in (1, 2):
        x = normal(1, 5, rows, 256)
        found = mx.grad(lambda x: (linear(first, x) ** 2).sum())(x)
        assert relative_error(found, mx.grad(lambda x: (linear(dense_first, x) ** 2).sum())(x)) <= 1e-5
        found = mx.grad(lambda x: (expert_linear(parts, x, segment_experts) ** 2).sum())(x)
        expected = mx.grad(lambda x: (expert_linear(dense, x, segment_experts) ** 2).sum())(x)
        assert relative_error(found, expected) <= 1e-5


@every_format
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_embedding_gathers_rows_of_the_dequantized_weight(form: Format, dtype: Any) -> None:
    parts = packed(normal(0, 40, 128).astype(getattr(mx, dtype)), form)
    config = replace(CONFIG, dtype=dtype)
    rows = embedding(parts, TOKENS.astype(mx.int32), config=config.layer)
    assert rows.dtype == getattr(mx, dtype)
    assert mx.array_equal(rows, unpacked(parts, form, rows.dtype)[TOKENS])


@pytest.mark.parametrize(("dtype", "bar"), [("bfloat16", 5e-3), ("float16", 6e-4)])
def test_products_of_short_floats_are_rounded_once(dtype: str, bar: float) -> None:
    """Half a unit in the last place of the largest; the CPU's own kernels would be 10 times as far off."""
    form = Format(4, 64)
    weight, x = (normal(seed, 2, 64, 1024).astype(getattr(mx, dtype)) for seed in (0, 1))
    parts = packed(weight, form)
    exact = unpacked(
        {name: leaf if name == "weight" else leaf.astype(mx.float32) for name, leaf in parts.items()}, form
    )
    out = expert_linear(parts, x, mx.array([0, 1]))
    assert out.dtype == getattr(mx, dtype)
    assert relative_error(out, as_float64(x) @ as_float64(exact).swapaxes(1, 2)) <= bar
    first = first_of(parts)
    assert relative_error(linear(first, x[0]), as_float64(x[0]) @ as_float64(exact[0]).T) <= bar


# The model


@every_format
def test_forward_is_that_of_the_dequantized_tree(form: Format, measured: Any) -> None:
    quantized = quantize(PARAMS, CONFIG, everything(form))
    check_params(quantized, CONFIG)
    assert len(tree_formats(quantized, CONFIG)) == 2 + 6 * CONFIG.n_layers
    dense = dequantize(quantized, CONFIG)
    check_params(dense, CONFIG)
    assert not tree_formats(dense, CONFIG)

    def logits(params: Params) -> list[mx.array]:
        whole, _ = forward(params, TOKENS, init_cache(CONFIG, 2, 0))
        ragged, cache = forward(params, TOKENS, init_cache(CONFIG, 2, 24), lengths=[10, 4])
        step, cache = forward(params, TOKENS[:, :1], cache)
        then, _ = forward(params, TOKENS[:, 1:2], cache)
        return [whole, ragged[0], ragged[1, :4], step, then]

    for found, expected in zip(logits(quantized), logits(dense), strict=True):
        assert measured("quantized to dequantized, float32", relative_error(found, as_float64(expected))) <= BAR


@pytest.mark.parametrize("form", [Format(4, 64), Format(3, 32), Format(8, 32, "mxfp8")])
def test_gradients_of_the_model_are_those_of_the_dequantized_tree(form: Format, measured: Any) -> None:
    """Of the norms, whose gradients pass through every quantized matrix but the embedding."""
    quantized = quantize(PARAMS, CONFIG, everything(form))
    norms = {path: leaf for path, leaf in leaves(PARAMS).items() if leaf.ndim == 1}
    assert len(norms) == 5

    def gradients(params: Params) -> dict[str, mx.array]:
        rest = leaves(params)

        def loss(norms: dict[str, mx.array]) -> mx.array:
            logits, _ = forward(nest(rest | norms, CONFIG), TOKENS, init_cache(CONFIG, 2, 0))
            return (mx.logsumexp(logits, axis=-1) - logits[..., 0]).mean()

        found: dict[str, mx.array] = mx.grad(loss)(norms)
        return found

    found, expected = gradients(quantized), gradients(dequantize(quantized, CONFIG))
    for path in norms:
        error = relative_error(found[path], as_float64(expected[path]))
        assert measured("gradients, quantized to dequantized, float32", error) <= 1e-5, path


@pytest.mark.parametrize("form", [Format(3, 128), Format(4, 128), Format(8, 128)], ids=str)
def test_many_rows_of_large_groups(form: Format) -> None:
    """More rows than MLX's CUDA kernel has shared memory for in float32."""
    parts = packed(normal(0, 2, 24, 256), form)
    weights = as_float64(unpacked(parts, form))
    x = normal(1, 3, 40, 256)
    one = first_of(parts)
    assert relative_error(linear(one, x), as_float64(x) @ weights[0].T) <= BAR
    expected = as_float64(x) @ weights[[0, 1, 1]].swapaxes(1, 2)
    assert relative_error(expert_linear(parts, x, mx.array([0, 1, 1])), expected) <= BAR


@pytest.mark.parametrize("form", [Format(4, 128), Format(8, 64), Format(3, 128)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_rows_of_one_group(form: Format, rows: int) -> None:
    """MLX has a CUDA kernel of its own for those, which is wrong in float32."""
    parts = packed(normal(0, 1, 128, form.group_size), form)
    x = normal(1, 2, rows, form.group_size)
    expected = as_float64(x) @ as_float64(unpacked(parts, form))[0].T
    assert relative_error(linear(first_of(parts), x), expected) <= BAR


def test_long_segments() -> None:
    """As many tokens as make segments of several rows."""
    tokens = mx.random.randint(0, 40, (1, 160), key=mx.random.key(0))
    config = replace(CONFIG, max_seq_len=256)
    assert segment_rows(2 * 160, 4, mx.uint32) > 1
    quantized = quantize(PARAMS, config)
    found, _ = forward(quantized, tokens, init_cache(config, 1, 0))
    expected, _ = forward(dequantize(quantized, config), tokens, init_cache(config, 1, 0))
    assert relative_error(found, as_float64(expected)) <= BAR


def test_mixed_formats_in_one_tree() -> None:
    mixed = Quantization(Format(3, 32), Format(8, 128), None, Format(6, 64), Format(8, 32))
    quantized = quantize(PARAMS, CONFIG, mixed)
    formats = tree_formats(quantized, CONFIG)
    assert "transformer.wte.weight" not in formats
    assert formats["lm_head.weight"] == Format(6, 64)
    assert formats["transformer.blocks.1.ffn.experts.mlp.w2.weight"] == Format(3, 32)
    assert formats["transformer.blocks.0.norm_attn_norm.attn.out_proj.weight"] == Format(8, 128)
    assert formats["transformer.blocks.0.ffn.router.layer.weight"] == Format(8, 32)
    found, _ = forward(quantized, TOKENS, init_cache(CONFIG, 2, 16))
    expected, _ = forward(dequantize(quantized, CONFIG), TOKENS, init_cache(CONFIG, 2, 16))
    assert relative_error(found, as_float64(expected)) <= BAR


# quantize and dequantize


def test_the_router_stays_as_it_is_and_so_does_the_tree_that_was_given() -> None:
    before = leaves(PARAMS)
    quantized = leaves(quantize(PARAMS, CONFIG))
    assert leaves(PARAMS).keys() == before.keys() == param_spec(CONFIG).keys()
    for path, leaf in before.items():
        untouched = leaf.ndim == 1 or ".router." in path
        assert (quantized[path].dtype == mx.float32) == untouched
        assert (path.replace(".weight", ".scales") in quantized) != untouched
        if untouched:
            assert mx.array_equal(quantized[path], leaf)
    assert param_count(CONFIG) == sum(leaf.size for leaf in before.values())


@pytest.mark.parametrize("form", AFFINE, ids=lambda f: f"{f.bits}-{f.group_size}")
def test_no_weight_moves_by_more_than_a_step(form: Format) -> None:
    quantized = quantize(PARAMS, CONFIG, everything(form))
    back = leaves(dequantize(quantized, CONFIG))
    scales = leaves(quantized)
    for path, leaf in leaves(PARAMS).items():
        moved = np.abs(as_float64(back[path]) - as_float64(leaf))
        if leaf.ndim == 1:
            assert not moved.any()
            continue
        steps = np.abs(as_float64(scales[path.replace(".weight", ".scales")]))
        assert (moved <= 1.01 * np.repeat(steps, form.group_size, axis=-1)).all()
        assert moved.any()


def test_leaves_come_in_one_order() -> None:
    quantized = quantize(PARAMS, CONFIG)
    arrays = leaves(quantized)
    shuffled = nest({path: arrays[path] for path in reversed(arrays)}, CONFIG)
    assert list(leaves(shuffled)) == list(arrays)
    assert list(quantized["lm_head"]) == ["weight", "scales", "biases"]
    assert list(quantized) == list(PARAMS)
    assert list(quantized["transformer"]["blocks"][0]) == list(PARAMS["transformer"]["blocks"][0])


def test_group_size_that_does_not_divide_an_input_width() -> None:
    raw = QUANTIZABLE | {"ffn_config": QUANTIZABLE["ffn_config"] | {"ffn_hidden_size": 96}}
    case = case_of(raw, np.random.default_rng(0))
    sentence = (
        r"group_size is 64 where a divisor of 96, the input width of transformer\.blocks\.0\.ffn\.experts\.mlp\.w2"
    )
    with pytest.raises(InputError, match=sentence):
        quantize(case.params, case.config)
    quantize(case.params, case.config, Quantization(experts=Format(4, 32)))
    quantize(case.params, case.config, Quantization(experts=None))


def test_quantizing_twice() -> None:
    quantized = quantize(PARAMS, CONFIG, Quantization(experts=None))
    with pytest.raises(InputError, match=r"attn\.Wqkv\.weight is quantized already|wte\.weight is quantized already"):
        quantize(quantized, CONFIG)
    only_experts = Quantization(Format(4, 64), None, None, None, None)
    assert len(tree_formats(quantize(quantized, CONFIG, only_experts), CONFIG)) == 2 + 5 * CONFIG.n_layers


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((7, 64), "bits and group_size are 7 and 64 where one of 2, 3, 4, 5, 6, 8 and one of 32, 64, 128"),
        ((4, 16), "bits and group_size are 4 and 16"),
        ((4, 64, "mxfp4"), "bits and group_size are 4 and 64 where mxfp4 has 4 and 32."),
        ((4, 64, "int4"), "mode is 'int4' where it must be 'affine', 'mxfp4', 'mxfp8' or 'nvfp4'"),
    ],
)
def test_formats_that_do_not_exist(arguments: Any, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        Format(*arguments)


# What doesn't fit


def damaged(change: Any) -> str:
    """What is said of a quantized tree after a change to its leaves by path."""
    arrays = leaves(quantize(PARAMS, CONFIG, everything(Format(4, 64))))
    change(arrays)
    with pytest.raises(CheckpointError) as caught:
        check_params(nest(arrays, CONFIG), CONFIG)
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


W2 = "transformer.blocks.1.ffn.experts.mlp.w2"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"lm_head.scales": None}, "lm_head.scales is missing, which a quantized linear has"),
        ({"lm_head.biases": None}, "lm_head.biases is missing"),
        ({"lm_head.weight": None}, "lm_head.weight is missing"),
        ({f"{W2}.biases": (4, 128, 8)}, f"{W2}.biases is [4, 128, 8] where [4, 128, 4] (expert d_model group)"),
        ({f"{W2}.weight": (3, 128, 32)}, f"{W2}.weight is [3, 128, 32] where [4, 128, 32] (expert d_model packed)"),
        ({f"{W2}.weight": (4, 128, 33)}, f"{W2}.weight has 33 columns, which for an input width of 256 is none of 2,"),
        ({f"{W2}.weight": (4, 128, 8)}, f"{W2}.weight has 8 columns"),
        ({f"{W2}.scales": (4, 128, 3)}, f"{W2}.scales has 3 columns, which for an input width of 256 is none of the"),
        ({f"{W2}.scales": (4, 128, 0)}, f"{W2}.scales has 0 columns"),
        ({"lm_head.scales": ()}, "lm_head.scales is [] where a matrix is expected"),
    ],
)
def test_damaged_leaves_are_named(changes: dict[str, tuple[int, ...] | None], problem: str) -> None:
    def change(arrays: dict[str, mx.array]) -> None:
        for path, shape in changes.items():
            old = arrays.pop(path)
            if shape is not None:
                arrays[path] = mx.zeros(shape, old.dtype)

    text = damaged(change)
    assert problem in text
    assert text.count(";") == 0


@pytest.mark.parametrize(
    ("path", "dtype", "problem"),
    [
        ("lm_head.weight", mx.float32, "lm_head.weight is float32 where uint32 is expected"),
        ("lm_head.weight", mx.int32, "lm_head.weight is int32 where uint32 is expected"),
        ("lm_head.scales", mx.float16, "lm_head.scales is float16 where float32 is expected"),
        ("lm_head.biases", mx.bfloat16, "lm_head.biases is bfloat16 where float32 is expected"),
        ("lm_head.scales", mx.uint8, "lm_head.weight has 16 columns and its uint8 scales 2, which for an input width"),
    ],
)
def test_wrong_dtypes_are_named(path: str, dtype: mx.Dtype, problem: str) -> None:
    def change(arrays: dict[str, mx.array]) -> None:
        arrays[path] = arrays[path].astype(dtype)

    assert problem in damaged(change)


def test_norms_can_not_be_quantized() -> None:
    def change(arrays: dict[str, mx.array]) -> None:
        arrays["transformer.norm_f.scales"] = mx.zeros((2,))

    assert "transformer.norm_f.scales is unexpected" in damaged(change)


def test_what_is_missing_from_an_empty_tree() -> None:
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        check_params(cast(Params, {}), CONFIG)


def test_forward_refuses_a_damaged_leaf() -> None:
    quantized = quantize(PARAMS, CONFIG)
    quantized["lm_head"]["scales"] = quantized["lm_head"]["scales"][:, :1]
    with pytest.raises(CheckpointError, match=r"lm_head\.biases is \[40, 2\] where \[40, 1\]"):
        forward(quantized, TOKENS, init_cache(CONFIG, 2, 0))


def test_linear_alone_refuses_what_it_can_not_read() -> None:
    parts = packed(normal(0, 24, 128), Format(4, 64))
    with pytest.raises(CheckpointError, match=r"A quantized linear's weight has 16 columns"):
        linear(parts, normal(1, 2, 100))


def test_a_config_of_another_width_is_refused() -> None:
    """4 bits in groups of 64 read as 8 bits in groups of 32, if the width were half as large."""
    parts = packed(normal(0, 40, 128), Format(4, 64))
    other: Config = replace(CONFIG, d_model=64, n_heads=2)
    check_part(parts, config=CONFIG.layer, under="lm_head")
    check_part(parts, config=other.layer, under="lm_head")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is \[40, 16\] where \[41, 16\]"):
        check_part(parts, config=replace(CONFIG, vocab_size=41).layer, under="lm_head")
