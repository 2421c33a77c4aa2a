"""What flows between the layers is what models of fewer layers make."""

from dataclasses import replace
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from dbrx_fn.errors import CheckpointError, InputError
from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.config import Config
from dbrx_fn.model.hidden_states import hidden_states, logits_of
from dbrx_fn.model.params import init_params
from dbrx_fn.model.transformer import forward, score
from dbrx_fn.model.tree import Params
from tests.support import oracle
from tests.support.trees import random_case, relative_error

BAR = 5e-6
SEEDS = range(8)


@pytest.mark.parametrize("seed", SEEDS)
def test_each_layers_logits_are_those_of_a_model_that_ends_there(seed: int) -> None:
    case, rng = random_case(seed)
    tokens = rng.integers(case.config.vocab_size, size=int(rng.integers(1, 20)))
    streams = hidden_states(case.params, mx.array(tokens)[None], case.config)
    assert streams.shape == (case.config.n_layers + 1, 1, len(tokens), case.config.d_model)
    logits = logits_of(case.params, streams, case.config)
    for layers in range(1, case.config.n_layers + 1):
        expected = oracle.forward({**case.raw, "n_layers": layers}, case.tensors, tokens)
        assert relative_error(logits[layers, 0], expected) <= BAR


@pytest.mark.parametrize("time", [1, 5, 8, 13])
def test_the_last_layers_logits_are_the_models(time: int) -> None:
    case, rng = random_case(1)
    tokens = mx.array(rng.integers(case.config.vocab_size, size=(3, time)))
    streams = hidden_states(case.params, tokens, case.config)
    logits = logits_of(case.params, streams[-1], case.config)
    assert relative_error(logits, forward(case.params, tokens, init_cache(case.config, 3, 0))[0]) <= BAR


@pytest.mark.parametrize("time", [1, 8])
def test_they_are_bit_for_bit_what_score_computes_where_nothing_is_padded(time: int) -> None:
    case, rng = random_case(2)
    tokens = mx.array(rng.integers(case.config.vocab_size, size=(2, time)))
    logits = logits_of(case.params, hidden_states(case.params, tokens, case.config)[-1], case.config)
    np.testing.assert_array_equal(np.array(logits), np.array(score(case.params, tokens, case.config)[0]))


def test_the_first_stream_is_the_embedding() -> None:
    case, _ = random_case(3)
    streams = hidden_states(case.params, mx.array([[3, 1, 2]]), case.config)
    rows = case.tensors["transformer.wte.weight"][[3, 1, 2]]
    np.testing.assert_array_equal(np.array(streams[0, 0]), rows)


def test_streams_have_the_configs_dtype_and_any_leading_axes() -> None:
    case, _ = random_case(4, dtype="bfloat16")
    streams = hidden_states(case.params, mx.array([[1, 2], [3, 4], [5, 6]]), case.config)
    assert streams.dtype == mx.bfloat16
    logits = logits_of(case.params, streams, case.config)
    assert logits.shape == (case.config.n_layers + 1, 3, 2, case.config.vocab_size)
    assert logits.dtype == mx.bfloat16
    assert logits_of(case.params, streams[0, 0], case.config).shape == (2, case.config.vocab_size)


def test_they_have_gradients() -> None:
    """A step along the gradient of one layer's stream raises what it is the gradient of."""
    case, _ = random_case(5)
    config, tokens = case.config, mx.array([[1, 2, 3, 4]])

    def logit(params: Params) -> mx.array:
        return logits_of(params, hidden_states(params, tokens, config)[1], config)[0, -1, 5]

    before, gradients = mx.value_and_grad(logit)(case.params)
    wte = case.params["transformer"]["wte"]["weight"]
    slope = gradients["transformer"]["wte"]["weight"]
    step = 1e-3 / mx.linalg.norm(slope)
    transformer = {**case.params["transformer"], "wte": {"weight": wte + step * slope}}
    moved = cast(Params, {**case.params, "transformer": transformer})
    rise = (logit(moved) - before).item()
    np.testing.assert_allclose(rise, 1e-3 * mx.linalg.norm(slope).item(), rtol=0.05)


CONFIG = Config(d_model=8, n_heads=2, n_layers=2, vocab_size=11, dtype="float32")


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ([[1, 2]], "a list"),
        (mx.array([1, 2]), "mlx.core.int32 [2]"),
        (mx.array([[1.0]]), "mlx.core.float32 [1, 1]"),
        (mx.zeros((0, 3), mx.int32), "mlx.core.int32 [0, 3]"),
        (mx.zeros((1, 0), mx.int32), "mlx.core.int32 [1, 0]"),
    ],
)
def test_tokens_that_are_none(tokens: Any, found: str) -> None:
    with pytest.raises(InputError) as error:
        hidden_states(init_params(CONFIG, mx.random.key(0)), tokens, CONFIG)
    assert str(error.value).startswith(f"tokens is {found} where ")


@pytest.mark.parametrize(
    ("streams", "found"),
    [
        (mx.zeros((8,)), "mlx.core.float32 [8]"),
        (mx.zeros((1, 8), mx.int32), "mlx.core.int32 [1, 8]"),
        (mx.zeros((1, 1, 9)), "mlx.core.float32 [1, 1, 9]"),
    ],
)
def test_streams_that_are_none(streams: Any, found: str) -> None:
    with pytest.raises(InputError) as error:
        logits_of(init_params(CONFIG, mx.random.key(0)), streams, CONFIG)
    assert str(error.value) == f"streams is {found} where floats [… time 8] are expected."


def test_a_tree_of_another_model_is_refused() -> None:
    params = init_params(CONFIG, mx.random.key(0))
    with pytest.raises(CheckpointError, match=r"transformer\.blocks\.2.* is missing"):
        hidden_states(params, mx.array([[1]]), replace(CONFIG, n_layers=3))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is"):
        logits_of(params, mx.zeros((1, 1, 8)), replace(CONFIG, vocab_size=12))
