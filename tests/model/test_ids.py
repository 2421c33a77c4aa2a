"""An id outside of the vocabulary reads and writes nothing: its row of the batch is NaN, and every other as it was."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from dbrx_fn.checkpoints.config_file import config_from_dict
from dbrx_fn.errors import CacheError, InputError
from dbrx_fn.generation.sampling import apply_logit_bias, init_history
from dbrx_fn.model.cache import Cache, init_cache
from dbrx_fn.model.config import Config, Dtype
from dbrx_fn.model.quantization import Quantization, quantize
from dbrx_fn.model.transformer import forward, score
from dbrx_fn.model.tree import Params
from dbrx_fn.ops.experts import mix_any_experts
from dbrx_fn.ops.formats import Format
from dbrx_fn.training.losses import loss
from tests.support import checkpoints
from tests.support.trees import tree

RAW = checkpoints.QUANTIZABLE
VOCAB = RAW["vocab_size"]
FORMS: dict[str, Format | None] = {"dense": None, "affine": Format(4, 64), "mxfp4": Format(4, 32, "mxfp4")}

# The third and the fifth are ids of the vocabulary in the lowest 32 bits.
OUTSIDE = [
    (-1, mx.int32),
    (VOCAB, mx.int32),
    (2**32 + 3, mx.int64),
    (5_000_000, mx.int32),
    (-(2**32) + 1, mx.int64),
    (-(2**31), mx.int32),
    (2**31 - 1, mx.int32),
    (2**32 - 1, mx.uint32),
    (2**63, mx.uint64),
    (-100, mx.int8),
    (255, mx.uint8),
]
outside = pytest.mark.parametrize(("strange", "kind"), OUTSIDE, ids=str)


def model(form: str = "dense", dtype: Dtype = "float32") -> tuple[Params, Config]:
    config = replace(config_from_dict(RAW), dtype=dtype)
    params = tree(config, checkpoints.random_tensors(RAW, np.random.default_rng(0)))
    quantized = FORMS[form]
    if quantized is None:
        return params, config
    return quantize(params, config, Quantization(*(quantized,) * 5)), config


def ids(rows: int, time: int, seed: int = 1) -> list[list[int]]:
    drawn: list[list[int]] = np.random.default_rng(seed).integers(VOCAB, size=(rows, time)).tolist()
    return drawn


def array(rows: list[list[int]], kind: mx.Dtype) -> mx.array:
    return mx.array(np.array([[one % 2**64 for one in row] for row in rows], np.uint64)).astype(kind)


def same_bits(one: mx.array, other: mx.array) -> bool:
    return (
        one.dtype == other.dtype
        and np.array(one.astype(mx.float32)).tobytes() == np.array(other.astype(mx.float32)).tobytes()
    )


def is_nan(array: mx.array) -> bool:
    return bool(mx.isnan(array).all())


@pytest.mark.parametrize("time", [1, 2, 9, 40])
@pytest.mark.parametrize("capacity", [0, 64])
@outside
def test_its_row_is_nan_and_the_others_are_what_they_were(
    strange: int, kind: mx.Dtype, capacity: int, time: int
) -> None:
    params, config = model()
    known = ids(3, time)
    expected, _ = forward(params, mx.array(known), init_cache(config, 3, capacity))
    for place in {0, time // 2, time - 1}:
        given_ids = [list(row) for row in known]
        given_ids[1][place] = strange
        logits, _ = forward(params, array(given_ids, kind), init_cache(config, 3, capacity))
        assert is_nan(logits[1])
        for row in (0, 2):
            # Of long segments a BLAS may round a row by its place, as in any other batch.
            assert same_bits(logits[row], expected[row]) or time == 40
            np.testing.assert_allclose(np.array(logits[row]), np.array(expected[row]), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_so_it_is_in_every_format_and_for_all_that_continues(form: str, dtype: Dtype) -> None:
    params, config = model(form, dtype)
    known = ids(2, 12)
    given_ids = [known[0], [*known[1][:4], VOCAB + 7, *known[1][5:]]]

    def run(rows: list[list[int]]) -> list[mx.array]:
        logits, cache = forward(params, mx.array(rows), init_cache(config, 2, 64), last_only=True)
        made = [logits]
        for token in (3, 5):
            logits, cache = forward(params, mx.full((2, 1), token, mx.int32), cache)
            made.append(logits)
        chunked, _ = forward(params, mx.array(rows), init_cache(config, 2, 64), last_only=True, chunk_size=8)
        return [*made, chunked, score(params, mx.array(rows), config)[0]]

    for found, expected in zip(run(given_ids), run(known), strict=True):
        assert same_bits(found[0], expected[0])
        assert is_nan(found[1])
        assert not mx.isnan(expected).any()


@given(data=st.data())
def test_exactly_the_rows_that_hold_one_are_nan(data: st.DataObject) -> None:
    params, config = model()
    rows, time = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 10))
    id_ = st.integers(0, VOCAB - 1) | st.integers(-(2**63), 2**63 - 1)
    drawn = data.draw(st.lists(st.lists(id_, min_size=time, max_size=time), min_size=rows, max_size=rows))
    logits, _ = score(params, mx.array(drawn, mx.int64), config)
    for row, found in zip(drawn, logits, strict=True):
        assert is_nan(found) == any(not 0 <= one < VOCAB for one in row)
        assert is_nan(found) == bool(mx.isnan(found).any())


@pytest.mark.parametrize("padding", [-1, -100, VOCAB, 5_000_000, 7])
@pytest.mark.parametrize("capacity", [0, 64])
def test_padding_may_hold_anything(capacity: int, padding: int) -> None:
    params, config = model()
    lengths = [5, 0, 12]

    def run(behind: int) -> tuple[mx.array, Cache]:
        rows = [row[:length] + [behind] * (12 - length) for row, length in zip(ids(3, 12), lengths, strict=True)]
        return forward(params, mx.array(rows), init_cache(config, 3, capacity), lengths=lengths)

    (found, cache), (expected, _) = run(padding), run(0)
    for row, length in enumerate(lengths):
        assert same_bits(found[row, :length], expected[row, :length])
    assert not mx.isnan(found).any()
    if capacity:
        logits, _ = forward(params, mx.array([[1], [2], [3]]), cache)
        assert not mx.isnan(logits).any()
        # A row that gets no token in a step of one token a row.
        logits, _ = forward(params, mx.array([[1], [padding], [3]]), cache, lengths=[1, 0, 1])
        assert not mx.isnan(logits[::2]).any()


@outside
@pytest.mark.parametrize("place", [0, 5, 11])
def test_a_loss_is_nan(place: int, strange: int, kind: mx.Dtype) -> None:
    params, config = model()
    rows = ids(2, 12)
    rows[1][place] = strange
    value, grads = mx.value_and_grad(lambda params: loss(params, array(rows, kind), None, config)[0])(params)
    mx.eval(grads)
    assert is_nan(value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("padding", [-1, -100, VOCAB, 5_000_000])
def test_padding_is_in_no_loss_and_no_gradient(padding: int, dtype: Dtype) -> None:
    params, config = model(dtype=dtype)
    lengths = mx.array([5, 12, 1], mx.int32)

    def run(behind: int) -> Any:
        rows = [row[:length] + [behind] * (12 - length) for row, length in zip(ids(3, 12), (5, 12, 1), strict=True)]

        def objective(params: Params) -> mx.array:
            return loss(params, mx.array(rows), None, config, lengths=lengths)[0]

        return mx.value_and_grad(objective)(params)

    (found, grads), (expected, expected_grads) = run(padding), run(0)
    assert same_bits(found, expected)
    assert not mx.isnan(found)
    others: dict[str, mx.array] = dict(tree_flatten(expected_grads))
    for path, one in dict(tree_flatten(grads)).items():
        assert same_bits(one, others[path]), path


@pytest.mark.parametrize("strange", [-1, 4, 5_000_000])
def test_an_expert_that_isnt_there_makes_its_token_nan(strange: int) -> None:
    params, config = model()
    experts = params["transformer"]["blocks"][0]["ffn"]["experts"]["mlp"]
    for tokens in (1, 3, 200):
        x = mx.random.normal((tokens, config.d_model), key=mx.random.key(0))
        weights = mx.full((tokens, 2), 0.5)
        chosen = [[n % 4, (n + 1) % 4] for n in range(tokens)]
        expected = mix_any_experts(experts, x, weights, mx.array(chosen), activation="silu")
        chosen[0][1] = strange
        found = mix_any_experts(experts, x, weights, mx.array(chosen), activation="silu")
        assert is_nan(found[0])
        assert np.allclose(np.array(found[1:]), np.array(expected[1:]), atol=1e-6)


def test_biases_and_histories_hold_only_ids_that_there_are() -> None:
    logits = mx.zeros((2, VOCAB))
    biased = apply_logit_bias(logits, mx.array([3, VOCAB, -1, 5_000_000], mx.int32), mx.array([1.0, 9.0, 9.0, 9.0]))
    assert mx.array_equal(biased, mx.where(mx.arange(VOCAB) == 3, mx.array(1.0), mx.array(0.0)) + logits)
    for strange in (-1, VOCAB, 5_000_000_000):
        with pytest.raises(InputError, match=f"A prompt holds token {strange}, outside of the vocabulary of {VOCAB}"):
            init_history([[1], [2, strange]], VOCAB)


@pytest.mark.parametrize("lengths", [(-1,), (-5_000_000,), (17,), (5_000_000,)])
def test_a_cache_that_claims_positions_it_hasnt_is_refused(lengths: tuple[int]) -> None:
    params, config = model()
    cache = replace(init_cache(config, 1, 16), lengths=lengths)
    with pytest.raises(CacheError, match="Row 0 of the cache holds"):
        forward(params, mx.array([[1]]), cache)
