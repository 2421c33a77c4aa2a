"""Attention, the router and their block against the oracle, and the shapes that layers refuse."""

from dataclasses import replace
from typing import Any, get_args

import mlx.core as mx
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from numpy.typing import NDArray

from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.config import NORM_EPS, AttnConfig, Config, Dtype, FFNConfig
from dbrx_fn.model.layers.attn import attn
from dbrx_fn.model.layers.block import block
from dbrx_fn.model.layers.embedding import embedding
from dbrx_fn.model.layers.moe import moe
from dbrx_fn.model.layers.norm_attn_norm import norm_attn_norm
from dbrx_fn.model.layers.rotary import inverse_frequencies, turn, turns
from dbrx_fn.model.layers.router import router
from dbrx_fn.model.params import init_params
from dbrx_fn.model.positions import Positions, positions_of
from dbrx_fn.model.transformer import score
from dbrx_fn.ops.linear import linear
from dbrx_fn.ops.norm import layer_norm
from dbrx_fn.runtime.compile import traced
from tests.support import oracle
from tests.support.trees import as_float64, relative_error

BAR = 5e-6
TIME = 11

Array = NDArray[Any]


def config_with(clip: float | None = None, kv_n_heads: int = 2, **ffn: Any) -> Config:
    return Config(
        d_model=36,
        n_heads=6,
        n_layers=1,
        vocab_size=20,
        attn=AttnConfig(clip_qkv=clip, kv_n_heads=kv_n_heads),
        ffn=FFNConfig(ffn_hidden_size=7, moe_num_experts=5, moe_top_k=2, **ffn),
        dtype="float32",
    )


def normal(seed: int, *shape: int) -> Array:
    """float32, of mean 0 and variance 1."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def nothing_cached(config: Config) -> tuple[None, Positions]:
    """No cache, and the positions of tokens without one."""
    return None, positions_of(TIME, (TIME,), None, config.layer)


def attention(config: Config, x: Array, wqkv: Array, out_proj: Array) -> tuple[mx.array, NDArray[np.float64]]:
    """Ours and the oracle's."""
    params: Any = {"Wqkv": {"weight": mx.array(wqkv)}, "out_proj": {"weight": mx.array(out_proj)}}
    ours, _ = attn(params, mx.array(x)[None], *nothing_cached(config), config=config.layer)
    raw = {
        "n_heads": config.n_heads,
        "d_model": config.d_model,
        "attn_config": {
            "kv_n_heads": config.attn.kv_n_heads,
            "clip_qkv": config.attn.clip_qkv,
            "rope_theta": config.attn.rope_theta,
        },
    }
    x64, wqkv64, out_proj64 = (array.astype(np.float64) for array in (x, wqkv, out_proj))
    return ours[0], oracle.attention(raw, x64, wqkv64, out_proj64)


