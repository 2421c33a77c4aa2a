"""Choosing tokens: each step against its formula in NumPy, the whole by the tokens that it draws."""

import math
from collections.abc import Callable
from typing import Any

import hypothesis.extra.numpy as hnp
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from numpy.typing import NDArray

from dbrx_fn.errors import InputError
from dbrx_fn.generation.sampling import (
    History,
    Sampling,
    apply_frequency_penalty,
    apply_logit_bias,
    apply_min_p,
    apply_presence_penalty,
    apply_repetition_penalty,
    apply_top_k,
    apply_top_p,
    init_history,
    sample,
)

Floats = NDArray[np.float32]

BATCH, VOCAB = 3, 9
# Quarters, so that ties are common, sums exact, and no comparison a matter of rounding.
quarters = st.integers(-32, 32).map(lambda n: n / 4)
all_logits = hnp.arrays(np.float32, (BATCH, VOCAB), elements=quarters)
all_counts = hnp.arrays(np.int32, (BATCH, VOCAB), elements=st.integers(0, 3))
KEY = mx.random.key(0)


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    probabilities: NDArray[np.float64] = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return probabilities


def assert_kept(actual: mx.array, logits: Floats, kept: NDArray[np.bool_]) -> None:
    """What is kept must be as it was, all else -inf."""
    np.testing.assert_array_equal(np.array(actual), np.where(kept, logits, -np.inf))


# Each step. A new value of a static option is a new kernel on the CPU, which takes half a second: so they are few.


@settings(max_examples=60)
@given(logits=all_logits, k=st.sampled_from([1, 2, 5, VOCAB]))
def test_top_k(logits: Floats, k: int) -> None:
    smallest = np.sort(logits, axis=-1)[:, -k][:, None]
    assert_kept(apply_top_k(mx.array(logits), k=k), logits, logits >= smallest)


@settings(max_examples=100)
@given(logits=all_logits, p=st.sampled_from([0.3, 0.7]))
@example(logits=np.zeros((BATCH, VOCAB), np.float32), p=0.7)
def test_top_p(logits: Floats, p: float) -> None:
    """The fewest tokens, likeliest first, that have p together; which of two equally likely ones is left open."""
    kept = np.isfinite(np.array(apply_top_p(mx.array(logits), mx.array(p))))
    assert_kept(apply_top_p(mx.array(logits), mx.array(p)), logits, kept)
    for row, probabilities, stays in zip(logits, softmax(logits), kept, strict=True):
        assert stays.any()
        descending = np.sort(probabilities)[::-1]
        sums = np.cumsum(descending)
        if np.abs(sums - p).min() < 1e-6:
            continue
        assert stays.sum() == 1 + np.searchsorted(sums, p)
        assert row[stays].min() >= row[~stays].max(initial=-np.inf)


@settings(max_examples=60)
@given(logits=all_logits, p=st.sampled_from([0.05, 0.4]))
def test_min_p(logits: Floats, p: float) -> None:
    probabilities = softmax(logits)
    least = p * probabilities.max(axis=-1, keepdims=True)
    assert_kept(apply_min_p(mx.array(logits), mx.array(p)), logits, probabilities >= least * (1 - 1e-6))


@settings(max_examples=60)
@given(logits=all_logits, counts=all_counts, penalty=st.just(2.0))
def test_repetition_penalty(logits: Floats, counts: NDArray[np.int32], penalty: float) -> None:
    seen = counts > 0
    expected = np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)
    actual = apply_repetition_penalty(mx.array(logits), mx.array(seen), mx.array(penalty))
    np.testing.assert_allclose(np.array(actual), expected, rtol=1e-6)


@settings(max_examples=60)
@given(logits=all_logits, counts=all_counts, penalty=st.just(-0.5))
def test_presence_and_frequency_penalty(logits: Floats, counts: NDArray[np.int32], penalty: float) -> None:
    presence = apply_presence_penalty(mx.array(logits), mx.array(counts), mx.array(penalty))
    np.testing.assert_array_equal(np.array(presence), logits - penalty * (counts > 0))
    frequency = apply_frequency_penalty(mx.array(logits), mx.array(counts), mx.array(penalty))
    np.testing.assert_array_equal(np.array(frequency), logits - penalty * counts)


@settings(max_examples=30)
@given(logits=all_logits, bias=st.sampled_from([((0, 1.5),), ((8, -2.0), (0, 0.25), (8, 3.0)), ((4, -math.inf),)]))
def test_logit_bias(logits: Floats, bias: tuple[tuple[int, float], ...]) -> None:
    expected = logits.copy()
    for token, amount in bias:
        expected[:, token] += amount
    tokens, biases = zip(*bias, strict=True)
    actual = apply_logit_bias(mx.array(logits), mx.array(tokens), mx.array(biases))
    np.testing.assert_array_equal(np.array(actual), expected)


