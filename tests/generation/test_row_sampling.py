"""Sampling for rows of different requests: each gets what it would get alone, whatever the others ask for."""

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dbrx_fn.generation.row_sampling import (
    Choice,
    Steps,
    biases,
    packed,
    row_numbers,
    sample_rows,
    steps_of,
    take_numbers,
)
from dbrx_fn.generation.sampling import History, Sampling, apply_min_p, apply_top_k, apply_top_p, init_history, sample

VOCAB = 50
LOGITS = mx.array(np.random.default_rng(0).normal(0, 2, (4, VOCAB)), mx.float32)
MIXED = [
    Sampling(),
    Sampling(temperature=0.7, top_k=5),
    Sampling(temperature=1.3, top_p=0.8, min_p=0.02, frequency_penalty=0.4),
    Sampling(temperature=1.0, repetition_penalty=1.4, presence_penalty=0.3, logit_bias=((3, 2.0), (9, -math.inf))),
]
SEEDS = [1, 2, 3, 4]


def history_of(rows: int) -> History:
    history = init_history([[1, 2, 3]] * rows, VOCAB)
    history["made"] = mx.array(np.random.default_rng(1).integers(0, 2, (1, VOCAB)).repeat(rows, 0), mx.int32)
    return history


def choose(
    logits: mx.array,
    samplings: list[Sampling],
    seeds: list[int],
    positions: list[int],
    *,
    allowed: NDArray[np.bool_] | None = None,
    top_logprobs: int | None = None,
    steps: Steps | None = None,
) -> Choice:
    chosen, _ = sample_rows(
        logits,
        row_numbers(list(zip(samplings, seeds, strict=True)), VOCAB),
        mx.array(positions, mx.int32),
        history_of(len(samplings)),
        biases(samplings, VOCAB),
        None if allowed is None else mx.array(packed(allowed)),
        steps=steps or steps_of(samplings, top_logprobs),
    )
    return chosen


@settings(max_examples=40)
@given(order=st.permutations(range(4)), position=st.integers(0, 1000))
def test_a_rows_token_is_what_it_would_be_alone(order: list[int], position: int) -> None:
    together = choose(
        LOGITS[mx.array(order)],
        [MIXED[row] for row in order],
        [SEEDS[row] for row in order],
        [position + row for row in order],
        top_logprobs=3,
    )
    assert together.logprobs is not None
    for place, row in enumerate(order):
        alone = choose(LOGITS[row : row + 1], [MIXED[row]], [SEEDS[row]], [position + row], top_logprobs=3)
        assert alone.logprobs is not None
        pairs = zip((together.tokens, *together.logprobs), (alone.tokens, *alone.logprobs), strict=True)
        for one, other in pairs:
            assert np.array_equal(np.array(one)[place], np.array(other)[0])


def test_a_step_that_a_row_does_not_need_changes_none_of_its_bits() -> None:
    plain = [Sampling(), Sampling(temperature=0.7)] * 2
    few = choose(LOGITS, plain, SEEDS, [0] * 4, steps=Steps(draws=True))
    all_steps = choose(LOGITS, plain, SEEDS, [0] * 4, steps=Steps(draws=True, filters=True, top_logprobs=5))
    assert few.tokens.tolist() == all_steps.tokens.tolist()


