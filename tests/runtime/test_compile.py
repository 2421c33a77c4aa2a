"""What `typed`, `compiled` and `traced` promise, on functions made for it and on the block."""

import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Float, Float32, TypeCheckError

from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.config import AttnConfig, Config, FFNConfig
from dbrx_fn.model.params import init_params
from dbrx_fn.model.transformer import forward
from dbrx_fn.runtime.compile import compiled, traced, typed
from dbrx_fn.runtime.device import as_if, compiles, on_cpu

CONFIG = Config(
    d_model=12,
    n_heads=2,
    n_layers=2,
    vocab_size=20,
    attn=AttnConfig(clip_qkv=2.0),
    ffn=FFNConfig(ffn_hidden_size=8, moe_num_experts=3, moe_top_k=2),
    dtype="float32",
)
PARAMS = init_params(CONFIG, mx.random.key(0))
TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]], mx.int32)


class Pair(NamedTuple):
    """A tree of two."""

    one: mx.array
    other: mx.array


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was reported since the last call."""
    found = [record.getMessage() for record in caplog.records if record.name == "dbrx_fn.compile"]
    caplog.clear()
    return found


@pytest.mark.parametrize("decorator", [typed, compiled, traced])
def test_types_are_checked_whatever_was_right_before(decorator: Callable[..., Any]) -> None:
    def multiply(x: Float[mx.array, "rows inner"], y: Float[mx.array, "inner outer"]) -> Float[mx.array, "rows outer"]:
        return x @ y

    product = decorator(multiply)
    for _ in range(2):
        assert product(mx.ones((2, 3)), mx.ones((3, 4))).shape == (2, 4)
        with pytest.raises(TypeCheckError, match="y"):
            product(mx.ones((2, 3)), mx.ones((4, 4)))
        with pytest.raises(TypeCheckError, match="y"):
            product(mx.ones((2, 3)), mx.ones((3, 4), mx.int32))
        with pytest.raises(TypeCheckError, match="y"):
            product(mx.ones((2, 3)), None)


@pytest.mark.parametrize("decorator", [typed, compiled, traced])
def test_what_comes_back_is_checked(decorator: Callable[..., Any]) -> None:
    def cut(x: Float[mx.array, " n"], *, rounds: bool) -> Float[mx.array, " n"]:
        return x[:1] if rounds else x

    half = decorator(cut)
    assert half(mx.ones(4), rounds=False).shape == (4,)
    with pytest.raises(TypeCheckError, match="return"):
        half(mx.ones(4), rounds=True)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (mx.ones((2, 3)), mx.ones((3, 2))),
        (mx.ones(2), mx.ones(2, mx.bfloat16)),
        (mx.ones(2), None),
        ({"a": mx.ones(2)}, {"b": mx.ones(2)}),
        ({"a": {"b": mx.ones(2)}}, {"a": {"b": mx.ones(3)}}),
        ([mx.ones(2)], [mx.ones(2), mx.ones(2)]),
        ([mx.ones(2), mx.ones(3)], [mx.ones(3), mx.ones(2)]),
        ([mx.ones(2), [mx.ones(2)]], [[mx.ones(2)], mx.ones(2)]),
    ],
)
def test_trees_that_differ_are_checked_one_by_one(one: Any, other: Any, caplog: pytest.LogCaptureFixture) -> None:
    @compiled
    def same(tree: Any) -> Any:
        return tree

    with caplog.at_level(logging.DEBUG, logger="dbrx_fn.compile"):
        for tree in (one, other, one, other):
            same(tree)
    assert len(messages(caplog)) == 2


def test_a_list_is_no_named_tuple() -> None:
    @typed
    def swap(pair: Pair) -> Pair:
        return Pair(pair[1], pair[0])

    for _ in range(2):
        assert swap(Pair(mx.ones(2), mx.zeros(2))).one.tolist() == [0, 0]
        with pytest.raises(TypeCheckError, match="pair"):
            swap([mx.ones(2), mx.zeros(2)])  # type: ignore[arg-type]


def test_static_values_are_part_of_what_is_known(caplog: pytest.LogCaptureFixture) -> None:
    @compiled
    def scaled(x: mx.array, *, times: int) -> mx.array:
        return x * times

    with caplog.at_level(logging.DEBUG, logger="dbrx_fn.compile"):
        results = [scaled(mx.ones(2), times=times).tolist() for times in (2, 3, 2, 3)]
    assert results == [[2, 2], [3, 3], [2, 2], [3, 3]]
    assert len(messages(caplog)) == 2


def test_a_traced_function_runs_once_a_shape_and_constant(caplog: pytest.LogCaptureFixture) -> None:
    runs = []

    @traced
    def double(x: mx.array, *, times: int) -> mx.array:
        runs.append(x.shape)
        return x * times

    with caplog.at_level(logging.DEBUG, logger="dbrx_fn.compile"):
        for _ in range(3):
            assert np.array(double(mx.ones(2), times=2)).tolist() == [2, 2]
        double(mx.ones(2), times=3)
        double(mx.ones(3), times=2)
    assert runs == [(2,), (2,), (3,)]
    assert len(messages(caplog)) == 3


@pytest.mark.parametrize(("compiles", "expected"), [(False, 3), (True, 1)])
def test_where_layers_are_not_compiled_their_python_runs_every_time(compiles: bool, expected: int) -> None:
    runs = []

    @compiled
    def double(x: mx.array) -> mx.array:
        runs.append(x.shape)
        return 2 * x

    with as_if(compiles=compiles):
        for _ in range(3):
            double(mx.ones(2))
    assert len(runs) == expected


def test_a_cpu_does_not_compile_unless_it_is_asked_to() -> None:
    """So that nobody waits for g++."""
    asked = os.environ.get("DBRX_FN_COMPILE") == "1"
    assert compiles() == (asked or not on_cpu())


@given(st.lists(st.sampled_from([(1,), (2,), (1, 2), (2, 1)]), min_size=1, max_size=8))
def test_results_do_not_depend_on_what_was_met_before(shapes: list[tuple[int, ...]]) -> None:
    @compiled
    def total(x: Float32[mx.array, "..."]) -> Float32[mx.array, ""]:
        return x.sum()

    for shape in shapes:
        assert total(mx.ones(shape)).item() == np.prod(shape)


def test_the_model_within_a_trace_equals_the_model(measured: Callable[[str, float], float]) -> None:
    """Fused kernels may round otherwise: g++ can join a product and a sum."""

    @traced
    def logits(params: Any, tokens: mx.array) -> mx.array:
        return forward(params, tokens, init_cache(CONFIG, 1, 0))[0]

    expected = np.array(forward(PARAMS, TOKENS, init_cache(CONFIG, 1, 0))[0])
    error = np.abs(np.array(logits(PARAMS, TOKENS)) - expected).max() / np.abs(expected).max()
    assert measured("the model as one compiled function to the model called", float(error)) < 5e-6


def test_logits_under_a_gradient_are_those_of_forward() -> None:
    """Bitwise on the CPU, where operations are the same ones whatever surrounds a layer."""

    def loss(params: Any) -> tuple[mx.array, mx.array]:
        logits = forward(params, TOKENS, init_cache(CONFIG, 1, 0))[0]
        return logits.square().mean(), logits

    (_, logits), _ = mx.value_and_grad(loss)(PARAMS)
    expected = forward(PARAMS, TOKENS, init_cache(CONFIG, 1, 0))[0]
    if mx.default_device().type == mx.cpu:
        assert np.array(logits).tobytes() == np.array(expected).tobytes()
    else:
        assert mx.allclose(logits, expected, rtol=1e-3, atol=1e-3).item()


def test_within_a_call_of_known_types_nothing_is_checked_again(caplog: pytest.LogCaptureFixture) -> None:
    """But after it everything is, also after one that failed."""

    @compiled
    def inner(x: Float[mx.array, "n"]) -> Float[mx.array, "n"]:
        return x * 2

    @compiled
    def outer(x: Float[mx.array, "n"], *, fail: bool = False) -> Float[mx.array, "n"]:
        if fail and outer_has_run:
            raise ValueError("asked to")
        return inner(x)

    outer_has_run = False
    with as_if(compiles=False), caplog.at_level("DEBUG", logger="dbrx_fn.compile"):
        outer(mx.ones(3), fail=True)
        first = len(caplog.records)
        outer_has_run = True
        with pytest.raises(ValueError, match="asked to"):
            outer(mx.ones(3), fail=True)
        inner(mx.ones(3))
        assert len(caplog.records) == first
        with pytest.raises(TypeCheckError):
            inner(mx.ones((3, 3)))