@pytest.mark.parametrize(
    "step",
    [
        lambda logits: apply_top_k(logits, k=2),
        lambda logits: apply_top_p(logits, mx.array(0.7)),
        lambda logits: apply_min_p(logits, mx.array(0.4)),
        lambda logits: apply_logit_bias(logits, mx.array([0]), mx.array([1.5])),
    ],
)
def test_steps_take_float32_rows_only(step: Callable[[mx.array], mx.array]) -> None:
    for wrong in (mx.zeros(4), mx.zeros((1, 1, 4)), mx.zeros((1, 4), mx.int32)):
        with pytest.raises(TypeCheckError):
            step(wrong)


@pytest.mark.parametrize(
    "step",
    [
        lambda logits: apply_top_k(logits, k=2),
        lambda logits: apply_top_p(logits, mx.array(0.7)),
        lambda logits: apply_min_p(logits, mx.array(0.4)),
    ],
)
def test_excluded_tokens_stay_excluded(step: Callable[[mx.array], mx.array]) -> None:
    logits = mx.array([[-math.inf, 1.0, -math.inf, 1.5, 1.25]])
    out = np.array(step(logits))
    assert np.isneginf(out[0, [0, 2]]).all()
    assert out[0, 3] == 1.5
    assert not np.isnan(out).any()


# The whole


def drawn(
    logits: list[float], sampling: Sampling, draws: int = 20_000, history: History | None = None
) -> NDArray[np.float64]:
    """How often each token is drawn, as a part of all draws."""
    rows = mx.broadcast_to(mx.array(logits, mx.float32), (draws, len(logits)))
    tokens, _, _ = sample(rows, mx.random.key(1), history, sampling=sampling)
    assert tokens.dtype == mx.int32
    counts: NDArray[np.int64] = np.bincount(np.array(tokens), minlength=len(logits))
    return counts / draws


def assert_drawn_as(frequencies: NDArray[np.float64], probabilities: NDArray[np.float64], draws: int = 20_000) -> None:
    """Within five standard deviations each, and never what has no probability."""
    deviation = np.sqrt(probabilities * (1 - probabilities) / draws)
    assert (np.abs(frequencies - probabilities) <= 5 * deviation).all(), (frequencies, probabilities)


LOGITS = [0.0, 2.0, 1.0, -1.0, 1.75, -3.0, 0.5]


@settings(max_examples=40)
@given(logits=all_logits)
def test_temperature_0_takes_the_likeliest(logits: Floats) -> None:
    tokens, _, history = sample(mx.array(logits), KEY, None, sampling=Sampling())
    assert history is None
    np.testing.assert_array_equal(np.array(tokens), logits.argmax(axis=-1))
    others = Sampling(top_k=2, top_p=0.1, min_p=0.9)
    np.testing.assert_array_equal(np.array(sample(mx.array(logits), KEY, None, sampling=others)[0]), np.array(tokens))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_any_float_dtype_is_drawn_from(dtype: mx.Dtype) -> None:
    logits = mx.arange(64).astype(dtype)[None]
    tokens, _, _ = sample(logits, KEY, None, sampling=Sampling())
    assert tokens.tolist() == [63]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_draws_have_the_softmax_of_the_logits(temperature: float) -> None:
    frequencies = drawn(LOGITS, Sampling(temperature=temperature))
    assert_drawn_as(frequencies, softmax(np.array(LOGITS) / temperature))


def test_draws_of_each_filter() -> None:
    for sampling, kept in (
        (Sampling(temperature=1.0, top_k=3), [1, 2, 4]),
        (Sampling(temperature=1.0, top_p=0.65), [1, 4]),
        (Sampling(temperature=1.0, min_p=0.3), [1, 2, 4]),
        (Sampling(temperature=1.0, top_k=100), range(7)),
        (Sampling(temperature=1.0, logit_bias=((1, -math.inf), (3, 4.0))), [0, 2, 3, 4, 5, 6]),
    ):
        logits = np.full(7, -np.inf)
        logits[list(kept)] = np.array(LOGITS)[list(kept)]
        logits[3] += 4.0 if sampling.logit_bias else 0.0
        assert_drawn_as(drawn(LOGITS, sampling), softmax(logits))


def test_order_of_filters() -> None:
    """Top-p looks at probabilities after temperature and top-k, min-p at what is left."""
    hot = Sampling(temperature=4.0, top_p=0.7)
    assert (drawn(LOGITS, hot) > 0).sum() == 4
    after_top_k = Sampling(temperature=1.0, top_k=3, top_p=0.8)
    assert set(np.flatnonzero(drawn(LOGITS, after_top_k))) == {1, 4}


