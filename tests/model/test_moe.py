"""The expert dispatch equals a loop over tokens and their experts, for any routing, in value and in gradient."""

from collections.abc import Callable
from typing import Any, get_args

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_map
from numpy.typing import NDArray

from dbrx_fn.model.config import Activation, Dtype, FFNConfig
from dbrx_fn.model.layers.moe import moe
from dbrx_fn.ops.activations import ACTIVATIONS
from dbrx_fn.ops.dispatch import dispatch, packed_dispatch, segment_rows
from dbrx_fn.ops.experts import combine, gather_segments, gather_weights, mix_experts
from dbrx_fn.ops.linear import expert_linear, linear
from dbrx_fn.runtime.blas import FAST_BLAS
from dbrx_fn.runtime.device import Backend, as_if, backend
from tests.support import oracle
from tests.support.trees import as_float64, relative_error

D_MODEL, FFN_HIDDEN = 6, 5
BAR = 5e-6

Array = NDArray[Any]
Weights = dict[str, Array]


def draw_weights(rng: np.random.Generator, experts: int) -> Weights:
    shapes = {"w1": (FFN_HIDDEN, D_MODEL), "v1": (FFN_HIDDEN, D_MODEL), "w2": (D_MODEL, FFN_HIDDEN)}
    return {name: rng.standard_normal((experts, *shape)).astype(np.float32) for name, shape in shapes.items()}


def naive(
    x: Array, expert_weights: Array, top_experts: Array, weights: Weights, act: oracle.Activation = oracle.silu
) -> NDArray[np.float64]:
    return oracle.moe(x, expert_weights, top_experts, weights["w1"], weights["v1"], weights["w2"], act)


def as_params(weights: Weights) -> Any:
    return {name: {"weight": mx.array(weight)} for name, weight in weights.items()}


def in_segments(params: Any, x: mx.array, expert_weights: mx.array, top_experts: mx.array, rows: int) -> mx.array:
    """`mix_experts` with segments of `rows` rows, whatever the back end would choose."""
    plan = dispatch(top_experts, experts=params["w1"]["weight"].shape[0], rows=rows)
    segments = gather_segments(x, plan)
    gate = ACTIVATIONS["silu"](expert_linear(params["w1"], segments, plan.segment_experts))
    up = expert_linear(params["v1"], segments, plan.segment_experts)
    hidden = gate * up * gather_weights(expert_weights, plan)
    return combine(expert_linear(params["w2"], hidden, plan.segment_experts), plan)


def in_a_loop(
    params: dict[str, dict[str, mx.array]], x: mx.array, expert_weights: mx.array, top_experts: Array
) -> mx.array:
    out = []
    for t, chosen in enumerate(top_experts.tolist()):
        total = mx.zeros(x.shape[1])
        for k, e in enumerate(chosen):
            w1, v1, w2 = (params[name]["weight"][e] for name in ("w1", "v1", "w2"))
            gate = w1 @ x[t]
            total = total + expert_weights[t, k] * (w2 @ (gate * mx.sigmoid(gate) * (v1 @ x[t])))
        out.append(total)
    return mx.stack(out)


@st.composite
def routings(draw: st.DrawFn) -> tuple[Array, int]:
    """Any choice of experts, `[tokens top_k]`, and how many experts there are."""
    experts, tokens, top_k = draw(st.integers(1, 6)), draw(st.integers(1, 12)), draw(st.integers(1, 4))
    choice = st.lists(st.integers(0, experts - 1), min_size=top_k, max_size=top_k)
    return np.array(draw(st.lists(choice, min_size=tokens, max_size=tokens))), experts


ONE_TOKEN = (np.array([[2, 0]]), 3)
ONE_EXPERT_FOR_ALL = (np.full((9, 1), 2), 4)
ONE_EXPERT_TWICE = (np.array([[1, 1], [0, 1], [1, 1]]), 3)
ALL_EXPERTS = (np.array([[0, 1, 2], [2, 1, 0], [1, 0, 2], [0, 2, 1]]), 3)
ONLY_EXPERT = (np.zeros((7, 1), np.int64), 1)
LAST_EXPERTS_EMPTY = (np.array([[0, 1]] * 5), 6)
FIRST_EXPERTS_EMPTY = (np.array([[4, 5]] * 5), 6)


