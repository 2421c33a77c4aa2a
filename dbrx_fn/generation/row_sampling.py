"""Sampling for rows of different requests, each with its own settings, in one compiled function.

A row's token depends only on its own logits, settings, seed and position, never on the other rows: a step that one row
needs leaves the others' logits unchanged, bit for bit. So a batch can mix any requests. Only the set of steps (`Steps`)
is compiled in.

The steps and their order are those of `dbrx_fn.generation.sampling`. The draws differ: each row draws an array of shape
`[vocab]`, with a key made from its seed and position.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict, cast

import mlx.core as mx
import numpy as np
from jaxtyping import Float, Float32, Int32
from numpy.typing import NDArray

from dbrx_fn.generation.sampling import COLDEST, LARGEST, Allowed, History, Sampling, apply_allowed, random_key
from dbrx_fn.runtime.compile import compiled

Numbers = Float32[mx.array, " batch"]


class RowNumbers(TypedDict):
    """The requests' settings, with one entry per row.

    `keys`: uint32 `[batch 2]`, made from the seeds.
    `temperatures`: float32 `[batch]`; 0 takes the most likely token.
    `top_k`: int32 `[batch]`; the vocabulary's size means all.
    `top_p`, `min_p`, `repetition`, `presence`, `frequency`: float32 `[batch]`, as in `Sampling`.
    """

    keys: mx.array
    temperatures: mx.array
    top_k: mx.array
    top_p: mx.array
    min_p: mx.array
    repetition: mx.array
    presence: mx.array
    frequency: mx.array


@dataclass(frozen=True)
class Steps:
    """The steps that any row of a batch needs. Each set of steps is one compiled function.

    `draws`: whether a row has a temperature.
    `filters`: whether a drawing row has a top_k, top_p or min_p.
    `top_logprobs`: number of most likely tokens with log-probabilities. 0 means only the chosen token's, `None` none.
    """

    draws: bool = False
    filters: bool = False
    top_logprobs: int | None = None


class RowLogprobs(NamedTuple):
    """Log-probabilities (natural) by the model's own logits, before bias, penalties, mask and temperature.

    `chosen`: float32 `[rows]`, each row's token's.
    `top_tokens`, `top`: int32 and float32 `[rows top]`, the most likely tokens and their log-probabilities, in order.
    """

    chosen: mx.array
    top_tokens: mx.array
    top: mx.array


class Choice(NamedTuple):
    """Each row's choice.

    `tokens`: int32 `[batch]`. If logits aren't usable it is the vocabulary's size, which is no token (as in `sample`).
    `logprobs`: `None` if not wanted.
    """

    tokens: mx.array
    logprobs: RowLogprobs | None


def row_numbers(requests: Sequence[tuple[Sampling, int]], vocab_size: int) -> RowNumbers:
    """The settings of requests, from one `Sampling` and seed per row.

    Raises:
        InputError: if a seed is negative or doesn't fit into 64 bits.
    """
    samplings = [sampling for sampling, _ in requests]

    def numbers(name: str) -> mx.array:
        return mx.array([getattr(sampling, name) for sampling in samplings], mx.float32)

    return {
        "keys": mx.stack([random_key(seed) for _, seed in requests]),
        "temperatures": mx.array([s.temperature and max(s.temperature, COLDEST) for s in samplings], mx.float32),
        "top_k": mx.array([min(s.top_k or vocab_size, vocab_size) for s in samplings], mx.int32),
        "top_p": numbers("top_p"),
        "min_p": numbers("min_p"),
        "repetition": numbers("repetition_penalty"),
        "presence": numbers("presence_penalty"),
        "frequency": numbers("frequency_penalty"),
    }


def steps_of(samplings: Iterable[Sampling], top_logprobs: int | None = None) -> Steps:
    """The steps that these settings need together."""
    drawn = [sampling for sampling in samplings if sampling.temperature]
    filters = any(sampling.top_k or sampling.top_p < 1 or sampling.min_p for sampling in drawn)
    return Steps(bool(drawn), filters, top_logprobs)


def biases(samplings: Sequence[Sampling], vocab_size: int) -> mx.array | None:
    """The logit biases, float32 `[batch vocab]`, or `None` if no row has any."""
    if not any(sampling.logit_bias for sampling in samplings):
        return None
    added = np.zeros((len(samplings), vocab_size), np.float32)
    for row, sampling in enumerate(samplings):
        for token, bias in sampling.logit_bias:
            added[row, token] += min(bias, LARGEST)
    return mx.array(added)


def take_numbers(numbers: RowNumbers, rows: mx.array) -> RowNumbers:
    """The settings of the rows in `rows`, int32 `[chosen]`, in this order."""
    taken = {name: mx.take(cast(mx.array, array), rows, axis=0) for name, array in numbers.items()}
    return cast(RowNumbers, taken)


@compiled
def sample_rows(
    logits: Float[mx.array, "batch vocab"],
    numbers: RowNumbers,
    positions: Int32[mx.array, " batch"],
    history: History | None,
    bias: Float32[mx.array, "batch vocab"] | None,
    allowed: Allowed | None,
    *,
    steps: Steps,
) -> tuple[Choice, History | None]:
    """Chooses each row's next token.

    Args:
        logits: of any float dtype. The computation is in float32.
        numbers: each row's settings.
        positions: number of tokens that each row has generated. Together with the seed it determines the draw.
        history: the tokens so far, for penalties; `None` if no row has penalties.
        bias: added to the logits; `None` if no row has any.
        allowed: the tokens to choose from, as in `apply_allowed`. `None` for all.
        steps: the steps that the rows need together.

    Returns:
        The choice, and the history with it.
    """
    own = logits.astype(mx.float32)
    logits = own
    if bias is not None:
        logits = logits + bias
    if history is not None:
        logits = _penalized(logits, numbers, history)
    if allowed is not None:
        logits = apply_allowed(logits, allowed)
    # On every back end the maximum is NaN if a logit is. On some, argmax overlooks NaN.
    usable = mx.abs(logits.max(axis=-1)) < math.inf
    tokens = logits.argmax(axis=-1).astype(mx.int32)
    if steps.draws:
        greedy = numbers["temperatures"] == 0
        cooled = logits / mx.where(greedy, 1, numbers["temperatures"])[:, None]
        if steps.filters:
            cooled = _filtered(cooled, numbers)
        tokens = mx.where(greedy, tokens, _drawn(cooled, numbers["keys"], positions))
    if history is not None:
        made = history["made"].at[mx.arange(tokens.shape[0]), tokens].add(1)
        history = {"prompted": history["prompted"], "made": made}
    logprobs = None if steps.top_logprobs is None else row_logprobs(own, tokens, top=steps.top_logprobs)
    return Choice(mx.where(usable, tokens, logits.shape[-1]), logprobs), history


@compiled
def row_logprobs(logits: Float[mx.array, "rows vocab"], tokens: Int32[mx.array, " rows"], *, top: int) -> RowLogprobs:
    """Log-probabilities of each row's token and of its `top` most likely tokens, computed in float32."""
    logprobs = logits.astype(mx.float32)
    logprobs = logprobs - mx.logsumexp(logprobs, axis=-1, keepdims=True)
    # Equal logits are ordered by their ids, independent of the batch.
    likeliest = (
        mx.argsort(-logprobs, axis=-1)[:, :top].astype(mx.int32) if top else mx.zeros((len(tokens), 0), mx.int32)
    )
    chosen = mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    return RowLogprobs(chosen, likeliest, mx.take_along_axis(logprobs, likeliest, axis=-1))