@pytest.mark.parametrize("kv_n_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("clip", [0.5, None])
def test_attention(clip: float | None, kv_n_heads: int) -> None:
    config = config_with(clip, kv_n_heads)
    ours, expected = attention(config, normal(0, TIME, 36), normal(1, config.qkv_dim, 36) / 6, normal(2, 36, 36))
    assert relative_error(ours, expected) <= BAR


def test_the_clip_binds_where_it_must_and_nowhere_else() -> None:
    x, wqkv, out_proj = normal(0, TIME, 36), normal(1, config_with().qkv_dim, 36) / 6, normal(2, 36, 36)
    largest = float(np.abs(x @ wqkv.T).max())
    free, _ = attention(config_with(None), x, wqkv, out_proj)
    loose, _ = attention(config_with(2 * largest), x, wqkv, out_proj)
    tight, expected = attention(config_with(0.1), x, wqkv, out_proj)
    np.testing.assert_array_equal(np.array(loose), np.array(free))
    assert relative_error(tight, expected) <= BAR
    assert relative_error(tight, np.array(free)) > 0.1


@pytest.mark.parametrize(("head_dim", "theta"), [(128, 5e5), (64, 1e4), (12, 5e5)])
def test_heads_turn_by_the_references_angles_up_to_the_contexts_end(head_dim: int, theta: float) -> None:
    positions = [0, 1, 17, 1_000, 4_095, 12_001, 20_011, 31_999, 32_767]
    heads = normal(0, 1, 3, len(positions), head_dim)
    place = turns(mx.array([positions], mx.int32), head_dim=head_dim, theta=theta)
    found = np.array(turn(mx.array(heads), *place))
    for head, got in zip(heads[0].astype(np.float64), found[0], strict=True):
        expected = [oracle.turned(x, at, theta) for x, at in zip(head, positions, strict=True)]
        np.testing.assert_allclose(got, expected, rtol=0, atol=4e-7 * np.abs(head).max())


def test_cosines_and_sines_are_right_at_every_position() -> None:
    positions = np.arange(32_768, dtype=np.int32)
    cosines, sines = turns(mx.array(positions[None]), head_dim=128, theta=5e5)
    frequencies = np.array(inverse_frequencies(128, 5e5))
    angles = (positions[:, None].astype(np.float32) * frequencies).astype(np.float64)
    assert np.abs(np.array(cosines)[0, 0, :, 0] - np.cos(angles)).max() < 1e-7
    assert np.abs(np.array(sines)[0, 0] - np.stack([-np.sin(angles), np.sin(angles)], axis=1)).max() < 1e-7


def test_attention_writes_clipped_and_rotated_keys() -> None:
    config = config_with(0.5)
    params: Any = {"Wqkv": {"weight": mx.array(normal(1, config.qkv_dim, 36))}, "out_proj": {"weight": mx.eye(36)}}
    x = normal(0, 1, TIME, 36)
    cache = init_cache(config, 1, 16)
    positions = positions_of(TIME, (TIME,), cache, config.layer)
    _, after = attn(params, mx.array(x), (cache.keys[0], cache.values[0]), positions, config=config.layer)
    assert after is not None
    keys, values = after

    qkv = np.clip(x[0].astype(np.float64) @ as_float64(params["Wqkv"]["weight"]).T, -0.5, 0.5)
    heads = qkv.reshape(TIME, -1, config.head_dim).swapaxes(0, 1)
    expected_keys = np.stack([oracle.rope(head, config.attn.rope_theta) for head in heads[6:8]])
    assert keys.shape == values.shape == (1, 2, 16, config.head_dim)
    assert relative_error(keys[0, :, :TIME], expected_keys) <= BAR
    assert relative_error(values[0, :, :TIME], heads[8:]) <= BAR
    assert np.abs(np.array(values[0, :, :TIME])).max() == 0.5
    assert not np.array(keys[0, :, TIME:]).any()


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, None])
@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_router(p: float | None, top_k: int) -> None:
    x, weight = normal(0, 13, 8), normal(1, 5, 8)
    config = FFNConfig(moe_num_experts=5, moe_top_k=top_k, moe_normalize_expert_weights=p)
    weights, _, experts = router({"layer": {"weight": mx.array(weight)}}, mx.array(x), config=config)
    expected_weights, expected_experts = oracle.route(x.astype(np.float64), weight.astype(np.float64), top_k, p)
    likeliest_first = np.argsort(-np.array(weights), axis=1)
    np.testing.assert_array_equal(np.take_along_axis(np.array(experts), likeliest_first, 1), expected_experts)
    assert relative_error(np.take_along_axis(np.array(weights), likeliest_first, 1), expected_weights) <= 1e-6


@pytest.mark.parametrize("top_k", [1, 2, 4, 6])
def test_router_breaks_ties_for_any_but_different_experts(top_k: int) -> None:
    """Experts 1, 3 and 4 are alike, and likelier than 0, 2 and 5, which are alike too."""
    weight = np.zeros((6, 4), np.float32)
    weight[[1, 3, 4]] = 1.0
    config = FFNConfig(moe_num_experts=6, moe_top_k=top_k, moe_normalize_expert_weights=None)
    weights, _, experts = router({"layer": {"weight": mx.array(weight)}}, mx.ones((3, 4)), config=config)
    probabilities = oracle.softmax(4.0 * weight[:, 0].astype(np.float64))
    for chosen, their_weights in zip(np.array(experts), np.array(weights), strict=True):
        assert len(set(chosen.tolist())) == top_k
        assert len(set(chosen.tolist()) & {1, 3, 4}) == min(top_k, 3)
        np.testing.assert_allclose(their_weights, probabilities[chosen], rtol=1e-6)