@settings(max_examples=60)
@given(
    top_k=st.integers(0, VOCAB + 5),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 2**64 - 1),
)
def test_only_what_the_filters_leave_is_drawn(top_k: int, top_p: float, min_p: float, seed: int) -> None:
    sampling = Sampling(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    left = LOGITS
    if 0 < top_k < VOCAB:
        left = apply_top_k(left, k=top_k)
    if top_p < 1:
        left = apply_top_p(left, mx.array(top_p))
    if min_p:
        left = apply_min_p(left, mx.array(min_p))
    numbers = row_numbers([(sampling, seed)] * 4, VOCAB)
    for position in range(5):
        chosen, _ = sample_rows(
            LOGITS, numbers, mx.full(4, position, mx.int32), None, None, None, steps=steps_of([sampling])
        )
        kept = mx.take_along_axis(left, chosen.tokens[:, None], axis=-1)
        assert (kept > -math.inf).all().item()


def test_draws_have_the_softmaxs_shares() -> None:
    rows = 20_000
    logits = mx.broadcast_to(LOGITS[:1, :6], (rows, 6))
    numbers = row_numbers([(Sampling(temperature=1.0), seed) for seed in range(rows)], 6)
    expected = np.array(mx.softmax(LOGITS[0, :6]))
    for position in (0, 1):
        chosen, _ = sample_rows(
            logits, numbers, mx.full(rows, position, mx.int32), None, None, None, steps=Steps(draws=True)
        )
        shares = np.bincount(np.array(chosen.tokens), minlength=6) / rows
        np.testing.assert_allclose(shares, expected, atol=4 * math.sqrt(0.25 / rows))


def test_seeds_and_positions_draw_independently() -> None:
    """Seed 3 at position 1 doesn't draw what seed 4 draws at position 0, nor does a seed repeat itself."""
    rows = 2000
    logits = mx.zeros((rows, VOCAB))

    def drawn(first_seed: int, position: int) -> NDArray[np.int32]:
        numbers = row_numbers([(Sampling(temperature=1.0), first_seed + row) for row in range(rows)], VOCAB)
        at = mx.full(rows, position, mx.int32)
        return np.array(sample_rows(logits, numbers, at, None, None, None, steps=Steps(draws=True))[0].tokens)

    for one, other in ((drawn(0, 1), drawn(1, 0)), (drawn(0, 0), drawn(0, 1)), (drawn(0, 0), drawn(2**32, 0))):
        assert abs((one == other).mean() - 1 / VOCAB) < 4 * math.sqrt(1 / VOCAB / rows)


def test_a_greedy_row_is_as_sample_says() -> None:
    history = history_of(4)
    for sampling in (Sampling(), Sampling(repetition_penalty=1.7, presence_penalty=0.5, frequency_penalty=0.9)):
        expected, _, _ = sample(LOGITS, mx.random.key(0), history, sampling=sampling)
        assert choose(LOGITS, [sampling] * 4, SEEDS, [0] * 4).tokens.tolist() == expected.tolist()


def test_masked_tokens_are_never_chosen() -> None:
    allowed = np.zeros((4, VOCAB), bool)
    allowed[:, [7, 33, VOCAB - 1]] = True
    for position in range(20):
        chosen = choose(LOGITS, MIXED, SEEDS, [position] * 4, allowed=allowed)
        assert set(np.array(chosen.tokens)) <= {7, 33, VOCAB - 1}


def test_a_row_without_any_allowed_token_has_none() -> None:
    allowed = np.ones((4, VOCAB), bool)
    allowed[2] = False
    assert choose(LOGITS, MIXED, SEEDS, [0] * 4, allowed=allowed).tokens[2].item() == VOCAB


def test_logits_that_are_not_finite_give_no_token() -> None:
    logits = mx.where(mx.arange(4)[:, None] == 1, math.nan, LOGITS)
    chosen = choose(logits, [Sampling()] * 4, SEEDS, [0] * 4).tokens
    assert [token == VOCAB for token in np.array(chosen)] == [False, True, False, False]


def test_logprobs_are_the_models_own() -> None:
    """Before temperature, bias and penalties, as the log-likelihoods of a text are."""
    chosen = choose(LOGITS, MIXED, SEEDS, [0] * 4, top_logprobs=4)
    exact = np.array(LOGITS, np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    assert chosen.logprobs is not None
    of_chosen, top_tokens, top = chosen.logprobs
    np.testing.assert_allclose(of_chosen, exact[np.arange(4), np.array(chosen.tokens)], atol=1e-6)
    np.testing.assert_array_equal(top_tokens, np.argsort(-exact, axis=1)[:, :4])
    np.testing.assert_allclose(top, -np.sort(-exact, axis=1)[:, :4], atol=1e-6)


def test_history_counts_each_rows_token() -> None:
    numbers = row_numbers([(Sampling(), 0)] * 4, VOCAB)
    history = init_history([[1]] * 4, VOCAB)
    chosen, after = sample_rows(LOGITS, numbers, mx.zeros(4, mx.int32), history, None, None, steps=Steps())
    assert after is not None
    assert after["made"].sum(axis=1).tolist() == [1] * 4
    assert mx.take_along_axis(after["made"], chosen.tokens[:, None], axis=1).tolist() == [[1]] * 4


@given(st.data())
def test_bits_are_packed_and_unpacked(data: Any) -> None:
    vocab = data.draw(st.integers(1, 130))
    allowed = np.array(data.draw(st.lists(st.booleans(), min_size=vocab, max_size=vocab)))[None]
    words = packed(allowed)
    assert words.shape == (1, -(-vocab // 32))
    logits = mx.arange(vocab)[None].astype(mx.float32)
    numbers = row_numbers([(Sampling(), 0)], vocab)
    chosen, _ = sample_rows(logits, numbers, mx.zeros(1, mx.int32), None, None, mx.array(words), steps=Steps())
    assert chosen.tokens.item() == (np.flatnonzero(allowed[0])[-1] if allowed.any() else vocab)


def test_numbers_of_rows_can_be_taken() -> None:
    numbers = row_numbers(list(zip(MIXED, SEEDS, strict=True)), VOCAB)
    taken = take_numbers(numbers, mx.array([2, 0]))
    expected = row_numbers([(MIXED[2], SEEDS[2]), (MIXED[0], SEEDS[0])], VOCAB)
    for name, array in expected.items():
        assert taken[name].tolist() == array.tolist()  # type: ignore[literal-required, attr-defined]


@pytest.mark.parametrize("mixed", [MIXED, list(reversed(MIXED))])
def test_another_mix_is_no_trace(mixed: list[Sampling], caplog: pytest.LogCaptureFixture) -> None:
    choose(LOGITS, MIXED, SEEDS, [0] * 4)
    with caplog.at_level("DEBUG", logger="dbrx_fn.compile"):
        choose(LOGITS, mixed, SEEDS, [5] * 4)
    assert not caplog.records