def test_penalties_come_before_temperature_and_bias_before_them() -> None:
    draws = 20_000
    seen = {"prompted": mx.zeros((draws, 7), mx.bool_), "made": mx.zeros((draws, 7), mx.int32)}
    history = History(prompted=seen["prompted"].at[:, 1].maximum(mx.array(True)), made=seen["made"].at[:, 4].add(2))
    sampling = Sampling(
        temperature=0.5,
        repetition_penalty=2.0,
        presence_penalty=0.25,
        frequency_penalty=0.125,
        logit_bias=((1, 1.0), (4, -2.0)),
    )
    expected = np.array(LOGITS)
    expected[1] = (2.0 + 1.0) / 2
    expected[4] = (1.75 - 2.0) * 2 - 0.25 - 2 * 0.125
    assert_drawn_as(drawn(LOGITS, sampling, draws, history), softmax(expected / 0.5))


def test_keys() -> None:
    logits = mx.zeros((1, 1000))
    sampling = Sampling(temperature=1.0)
    first, next_key, _ = sample(logits, mx.random.key(3), None, sampling=sampling)
    again, same_key, _ = sample(logits, mx.random.key(3), None, sampling=sampling)
    assert first.tolist() == again.tolist()
    assert next_key.tolist() == same_key.tolist() != mx.random.key(3).tolist()
    assert next_key.dtype == mx.uint32
    seeds = {sample(logits, mx.random.key(seed), None, sampling=sampling)[0].item() for seed in range(50)}
    assert len(seeds) > 40
    chain = []
    key = mx.random.key(0)
    for _ in range(50):
        token, key, _ = sample(logits, key, None, sampling=sampling)
        chain.append(token.item())
    assert len(set(chain)) > 40


def test_rows_are_drawn_apart() -> None:
    tokens, _, _ = sample(mx.zeros((50, 1000)), KEY, None, sampling=Sampling(temperature=1.0))
    assert len(set(np.array(tokens).tolist())) > 40


def test_coldest_temperature_takes_the_likeliest() -> None:
    """Logits divided by so little are past float32, where all positive ones would be equally likely."""
    assert drawn([-1.0, 1.0, 2.0, 0.0], Sampling(temperature=1e-40), 100).tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("more", [{}, {"top_p": 0.7}, {"min_p": 0.3}, {"top_k": 3}])
def test_infinite_bias_forces(more: dict[str, Any]) -> None:
    sampling = Sampling(temperature=1.0, logit_bias=((5, math.inf),), **more)
    assert drawn(LOGITS, sampling, 100).tolist() == [0, 0, 0, 0, 0, 1, 0]


FAULTS = {"nan": math.nan, "inf": math.inf, "nothing left": -math.inf}


@settings(max_examples=60)
@given(
    logits=all_logits,
    fault=st.sampled_from(sorted(FAULTS)),
    row=st.integers(0, BATCH - 1),
    column=st.integers(0, VOCAB - 1),
    temperature=st.sampled_from([0.0, 1.0]),
    penalty=st.sampled_from([0.0, 0.5]),
)
def test_rows_that_cannot_be_chosen_from_get_a_token_past_the_vocabulary(
    logits: Floats, fault: str, row: int, column: int, temperature: float, penalty: float
) -> None:
    """And the rows beside them the tokens that they would have had; the history counts nothing outside itself."""
    sampling = Sampling(temperature=temperature, presence_penalty=penalty)
    history = init_history([[0]] * BATCH, VOCAB) if penalty else None
    expected = np.array(sample(mx.array(logits), KEY, history, sampling=sampling)[0])
    broken = logits.copy()
    broken[row, slice(None) if fault == "nothing left" else column] = FAULTS[fault]
    tokens, _, after = sample(mx.array(broken), KEY, history, sampling=sampling)
    expected[row] = VOCAB
    np.testing.assert_array_equal(np.array(tokens), expected)
    if after is not None:
        assert np.array(after["made"]).sum(axis=1).tolist() == [1] * BATCH