def any_routing(max_examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a test with random routings and with each of the named ones."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        named = (ONE_TOKEN, ONE_EXPERT_FOR_ALL, ONE_EXPERT_TWICE, ALL_EXPERTS, ONLY_EXPERT)
        for routing in (*named, LAST_EXPERTS_EMPTY, FIRST_EXPERTS_EMPTY):
            test = example(routing=routing)(test)
        return settings(max_examples=max_examples)(given(routing=routings())(test))

    return decorate


# All that any back end chooses, and short ones that these routings fill.
ROWS = pytest.mark.parametrize("rows", [1, 2, 3, 8, 16, 32, 64, 128, 256])


@ROWS
@any_routing(60)
def test_dispatch_gives_each_pair_a_slot_of_its_own(rows: int, routing: tuple[Array, int]) -> None:
    top_experts, experts = routing
    plan = dispatch(mx.array(top_experts), experts=experts, rows=rows)
    slot_pairs, segment_experts, pair_slots = (np.array(array) for array in plan)
    pairs = top_experts.size

    assert slot_pairs.shape == (min(pairs, pairs // rows + experts), rows)
    assert segment_experts.shape == slot_pairs.shape[:1]
    assert pair_slots.shape == top_experts.shape
    np.testing.assert_array_equal(slot_pairs.ravel()[pair_slots.ravel()], np.arange(pairs))
    np.testing.assert_array_equal(segment_experts[pair_slots // rows], top_experts)
    assert (np.diff(segment_experts.astype(np.int64)) >= 0).all()
    assert segment_experts.min() >= 0
    assert segment_experts.max() < experts
    assert (slot_pairs == pairs).sum() == slot_pairs.size - pairs


@pytest.mark.parametrize(("rows", "unit"), [(1, 1), (4, 1), (4, 2), (8, 8), (64, 8)])
@any_routing(60)
def test_packed_segments_have_only_the_slots_that_they_need(rows: int, unit: int, routing: tuple[Array, int]) -> None:
    top_experts, experts = routing
    plan = packed_dispatch(mx.array(top_experts), experts=experts, rows=rows, unit=unit)
    segment_experts, first_slots = np.array(plan.segment_experts), np.array(plan.first_slots)
    pair_slots, pair_segments = np.array(plan.pair_slots).ravel(), np.array(plan.pair_segments).ravel()
    segment, slot = 0, 0
    for expert in range(experts):
        pairs = np.flatnonzero(top_experts.ravel() == expert)
        for first in range(0, pairs.size, rows):
            part = pairs[first : first + rows]
            assert (first_slots[segment], segment_experts[segment]) == (slot, expert)
            np.testing.assert_array_equal(pair_slots[part], slot + np.arange(part.size))
            assert (pair_segments[part] == segment).all()
            segment, slot = segment + 1, slot - (-part.size // unit) * unit
    assert (first_slots[segment:] == slot).all()
    assert slot <= plan.slots
    assert segment <= segment_experts.size == first_slots.size - 1


def test_the_number_of_segments_does_not_depend_on_the_routing() -> None:
    one, all_of_them = mx.zeros((12, 2), mx.int32), mx.arange(24).reshape(12, 2) % 8
    shapes = [[array.shape for array in dispatch(top, experts=8, rows=4)] for top in (one, all_of_them)]
    assert shapes[0] == shapes[1] == [(14, 4), (14,), (12, 2)]


@ROWS
@any_routing(60)
def test_segments_equal_the_loop(rows: int, routing: tuple[Array, int]) -> None:
    top_experts, experts = routing
    rng = np.random.default_rng(top_experts.size)
    weights = draw_weights(rng, experts)
    x = rng.standard_normal((len(top_experts), D_MODEL)).astype(np.float32)
    expert_weights = rng.standard_normal(top_experts.shape).astype(np.float32)
    actual = in_segments(as_params(weights), mx.array(x), mx.array(expert_weights), mx.array(top_experts), rows)
    assert relative_error(actual, naive(x, expert_weights, top_experts, weights)) <= BAR


@pytest.mark.parametrize("dtype", get_args(Dtype))
def test_segments_of_any_length_are_as_near_to_the_oracle(
    dtype: Dtype, measured: Callable[[str, float], float]
) -> None:
    """Full ones too: 900 pairs over 3 experts."""
    rng = np.random.default_rng(0)
    top_experts = np.argsort(rng.random((450, 3)), axis=1)[:, :2]
    weights = draw_weights(rng, 3)
    params: Any = tree_map(lambda leaf: leaf.astype(getattr(mx, dtype)), as_params(weights))
    x, expert_weights = (
        mx.array(rng.standard_normal(shape)).astype(getattr(mx, dtype)) for shape in ((450, D_MODEL), (450, 2))
    )
    rounded = {name: as_float64(matrix["weight"]) for name, matrix in params.items()}
    expected = naive(as_float64(x), as_float64(expert_weights), top_experts, rounded)
    errors = {
        rows: relative_error(in_segments(params, x, expert_weights, mx.array(top_experts), rows), expected)
        for rows in (1, 8, 16, 32, 64, 128, 256)
    }
    for rows, error in errors.items():
        assert measured(f"{dtype} experts in segments to the oracle", error) <= 1.5 * errors[1], rows


def gradients(
    mix: Callable[..., mx.array], params: Any, x: mx.array, expert_weights: mx.array, cotangent: mx.array
) -> list[mx.array]:
    def loss(params: Any, x: mx.array, expert_weights: mx.array) -> mx.array:
        return (mix(params, x, expert_weights) * cotangent).sum()

    of_params, of_x, of_expert_weights = mx.grad(loss, argnums=(0, 1, 2))(params, x, expert_weights)
    return [of_x, of_expert_weights, *(of_params[name]["weight"] for name in ("w1", "v1", "w2"))]


# On CUDA MLX isn't told that single rows' experts ascend.
@pytest.mark.parametrize("machine", sorted({backend(), "cuda"}))
@ROWS
@any_routing(15)
def test_gradients_of_segments_equal_the_loops(machine: Backend, rows: int, routing: tuple[Array, int]) -> None:
    top_experts, experts = routing
    rng = np.random.default_rng(top_experts.size)
    params = as_params(draw_weights(rng, experts))
    x, cotangent = (mx.array(rng.standard_normal((len(top_experts), D_MODEL)).astype(np.float32)) for _ in range(2))
    expert_weights = mx.array(rng.standard_normal(top_experts.shape).astype(np.float32))

    def segments(params: Any, x: mx.array, expert_weights: mx.array) -> mx.array:
        return in_segments(params, x, expert_weights, mx.array(top_experts), rows)

    def loop(params: Any, x: mx.array, expert_weights: mx.array) -> mx.array:
        return in_a_loop(params, x, expert_weights, top_experts)

    with as_if(backend=machine):
        actual = gradients(segments, params, x, expert_weights, cotangent)
    expected = gradients(loop, params, x, expert_weights, cotangent)
    for ours, theirs in zip(actual, expected, strict=True):
        assert relative_error(ours, np.array(theirs)) <= BAR


@pytest.mark.parametrize("tokens", [32, 512])
def test_gradients_take_memory_by_experts_not_by_segments(tokens: int) -> None:
    """MLX makes a matrix for each segment unless it is told that their experts ascend."""
    config = FFNConfig(ffn_hidden_size=128, moe_num_experts=8, moe_top_k=2)
    key = mx.random.key(0)
    params = {n: {"weight": mx.random.normal((8, 128, 128), key=key)} for n in ("w1", "v1", "w2")}
    x, weights = mx.random.normal((tokens, 128), key=key), mx.full((tokens, 2), 0.5)
    experts = mx.random.randint(0, 8, (tokens, 2), key=key)

    def loss(params: Any) -> mx.array:
        return mix_experts(params, x, weights, experts, activation=config.ffn_act_fn).square().sum()

    mx.eval(params, x, weights, experts, mx.grad(loss)(params))
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.grad(loss)(params))
    assert mx.get_peak_memory() - held < 4 * 3 * 8 * 128 * 128 * 4 + 16 * tokens * 128 * 4 * 2


def test_gradients_equal_finite_differences_of_the_oracle() -> None:
    """Of the whole compiled path; central differences in float64 leave some 1e-9."""
    rng = np.random.default_rng(0)
    top_experts = np.array([[0, 2], [2, 2], [1, 0], [0, 2], [2, 0]])
    weights = draw_weights(rng, 4)
    x, cotangent = (rng.standard_normal((5, D_MODEL)).astype(np.float32) for _ in range(2))
    expert_weights = rng.standard_normal(top_experts.shape).astype(np.float32)
    arguments: dict[str, Any] = {"x": x, "expert_weights": expert_weights, **weights}

    def difference(name: str) -> NDArray[np.float64]:
        out = np.zeros(arguments[name].shape)
        for index in np.ndindex(out.shape):
            losses = []
            for step in (1e-5, -1e-5):
                moved = arguments[name].astype(np.float64)
                moved[index] += step
                value = oracle.moe(**{**arguments, name: moved}, top_experts=top_experts)
                losses.append(float((value * cotangent).sum()))
            out[index] = (losses[0] - losses[1]) / 2e-5
        return out

    config = FFNConfig(ffn_hidden_size=FFN_HIDDEN, moe_num_experts=4, moe_top_k=2)

    def mix(params: Any, x: mx.array, expert_weights: mx.array) -> mx.array:
        return mix_experts(params, x, expert_weights, mx.array(top_experts), activation=config.ffn_act_fn)

    actual = gradients(mix, as_params(weights), mx.array(x), mx.array(expert_weights), mx.array(cotangent))
    for ours, name in zip(actual, arguments, strict=True):
        assert relative_error(ours, difference(name)) <= BAR


COMPILED_SHAPES = [(1, 2, 3), (24, 2, 5), (100, 2, 3)]


@pytest.mark.parametrize(("tokens", "top_k", "experts"), COMPILED_SHAPES)
@settings(max_examples=25)
@given(data=st.data())
def test_the_compiled_mixture_equals_the_loop(tokens: int, top_k: int, experts: int, data: st.DataObject) -> None:
    """One compiled graph for every routing of a shape."""
    choice = st.lists(st.integers(0, experts - 1), min_size=top_k, max_size=top_k)
    top_experts = np.array(data.draw(st.lists(choice, min_size=tokens, max_size=tokens)))
    rng = np.random.default_rng(tokens)
    weights = draw_weights(rng, experts)
    x = rng.standard_normal((tokens, D_MODEL)).astype(np.float32)
    expert_weights = rng.standard_normal(top_experts.shape).astype(np.float32)
    config = FFNConfig(ffn_hidden_size=FFN_HIDDEN, moe_num_experts=experts, moe_top_k=top_k)
    arrays = (mx.array(array) for array in (x, expert_weights, top_experts))
    actual = mix_experts(as_params(weights), *arrays, activation=config.ffn_act_fn)
    assert relative_error(actual, naive(x, expert_weights, top_experts, weights)) <= BAR


@pytest.mark.skipif(mx.default_device().type != mx.cpu, reason="other back ends choose other segments")
def test_the_compiled_shapes_have_segments_of_all_lengths() -> None:
    rows = [segment_rows(tokens * top_k, experts, mx.float32) for tokens, top_k, experts in COMPILED_SHAPES]
    assert rows == [1, 1, 8] if FAST_BLAS is None else [1, 16, 16]


@pytest.mark.parametrize("tokens", [1, 9])
def test_one_expert_is_a_dense_mlp(tokens: int) -> None:
    """Whatever the router says, its one weight is 1."""
    rng = np.random.default_rng(tokens)
    mlp = as_params(draw_weights(rng, 1))
    router: Any = {"layer": {"weight": mx.array(rng.standard_normal((1, D_MODEL)).astype(np.float32))}}
    x = mx.array(rng.standard_normal((1, tokens, D_MODEL)).astype(np.float32))
    config = FFNConfig(ffn_hidden_size=FFN_HIDDEN, moe_num_experts=1, moe_top_k=1)
    actual, _ = moe({"router": router, "experts": {"mlp": mlp}}, x, config=config)

    one: Any = {name: {"weight": mlp[name]["weight"][0]} for name in ("w1", "v1", "w2")}
    w1, v1, w2 = one["w1"], one["v1"], one["w2"]
    gate = linear(w1, x)
    expected = linear(w2, gate * mx.sigmoid(gate) * linear(v1, x))
    assert relative_error(actual, np.array(expected)) <= BAR


def sigmoid(x: oracle.Floats) -> oracle.Floats:
    return 1.0 / (1.0 + np.exp(-x))


FORMULAS: dict[str, oracle.Activation] = {
    **oracle.ACTIVATIONS,
    "swish": oracle.silu,
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
}


@pytest.mark.parametrize("act", get_args(Activation))
def test_activations_are_what_their_names_say(act: Activation) -> None:
    rng = np.random.default_rng(0)
    weights = draw_weights(rng, 3)
    x = rng.standard_normal((4, D_MODEL)).astype(np.float32)
    top_experts = np.array([[0, 1], [2, 1], [1, 0], [2, 0]])
    expert_weights = rng.random(top_experts.shape).astype(np.float32)
    config = FFNConfig(ffn_hidden_size=FFN_HIDDEN, moe_num_experts=3, moe_top_k=2, ffn_act_fn=act)
    arrays = (mx.array(array) for array in (x, expert_weights, top_experts))
    actual = mix_experts(as_params(weights), *arrays, activation=config.ffn_act_fn)
    assert relative_error(actual, naive(x, expert_weights, top_experts, weights, FORMULAS[act])) <= BAR
