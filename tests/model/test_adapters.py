"""Adapters add their product to a matrix of any format, and nothing while they are fresh."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from dbrx_fn.checkpoints.saver import save
from dbrx_fn.errors import CheckpointError, InputError
from dbrx_fn.model.adapters import Adapters, adapted, add_adapters, fuse_adapters, is_adapter
from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.params import KINDS, check_params, kind_of, nest, param_spec
from dbrx_fn.model.partition import joined, partition
from dbrx_fn.model.quantization import Quantization, dequantize, quantize, tree_formats
from dbrx_fn.model.transformer import forward, score
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.formats import Format
from dbrx_fn.runtime.device import as_if
from tests.support.adapters import with_random_adapters
from tests.support.checkpoints import QUANTIZABLE
from tests.support.trees import as_float64, case_of, relative_error

CASE = case_of(QUANTIZABLE, np.random.default_rng(0))
CONFIG, PARAMS = CASE.config, CASE.params
TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8]])
KEY = mx.random.key(0)

FORMATS = [None, *(Format(bits, 64) for bits in (2, 3, 4, 5, 6, 8))]
FORMATS += [Format(4, 32, "mxfp4"), Format(8, 32, "mxfp8"), Format(4, 16, "nvfp4")]
every_format = pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f.mode}-{f.bits}" if f else "dense")


def in_format(form: Format | None) -> Params:
    return PARAMS if form is None else quantize(PARAMS, CONFIG, Quantization(form, form, form, form, form))


def leaves(params: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(params))


def token_by_token(params: Params) -> mx.array:
    cache, made = init_cache(CONFIG, 2, 16), []
    for place in range(TOKENS.shape[1]):
        logits, cache = forward(params, TOKENS[:, place : place + 1], cache)
        made.append(logits)
    return mx.concatenate(made, axis=1)


@every_format
def test_fresh_adapters_leave_the_logits_bitwise_as_they_were(form: Format | None) -> None:
    plain = in_format(form)
    fresh = add_adapters(plain, CONFIG, Adapters(4, targets=KINDS), KEY)
    assert len(adapted(fresh)) == len([path for path in param_spec(CONFIG) if kind_of(path)])
    # Most kernels don't know adapters, so one tree would be computed by them and the other wouldn't.
    with as_if(kernels=False):
        for logits in (token_by_token, lambda params: score(params, TOKENS, CONFIG)[0]):
            np.testing.assert_array_equal(np.array(logits(fresh)), np.array(logits(plain)))


@every_format
@pytest.mark.parametrize("kind", [*KINDS, None])
def test_an_adapted_tree_computes_what_its_fused_equivalent_does(form: Format | None, kind: Any) -> None:
    params = with_random_adapters(in_format(form), CONFIG, KINDS if kind is None else (kind,))
    fused = fuse_adapters(dequantize(params, CONFIG), CONFIG)
    assert not adapted(fused)
    expected = as_float64(score(fused, TOKENS, CONFIG)[0])
    assert relative_error(expected, as_float64(score(in_format(form), TOKENS, CONFIG)[0])) > 1e-3
    for logits in (score(params, TOKENS, CONFIG)[0], token_by_token(params)):
        assert relative_error(logits, expected) <= 5e-6


def test_a_fused_matrix_is_that_of_the_formula() -> None:
    params = with_random_adapters(PARAMS, CONFIG, ("experts",), rank=3)
    one = params["transformer"]["blocks"][1]["ffn"]["experts"]["mlp"]["w2"]
    weight, a, b = (as_float64(one[name]) for name in ("weight", "lora_a", "lora_b"))
    expected = [weight[e] + float(one["lora_scale"]) * b[e] @ a[e] for e in range(len(weight))]
    fused = fuse_adapters(params, CONFIG)
    assert relative_error(fused["transformer"]["blocks"][1]["ffn"]["experts"]["mlp"]["w2"]["weight"], expected) <= 1e-6


def test_a_fused_quantized_tree_keeps_its_formats() -> None:
    form = Format(8, 32)
    params = with_random_adapters(in_format(form), CONFIG, ("attention", "router"))
    fused = fuse_adapters(params, CONFIG)
    assert tree_formats(fused, CONFIG) == tree_formats(params, CONFIG)
    expected = quantize(fuse_adapters(dequantize(params, CONFIG), CONFIG), CONFIG, Quantization(*[form] * 5))
    for path, leaf in leaves(fused).items():
        if "attn" in path or "router" in path:
            np.testing.assert_array_equal(np.array(leaf), np.array(leaves(expected)[path]))


def test_scales_are_alpha_over_the_rank_or_its_root() -> None:
    assert Adapters(16, 8.0).scale == 0.5
    assert Adapters(16, 8.0, rank_stabilized=True).scale == 2.0
    assert Adapters(16).scale == 2.0
    params = add_adapters(PARAMS, CONFIG, Adapters(4, 6.0), KEY)
    scales = [leaf for path, leaf in leaves(params).items() if path.endswith("lora_scale")]
    assert len(scales) == 2 * 5
    assert {(leaf.item(), leaf.dtype) for leaf in scales} == {(1.5, mx.float32)}


def test_the_same_key_draws_the_same_adapters() -> None:
    first, again, other = (leaves(add_adapters(PARAMS, CONFIG, Adapters(4), mx.random.key(seed))) for seed in (1, 1, 2))
    for path in filter(is_adapter, first):
        np.testing.assert_array_equal(np.array(first[path]), np.array(again[path]))
        assert mx.array_equal(first[path], other[path]).item() == path.endswith("lora_b")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank": 0}, "rank is 0 where it must be at least 1"),
        ({"rank": 4, "alpha": 0.0}, "alpha is 0.0 where it must be a positive number"),
        ({"rank": 4, "alpha": float("nan")}, "alpha is nan"),
        ({"rank": 4, "alpha": 1e300}, "makes a scale of 2.5e+299 where one from 1e-30 to 1e+30 is expected"),
        ({"rank": 4, "alpha": 1e-300}, "makes a scale of 2.5e-301 where"),
        ({"rank": 4, "targets": ()}, "targets is"),
        ({"rank": 4, "targets": ("attention", "attention")}, "targets is"),
        ({"rank": 4, "targets": ("mlp",)}, "targets names 'mlp' where experts, attention,"),
    ],
)
def test_impossible_adapters_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as error:
        Adapters(**fields)
    assert said in str(error.value)


def test_adapters_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"rank is 5 where .*router.layer.weight, \[4, 128\], allows at most 4"):
        add_adapters(PARAMS, CONFIG, Adapters(5, targets=("router",)), KEY)
    once = add_adapters(PARAMS, CONFIG, Adapters(4, targets=("head",)), KEY)
    with pytest.raises(InputError, match=r"lm_head.weight has an adapter already"):
        add_adapters(once, CONFIG, Adapters(4, targets=("head",)), KEY)


def test_leaves_of_adapters_that_do_not_fit_are_told() -> None:
    params: Any = add_adapters(PARAMS, CONFIG, Adapters(4, targets=("attention", "head")), KEY)
    params["lm_head"]["lora_b"] = mx.zeros((40, 3))
    del params["transformer"]["blocks"][0]["norm_attn_norm"]["attn"]["Wqkv"]["lora_a"]
    out_proj = params["transformer"]["blocks"][1]["norm_attn_norm"]["attn"]["out_proj"]
    out_proj["lora_a"] = out_proj["lora_a"].astype(mx.float16)
    out_proj["lora_scale"] = mx.array([2.0])
    with pytest.raises(CheckpointError) as error:
        check_params(params, CONFIG)
    for problem in (
        "lm_head.lora_b is [40, 3] where [40, 4] (vocab rank) is expected",
        "blocks.0.norm_attn_norm.attn.Wqkv.lora_a is missing",
        "blocks.1.norm_attn_norm.attn.out_proj.lora_a is float16 where float32 is expected",
        "blocks.1.norm_attn_norm.attn.out_proj.lora_scale is [1] where [] () is expected",
    ):
        assert problem in str(error.value)


def test_a_checkpoint_of_an_adapted_tree_is_refused(tmp_path: Any) -> None:
    params = add_adapters(PARAMS, CONFIG, Adapters(4, targets=("head",)), KEY)
    with pytest.raises(InputError, match=r"lm_head.weight has an adapter, which no layout holds"):
        save(tmp_path / "out", params, CONFIG)
    save(tmp_path / "out", fuse_adapters(params, CONFIG), CONFIG)


def test_short_floats_keep_their_dtype() -> None:
    config = replace(CONFIG, dtype="bfloat16")
    plain = nest({path: leaf.astype(mx.bfloat16) for path, leaf in leaves(PARAMS).items()}, config)
    params = with_random_adapters(plain, config, KINDS)
    logits, _ = score(params, TOKENS, config)
    assert logits.dtype == mx.bfloat16
    wide = nest({path: leaf.astype(mx.float32) for path, leaf in leaves(params).items()}, CONFIG)
    exact = as_float64(score(wide, TOKENS, CONFIG)[0])
    # Not the largest error, since rounding sends some tokens to other experts.
    assert np.median(np.abs(as_float64(logits) - exact)) <= 0.02 * np.abs(exact).max()


def test_two_parts_of_a_tree_make_the_tree_again() -> None:
    params = add_adapters(PARAMS, CONFIG, Adapters(4), KEY)
    for chosen in (is_adapter, lambda path: "blocks.1." in path, lambda path: "router" in path, lambda path: False):
        one, other = partition(params, CONFIG, chosen)
        assert set(leaves(one)) == set(filter(chosen, leaves(params)))
        again = joined(one, other, CONFIG)
        assert list(leaves(again)) == list(leaves(params))
        assert all(mx.array_equal(leaf, leaves(params)[path]) for path, leaf in leaves(again).items())