@pytest.mark.parametrize("likeliest", [0, 1, 2])
def test_router_decides_in_float32(likeliest: int) -> None:
    """These logits are different in bfloat16, and their probabilities are not: all are 0.333984375."""
    logits = np.full((3, 1), 0.001, np.float32)
    logits[likeliest] = 0.00101
    config = FFNConfig(moe_num_experts=3, moe_top_k=1, moe_normalize_expert_weights=None)
    weight = mx.array(logits).astype(mx.bfloat16)
    probabilities = mx.softmax(weight[:, 0])
    assert len(set(np.array(weight.astype(mx.float32)).ravel().tolist())) == 2
    assert len(set(np.array(probabilities.astype(mx.float32)).tolist())) == 1

    weights, _, experts = router({"layer": {"weight": weight}}, mx.ones((1, 1), mx.bfloat16), config=config)
    assert weights.dtype == mx.bfloat16
    assert int(np.array(experts)[0, 0]) == likeliest


JITTER = 0.25


def jittered(eps: float | None, seed: int | None, dtype: mx.Dtype = mx.float32) -> NDArray[np.float64]:
    """The noise itself: logits `[tokens d_model]` of ones, by a router that hands on what it reads."""
    config = FFNConfig(moe_num_experts=64, moe_top_k=2, moe_jitter_eps=eps)
    key = None if seed is None else mx.random.key(seed)
    _, logits, _ = router({"layer": {"weight": mx.eye(64, dtype=dtype)}}, mx.ones((40, 64), dtype), key, config=config)
    return as_float64(logits)


@pytest.mark.parametrize("eps", [JITTER, 0.01, 0.001])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_jitter_is_uniform_around_1(dtype: mx.Dtype, eps: float) -> None:
    """2560 draws of standard deviation 2 * eps / sqrt(12), as fine as float32 whatever the activations are in."""
    noise = jittered(eps, 0, dtype)
    assert 1 - eps - 1e-6 <= noise.min() < 1 - 0.95 * eps
    assert 1 + 0.95 * eps < noise.max() <= 1 + eps + 1e-6
    assert len(np.unique(noise)) > 1000
    deviation = 2 * eps / np.sqrt(12)
    assert abs(noise.mean() - 1) < 5 * deviation / np.sqrt(noise.size)
    assert noise.std() == pytest.approx(deviation, rel=0.05)
    # Each token and each feature has a draw of its own.
    assert noise.std(axis=0).min() > deviation / 2
    assert noise.std(axis=1).min() > deviation / 2


def test_jitter_comes_from_its_key_alone() -> None:
    noise = jittered(JITTER, 0)
    mx.random.seed(1)
    np.testing.assert_array_equal(jittered(JITTER, 0), noise)
    assert not np.array_equal(jittered(JITTER, 1), noise)


@pytest.mark.parametrize(("eps", "seed"), [(JITTER, None), (None, 0), (0.0, 0), (None, None)])
def test_no_key_or_no_eps_is_no_jitter(eps: float | None, seed: int | None) -> None:
    assert (jittered(eps, seed) == 1).all()


def test_experts_read_what_was_there_before_jitter() -> None:
    """The noise is as large as it may be, and turns choices; the experts' inputs don't have it."""
    config = config_with(moe_jitter_eps=0.9).ffn
    x, key = mx.array(normal(0, 1, TIME, 36)), mx.random.key(0)
    w1, v1, w2 = normal(2, 5, 7, 36), normal(3, 5, 7, 36), normal(4, 5, 36, 7)
    mlp = {name: {"weight": mx.array(weight)} for name, weight in (("w1", w1), ("v1", v1), ("w2", w2))}
    params: Any = {"router": {"layer": {"weight": mx.array(normal(1, 5, 36))}}, "experts": {"mlp": mlp}}
    actual, routing = moe(params, x, key, config=config)
    weights, logits, experts = router(params["router"], x[0], key, config=config)
    np.testing.assert_array_equal(np.array(routing.logits), np.array(logits))
    np.testing.assert_array_equal(np.array(routing.top_experts), np.array(experts))
    expected = oracle.moe(np.array(x[0]), np.array(weights), np.array(experts), w1, v1, w2)
    assert relative_error(actual[0], expected) <= BAR
    quiet, without = moe(params, x, config=config)
    assert not np.array_equal(np.sort(np.array(without.top_experts)), np.sort(np.array(experts)))
    assert relative_error(quiet[0], expected) > 0.1


