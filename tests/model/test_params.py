"""The tree's paths and shapes, how it is drawn, and what is told of a tree that doesn't fit."""

from dataclasses import replace
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from dbrx_fn.errors import CheckpointError
from dbrx_fn.model.config import DBRX, AttnConfig, Config, FFNConfig
from dbrx_fn.model.params import check_params, init_params, nest, param_count, param_spec
from dbrx_fn.model.tree import Params
from tests.support.trees import as_float64

CONFIG = Config(
    d_model=24,
    n_heads=4,
    n_layers=2,
    vocab_size=30,
    attn=AttnConfig(kv_n_heads=2),
    ffn=FFNConfig(ffn_hidden_size=8, moe_num_experts=3, moe_top_k=2),
    initializer_range=0.5,
    dtype="float32",
)
EXPECTED_SHAPES = {
    "transformer.wte.weight": (30, 24),
    **{
        f"transformer.blocks.{n}.{name}": shape
        for n in range(2)
        for name, shape in {
            "norm_attn_norm.norm_1.weight": (24,),
            "norm_attn_norm.attn.Wqkv.weight": (48, 24),
            "norm_attn_norm.attn.out_proj.weight": (24, 24),
            "norm_attn_norm.norm_2.weight": (24,),
            "ffn.router.layer.weight": (3, 24),
            "ffn.experts.mlp.w1.weight": (3, 8, 24),
            "ffn.experts.mlp.v1.weight": (3, 8, 24),
            "ffn.experts.mlp.w2.weight": (3, 24, 8),
        }.items()
    },
    "transformer.norm_f.weight": (24,),
    "lm_head.weight": (30, 24),
}


def leaves(params: Params) -> dict[str, mx.array]:
    flat: Any = tree_flatten(params)
    return dict(flat)


def test_the_spec_and_the_tree_have_these_leaves_in_this_order() -> None:
    spec = param_spec(CONFIG)
    assert [(path, leaf.shape) for path, leaf in spec.items()] == list(EXPECTED_SHAPES.items())
    params = init_params(CONFIG, mx.random.key(0))
    assert {path: leaf.shape for path, leaf in leaves(params).items()} == EXPECTED_SHAPES
    assert isinstance(params["transformer"]["blocks"], list)
    assert spec["transformer.blocks.1.ffn.experts.mlp.w2.weight"].axes == ("expert", "d_model", "ffn_hidden")


def test_dbrx_has_132_billion_parameters_36_of_them_active() -> None:
    d, layers, ffn, experts, vocab = 6144, 40, 10752, 16, 100352
    outside = 2 * vocab * d + d
    beside_experts = 2 * d + (48 + 2 * 8) * 128 * d + d * d + experts * d
    one_expert = 3 * ffn * d
    assert param_count(DBRX) == outside + layers * (beside_experts + experts * one_expert) == 131_596_523_520
    active = outside + layers * (beside_experts + 4 * one_expert)
    assert param_count(DBRX, active=True) == active == 36_469_708_800
    assert len(param_spec(DBRX)) == 323


def test_all_parameters_are_active_where_all_experts_are() -> None:
    ffn = FFNConfig(ffn_hidden_size=8, moe_num_experts=3, moe_top_k=3)
    config = Config(d_model=24, n_heads=4, n_layers=2, vocab_size=30, ffn=ffn)
    assert param_count(config, active=True) == param_count(config)


def test_the_same_key_draws_the_same_tree() -> None:
    first, again, other = (leaves(init_params(CONFIG, mx.random.key(seed))) for seed in (1, 1, 2))
    for path, leaf in first.items():
        np.testing.assert_array_equal(np.array(leaf), np.array(again[path]))
        assert np.array_equal(np.array(leaf), np.array(other[path])) == path.endswith(
            ("_1.weight", "_2.weight", "_f.weight")
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_matrices_are_normal_and_norms_one(dtype: Any) -> None:
    drawn = leaves(init_params(replace(CONFIG, dtype=dtype), mx.random.key(0)))
    assert {leaf.dtype for leaf in drawn.values()} == {getattr(mx, dtype)}
    for leaf in drawn.values():
        values = as_float64(leaf)
        if values.ndim == 1:
            assert (values == 1).all()
            continue
        # Six standard errors of a sample's deviation and mean.
        assert abs(values.std() - 0.5) < 6 * 0.5 / np.sqrt(2 * values.size)
        assert abs(values.mean()) < 6 * 0.5 / np.sqrt(values.size)
    matrices = [as_float64(leaf).ravel()[:8] for leaf in drawn.values() if leaf.ndim > 1]
    assert len({tuple(first.tolist()) for first in matrices}) == len(matrices)


def test_nest_puts_leaves_in_order() -> None:
    arrays = {path: mx.zeros(shape) for path, shape in reversed(EXPECTED_SHAPES.items())}
    tree = nest(arrays, CONFIG)
    assert list(leaves(tree)) == list(leaves(init_params(CONFIG, mx.random.key(0))))
    assert list(tree) == ["transformer", "lm_head"]


def test_a_tree_that_fits() -> None:
    check_params(init_params(CONFIG, mx.random.key(0)), CONFIG)


def test_everything_that_does_not_fit_is_told_at_once() -> None:
    params: Any = init_params(CONFIG, mx.random.key(0))
    del params["lm_head"]
    params["transformer"]["blocks"][1]["extra"] = {"weight": mx.zeros(3)}
    params["transformer"]["wte"]["weight"] = mx.zeros((31, 24))
    params["transformer"]["norm_f"]["weight"] = mx.ones(24, mx.float16)
    mlp = params["transformer"]["blocks"][0]["ffn"]["experts"]["mlp"]
    mlp["w2"]["weight"] = mlp["w2"]["weight"].swapaxes(1, 2)
    with pytest.raises(CheckpointError) as error:
        check_params(params, CONFIG)
    for problem in (
        "lm_head.weight is missing",
        "transformer.blocks.1.extra.weight is unexpected",
        "transformer.wte.weight is [31, 24] where [30, 24] (vocab d_model) is expected",
        "transformer.norm_f.weight is float16 where float32 is expected",
        "transformer.blocks.0.ffn.experts.mlp.w2.weight is [3, 8, 24] where [3, 24, 8] (expert d_model ffn_hidden)",
    ):
        assert problem in str(error.value)
    assert str(error.value).count(";") == 4


def test_a_tree_of_another_model_does_not_drown_the_reader() -> None:
    with pytest.raises(CheckpointError, match="; and 283 more"):
        check_params(cast(Params, {}), DBRX)