def packed(allowed: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """Bools `[batch vocab]` as the bits that `sample_rows` takes, uint32 `[batch words]`."""
    padded = np.pad(allowed, [(0, 0), (0, -allowed.shape[1] % 32)])
    return np.packbits(padded, axis=1, bitorder="little").view(np.uint32)


def _penalized(logits: mx.array, numbers: RowNumbers, history: History) -> mx.array:
    made = history["made"]
    seen = history["prompted"] | (made > 0)
    repetition = numbers["repetition"][:, None]
    logits = mx.where(seen, mx.where(logits > 0, logits / repetition, logits * repetition), logits)
    logits = logits - numbers["presence"][:, None] * (made > 0)
    return logits - numbers["frequency"][:, None] * made


def _filtered(logits: mx.array, numbers: RowNumbers) -> mx.array:
    """The logits to draw from, with -inf for excluded tokens. A row without filters keeps its logits."""
    vocab = logits.shape[-1]
    order = mx.argsort(logits, axis=-1)
    ascending = mx.take_along_axis(logits, order, axis=-1)
    # Tokens that tie with the last of the top k stay, as in `apply_top_k`.
    smallest = mx.take_along_axis(ascending, vocab - numbers["top_k"][:, None], axis=-1)
    ascending = mx.where(ascending < smallest, -math.inf, ascending)
    up_to_here = mx.cumsum(mx.softmax(ascending, axis=-1), axis=-1)
    p = numbers["top_p"][:, None]
    kept = (up_to_here > 1 - p) | (mx.arange(vocab) == vocab - 1) | (p >= 1)
    kept = kept & (ascending >= ascending[:, -1:] + mx.log(numbers["min_p"][:, None]))
    return mx.put_along_axis(logits, order, mx.where(kept, ascending, -math.inf), axis=-1)


def _drawn(logits: mx.array, keys: mx.array, positions: mx.array) -> mx.array:
    # The key is hashed before the position is added. Otherwise seed 3 at position 1 would draw the same as seed 4 at
    # position 0, since seeds are small numbers too.
    own = mx.vmap(lambda key: mx.random.split(key)[0])(keys)
    at_position = own + mx.stack([mx.zeros_like(positions), positions], axis=1).astype(mx.uint32)
    draw = mx.vmap(lambda row, key: mx.random.categorical(row, key=key))
    drawn: mx.array = draw(logits, at_position)
    return drawn.astype(mx.int32)