def test_each_layer_draws_its_own_jitter() -> None:
    """Blocks that add nothing hand the same activations to every router, and all routers are alike."""
    config = replace(config_with(moe_jitter_eps=JITTER), n_layers=3)
    params = init_params(config, mx.random.key(0))
    first = params["transformer"]["blocks"][0]
    first["norm_attn_norm"]["attn"]["out_proj"]["weight"] *= 0
    first["ffn"]["experts"]["mlp"]["w2"]["weight"] *= 0
    params["transformer"]["blocks"] = [first] * 3
    tokens = mx.arange(TIME)[None]
    _, quiet = score(params, tokens, config)
    _, noisy = score(params, tokens, config, jitter_key=mx.random.key(0))
    _, again = score(params, tokens, config, jitter_key=mx.random.key(0))
    quiet_logits, logits = np.array(quiet.logits), np.array(noisy.logits)
    np.testing.assert_array_equal(quiet_logits[0], quiet_logits[1])
    np.testing.assert_array_equal(np.array(again.logits), logits)
    assert not np.array_equal(logits[0], quiet_logits[0])
    assert not np.array_equal(logits[0], logits[1])
    assert not np.array_equal(logits[1], logits[2])


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
def test_layer_norm(scale: float) -> None:
    """The small scale shows the epsilon."""
    x, weight = scale * normal(0, 5, 12), normal(1, 12)
    expected = oracle.layer_norm(x.astype(np.float64), weight.astype(np.float64))
    assert relative_error(layer_norm(mx.array(weight), mx.array(x), eps=NORM_EPS), expected) <= BAR


def block_params(config: Config) -> Any:
    return init_params(config, mx.random.key(0))["transformer"]["blocks"][0]


def test_norm_attn_norm_hands_on_the_residual_and_its_norm() -> None:
    config = config_with(0.5)
    params = block_params(config)["norm_attn_norm"]
    params["attn"]["Wqkv"]["weight"] = mx.array(normal(1, config.qkv_dim, 36))
    params["attn"]["out_proj"]["weight"] = mx.array(normal(2, 36, 36))
    params["norm_1"]["weight"], params["norm_2"]["weight"] = mx.array(normal(3, 36)), mx.array(normal(4, 36))
    x = mx.array(normal(0, 1, TIME, 36))
    residual, normed, _ = norm_attn_norm(params, x, *nothing_cached(config), config=config.layer)

    attended, _ = attn(
        params["attn"],
        layer_norm(params["norm_1"]["weight"], x, eps=NORM_EPS),
        *nothing_cached(config),
        config=config.layer,
    )
    assert relative_error(residual, as_float64(x + attended)) <= BAR
    norm_2 = as_float64(params["norm_2"]["weight"])
    assert relative_error(normed[0], oracle.layer_norm(as_float64(residual[0]), norm_2)) <= BAR


def test_block_adds_what_the_experts_say_of_the_norm() -> None:
    config = config_with(0.5)
    params = block_params(config)
    params["ffn"]["experts"]["mlp"] = {
        name: {"weight": 10 * leaf["weight"]} for name, leaf in params["ffn"]["experts"]["mlp"].items()
    }
    x = mx.array(normal(0, 1, TIME, 36))
    out, _, routing = block(params, x, *nothing_cached(config), config=config.layer)
    residual, normed, _ = norm_attn_norm(params["norm_attn_norm"], x, *nothing_cached(config), config=config.layer)
    said, expected_routing = moe(params["ffn"], normed, config=config.ffn)
    assert relative_error(out, as_float64(residual + said)) <= BAR
    assert relative_error(routing.logits, as_float64(expected_routing.logits)) <= BAR
    np.testing.assert_array_equal(np.array(routing.top_experts), np.array(expected_routing.top_experts))
    assert relative_error(out, as_float64(residual)) > 1e-4