@settings(max_examples=60)
@given(logits=all_logits, bias=st.sampled_from([-math.inf, -1e39, -1e20, 1e20, 1e39, math.inf]), data=st.data())
def test_numbers_at_the_edge_never_make_logits_that_are_not_finite(
    logits: Floats, bias: float, data: st.DataObject
) -> None:
    edge = [1e-6, 1.0, 1e6]
    sampling = Sampling(
        temperature=data.draw(st.sampled_from([0.0, 1e-20, 1.0, 1e20])),
        repetition_penalty=data.draw(st.sampled_from(edge)),
        presence_penalty=data.draw(st.sampled_from([-1e20, 0.0, 1e20])),
        frequency_penalty=data.draw(st.sampled_from([-1e20, 0.0, 1e20])),
        logit_bias=((2, bias),),
    )
    history: History | None = init_history([[1, 2]] * BATCH, VOCAB)
    key = KEY
    for _ in range(3):
        tokens, key, history = sample(mx.array(logits), key, history, sampling=sampling)
        assert (np.array(tokens) < VOCAB).all()


# History


def test_history_begins_with_the_prompts() -> None:
    history = init_history([[1, 3, 3], [0]], 5)
    assert history["prompted"].tolist() == [[False, True, False, True, False], [True, False, False, False, False]]
    assert history["made"].tolist() == [[0] * 5] * 2
    assert (history["prompted"].dtype, history["made"].dtype) == (mx.bool_, mx.int32)


def test_history_counts_what_is_made() -> None:
    history: History | None = init_history([[0], [0]], 4)
    sampling = Sampling(presence_penalty=0.5)
    key = KEY
    for rows in ([1, 2], [1, 3], [1, 2]):
        logits = mx.zeros((2, 4)).at[mx.arange(2), mx.array(rows)].add(10.0)
        tokens, key, history = sample(logits, key, history, sampling=sampling)
        assert tokens.tolist() == rows
    assert history is not None
    assert history["made"].tolist() == [[0, 3, 0, 0], [0, 0, 2, 1]]
    assert history["prompted"].tolist() == [[True, False, False, False]] * 2


@pytest.mark.parametrize(
    ("sampling", "of_prompt"),
    [
        (Sampling(repetition_penalty=1.5), True),
        (Sampling(presence_penalty=0.4), False),
        (Sampling(frequency_penalty=0.4), False),
    ],
)
def test_only_repetition_counts_the_prompt(sampling: Sampling, of_prompt: bool) -> None:
    """Token 0 leads by so little that the smallest penalty takes it behind token 1."""
    logits = mx.array([[1.0, 0.9, 0.0]])
    prompted, history = init_history([[0]], 3), init_history([[]], 3)
    assert sample(logits, KEY, prompted, sampling=sampling)[0].item() == int(of_prompt)
    token, key, after = sample(logits, KEY, history, sampling=sampling)
    assert token.item() == 0
    assert sample(logits, key, after, sampling=sampling)[0].item() == 1


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), False),
        (Sampling(temperature=1.0, top_k=5, top_p=0.5, min_p=0.1, logit_bias=((0, 1.0),)), False),
        (Sampling(repetition_penalty=1.1), True),
        (Sampling(presence_penalty=-0.1), True),
        (Sampling(frequency_penalty=0.1), True),
    ],
)
def test_history_is_used_for_penalties_only(sampling: Sampling, expected: bool) -> None:
    assert sampling.uses_history == expected


# What can't work


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("temperature", value) for value in (-1.0, -1e-9, math.nan, math.inf)),
        ("top_k", -1),
        *(("top_p", value) for value in (0.0, -0.5, 1.01, math.nan)),
        *(("min_p", value) for value in (-0.1, 1.01, math.nan)),
        *(("repetition_penalty", value) for value in (0.0, -1.0, math.nan, math.inf)),
        *(("presence_penalty", value) for value in (math.nan, math.inf, -math.inf)),
        *(("frequency_penalty", value) for value in (math.nan, math.inf)),
        *(("temperature", value) for value in (1e21, 1e39, "warm", None)),
        *(("top_k", value) for value in (2.5, 3.0, "3")),
        *(("repetition_penalty", value) for value in (1e-7, 1e7)),
        *(("presence_penalty", value) for value in (1e21, -1e21)),
        ("logit_bias", ((1.5, 1.0),)),
        ("logit_bias", ((1, "x"),)),
        ("logit_bias", (1, 2)),
        ("logit_bias", 5),
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", ((0, 1.0), (1, math.nan))),
    ],
)
def test_values_that_cannot_work(option: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        Sampling(**{option: value})
    assert str(caught.value).startswith(f"{option} is {value!r} where it must be ")
    assert str(caught.value).endswith(".")


def test_values_at_the_edge_work() -> None:
    sampling = Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=1.0, repetition_penalty=0.5)
    assert hash(sampling) == hash(Sampling(min_p=1.0, repetition_penalty=0.5))
    assert (drawn(LOGITS, Sampling(temperature=1.0, min_p=1.0), 100) > 0).tolist() == [n == 1 for n in range(7)]