@pytest.mark.parametrize(
    ("weight", "x"),
    [
        (mx.zeros((4, 5)), mx.zeros((2, 3))),
        (mx.zeros((4,)), mx.zeros((2, 4))),
        (mx.zeros((2, 4, 3)), mx.zeros((2, 3))),
        (mx.zeros((4, 3), mx.int32), mx.zeros((2, 3))),
        (mx.zeros((4, 3)), mx.zeros((2, 3), mx.int32)),
    ],
)
def test_linear_refuses_what_does_not_fit(weight: mx.array, x: mx.array) -> None:
    with pytest.raises(TypeCheckError):
        linear({"weight": weight}, x)


def test_layers_refuse_what_does_not_fit() -> None:
    config = config_with()
    cached = nothing_cached(config)
    x = mx.zeros((1, TIME, 36))

    def refused(layer: Any, *arrays: Any, **static: Any) -> None:
        with pytest.raises(TypeCheckError):
            layer(*arrays, **static)

    params = block_params(config)
    refused(block, params, x[0], *cached, config=config.layer)
    refused(block, params, mx.zeros((1, TIME, 36), mx.int32), *cached, config=config.layer)
    refused(block, params, x, (mx.zeros((2, 4, 6)),) * 2, cached[1], config=config.layer)
    refused(
        attn,
        {**params["norm_attn_norm"]["attn"], "Wqkv": {"weight": mx.zeros((60, 35))}},
        x,
        *cached,
        config=config.layer,
    )
    refused(moe, params["ffn"], x[0], config=config.ffn)
    refused(moe, {**params["ffn"], "router": {"layer": {"weight": mx.zeros((5, 35))}}}, x, config=config.ffn)
    experts = {"mlp": {**params["ffn"]["experts"]["mlp"], "w1": {"weight": mx.zeros((7, 36))}}}
    refused(moe, {**params["ffn"], "experts": experts}, x, config=config.ffn)
    experts = {"mlp": {**params["ffn"]["experts"]["mlp"], "w2": {"weight": mx.zeros((5, 36, 8))}}}
    refused(moe, {**params["ffn"], "experts": experts}, x, config=config.ffn)
    refused(layer_norm, mx.zeros(35), x, eps=NORM_EPS)
    block(params, x, *cached, config=config.layer)


def test_types_are_checked_once_a_trace() -> None:
    """A layer's Python code, and with it the check, doesn't run again for a shape that it knows."""
    runs = []

    @traced
    def double(x: mx.array, *, times: int) -> mx.array:
        runs.append(x.shape)
        return x * times

    for _ in range(3):
        assert np.array(double(mx.ones(2), times=2)).tolist() == [2, 2]
    assert runs == [(2,)]
    assert np.array(double(mx.ones(2), times=3)).tolist() == [3, 3]
    double(mx.ones(3), times=2)
    assert runs == [(2,), (2,), (3,)]


@pytest.mark.parametrize("dtype", get_args(Dtype))
def test_gradients_of_a_frequent_token_are_all_added(dtype: Dtype) -> None:
    """In bfloat16 alone, a sum of ones would stay at 256."""
    config = replace(config_with(0.5), dtype=dtype, vocab_size=5)
    tokens = mx.array([[3] * 1500 + [1]], mx.int32)
    weight = mx.array(normal(0, 5, config.d_model)).astype(getattr(mx, dtype))

    def total(weight: mx.array) -> mx.array:
        return embedding({"weight": weight}, tokens, config=config.layer).sum()

    np.testing.assert_array_equal(
        as_float64(embedding({"weight": weight}, tokens, config=config.layer)[0, -1]), as_float64(weight[1])
    )
    for grad in (mx.grad(total), mx.compile(mx.grad(total))):
        made = as_float64(grad(weight))
        np.testing.assert_allclose(made.sum(axis=1), config.d_model * np.array([0, 1, 0, 1500, 0]), rtol=2**-8)
