"""The rows that decode together: their cache, and the other state of each row on the device.

A batch is an immutable value. A step or a rearrangement makes a new one. So what the device computes depends only on
the rows in the batch, and not on the order in which they joined.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from dbrx_fn.generation.row_sampling import (
    Choice,
    RowNumbers,
    Steps,
    biases,
    row_numbers,
    sample_rows,
    steps_of,
)
from dbrx_fn.generation.sampling import GREEDY, History, init_history
from dbrx_fn.model.cache import Cache, init_cache
from dbrx_fn.model.cache_rows import put_rows, resize, rewind, take_rows
from dbrx_fn.model.config import Config
from dbrx_fn.model.transformer import forward
from dbrx_fn.model.tree import Params
from dbrx_fn.serving.request import MOST_TOP_LOGPROBS, Request


@dataclass(frozen=True, eq=False)
class Rows:
    """The state of each row besides its cache, on the device.

    `requests`: the request of each row; `None` for an idle row.
    `tokens`: int32 `[batch]`, each row's last token, which the cache doesn't hold yet.
    `positions`: how many tokens each row has generated.
    `numbers`: settings for sampling.
    `history`: the tokens that penalties look at; `None` if no row has penalties.
    `bias`: float32 `[batch vocab]`, added to logits; `None` if no row has a bias.
    `experts`: uint32 `[layers batch top_k]`, the experts that computed the latest logits; `None` if no row wants them.
    """

    requests: tuple[Request | None, ...]
    tokens: mx.array
    positions: tuple[int, ...]
    numbers: RowNumbers
    history: History | None
    bias: mx.array | None
    experts: mx.array | None = None


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows that decode together."""

    cache: Cache
    rows: Rows

    @property
    def idle(self) -> tuple[int, ...]:
        """Idle rows."""
        return tuple(row for row, request in enumerate(self.rows.requests) if request is None)


def first_rows(request: Request, made: Sequence[int], vocab_size: int) -> Rows:
    """The row of a request that has generated these tokens. The last one isn't on the device yet."""
    rows = _rows([request], vocab_size)
    history = rows.history
    if history is not None and made:
        counts = np.bincount(made, minlength=vocab_size)[None].astype(np.int32)
        history = {"prompted": history["prompted"], "made": mx.array(counts)}
    return replace(rows, positions=(len(made),), history=history)


def same_rows(request: Request, rows: int, vocab_size: int) -> Rows:
    """The row of one request, repeated."""
    return _rows([request] * rows, vocab_size)


def _rows(requests: Sequence[Request | None], vocab_size: int) -> Rows:
    samplings = [GREEDY if request is None else request.sampling for request in requests]
    seeds = [0 if request is None else request.seed for request in requests]
    prompts = [
        list(request.prompt) if request is not None and request.sampling.uses_history else [] for request in requests
    ]
    uses_history = any(sampling.uses_history for sampling in samplings)
    return Rows(
        tuple(requests),
        mx.zeros(len(requests), mx.int32),
        (0,) * len(requests),
        row_numbers(list(zip(samplings, seeds, strict=True)), vocab_size),
        init_history(prompts, vocab_size) if uses_history else None,
        biases(samplings, vocab_size),
    )


def arranged(
    batch: Batch | None, kept: Sequence[int], joining: Sequence[Batch], rows: int, capacity: int, config: Config
) -> tuple[Batch, tuple[int | None, ...]]:
    """A batch of `rows` rows of `capacity` positions: kept rows of an earlier batch, joining rows, and idle rows.

    If the shape is unchanged, rows that keep their place aren't copied.

    Args:
        batch: the earlier one, if there is one.
        kept: indices of its rows that go on.
        joining: batches of one row each.
        rows: at least the number of kept and joining rows.
        capacity: at least the positions that any of these rows holds.
        config: the model's.

    Returns:
        The new batch, and for each of its rows the index in `[*kept, *joining]`; `None` for an idle row.
    """
    if batch is None and len(joining) == rows == 1:
        return replace(joining[0], cache=resize(joining[0].cache, capacity)), (0,)
    places = _places(batch, kept, rows)
    if batch is None:
        cache = init_cache(config, rows, capacity)
    else:
        cache = batch.cache
        if rows != cache.batch_size:
            cache = take_rows(cache, [0 if place is None else place for place in places])
        lengths = [0 if place is None else batch.cache.lengths[place] for place in places]
        cache = resize(rewind(cache, lengths), capacity)
    sources = [None if place is None or batch is None else (batch, place) for place in places]
    whose = [None if place is None else kept.index(place) for place in places]
    for number, one in enumerate(joining, start=len(kept)):
        row = sources.index(None)
        sources[row], whose[row] = (one, 0), number
        cache = put_rows(cache, [row], one.cache)
    return Batch(cache, _rows_from(sources, config.vocab_size)), tuple(whose)


def one_row(batch: Batch, row: int, config: Config) -> Batch:
    """One row of a batch, as a batch of its own."""
    return Batch(take_rows(batch.cache, [row]), _rows_from([(batch, row)], config.vocab_size))


def decoded(params: Params, batch: Batch, *, whole_cache: bool) -> tuple[mx.array, Batch]:
    """Computes the last tokens into the cache. Doesn't wait for the device.

    Returns:
        Logits of the next tokens, `[batch vocab]`, and the new batch.
    """
    cache, requests = batch.cache, batch.rows.requests
    tokens, experts = batch.rows.tokens[:, None], None
    if any(request is not None and request.experts for request in requests):
        logits, after, experts = forward(params, tokens, cache, whole_cache=whole_cache, with_experts=True)
    else:
        logits, after = forward(params, tokens, cache, whole_cache=whole_cache)
    lengths = [0 if request is None else length for request, length in zip(requests, after.lengths, strict=True)]
    return logits[:, 0], Batch(rewind(after, lengths), replace(batch.rows, experts=experts))


def chosen(logits: mx.array, rows: Rows, allowed: Sequence[NDArray[np.uint32] | None] = ()) -> tuple[Choice, Rows]:
    """Chooses a token for each row from `logits` `[batch vocab]`.

    If one row needs a penalty or bias, it is computed for all rows, with neutral values for the others. So there are
    few traces, and the other rows keep their bits.

    Args:
        logits: of any float dtype.
        rows: the rows' state.
        allowed: per row, the tokens that may be chosen, uint32 `[words]` as in `Matcher.allowed`; `None` for all.
    """
    history, bias, words = rows.history, rows.bias, None
    vocab = logits.shape[-1]
    if history is not None or bias is not None or any(mask is not None for mask in allowed):
        history = init_history([[]] * len(rows.requests), vocab) if history is None else history
        bias = mx.zeros(logits.shape, mx.float32) if bias is None else bias
        everything = np.full(-(-vocab // 32), 0xFFFFFFFF, np.uint32)
        masks = allowed or [None] * len(logits)
        words = mx.array(np.stack([everything if mask is None else mask for mask in masks]))
    positions = mx.array(rows.positions, mx.int32)
    choice, history = sample_rows(logits, rows.numbers, positions, history, bias, words, steps=_steps(rows.requests))
    return choice, replace(
        rows,
        tokens=choice.tokens,
        positions=tuple(position + 1 for position in rows.positions),
        history=None if rows.history is None else history,
    )


def _steps(requests: Sequence[Request | None]) -> Steps:
    there = [request for request in requests if request is not None]
    wanted = [request.top_logprobs for request in there if request.top_logprobs is not None]
    steps = steps_of([request.sampling for request in there], MOST_TOP_LOGPROBS if wanted else None)
    # Drawing without filters is rare, and would need one more trace.
    return replace(steps, filters=steps.draws)


def _places(batch: Batch | None, kept: Sequence[int], rows: int) -> tuple[int | None, ...]:
    """For each row of the new batch, the row of the old one that it takes over. Rows keep their place if they can."""
    places: list[int | None] = [None] * rows
    if batch is not None:
        for row in kept:
            if row < rows:
                places[row] = row
        for row in kept:
            if row >= rows:
                places[places.index(None)] = row
    return tuple(places)


def _rows_from(sources: Sequence[tuple[Batch, int] | None], vocab_size: int) -> Rows:
    """The rows of several batches as one batch's. A row without a source is idle."""
    requests = [None if source is None else source[0].rows.requests[source[1]] for source in sources]
    fresh = _rows(requests, vocab_size)
    pool = list(dict.fromkeys(source[0] for source in sources if source is not None))
    first = dict(zip(pool, np.cumsum([0, *(len(one.rows.requests) for one in pool)]).tolist(), strict=False))
    idle = sum(len(one.rows.requests) for one in pool)
    index = mx.array([idle if source is None else first[source[0]] + source[1] for source in sources], mx.int32)

    def taken(arrays: Sequence[mx.array], of_idle: mx.array) -> mx.array:
        return mx.take(mx.concatenate([*arrays, of_idle[None]]), index, axis=0)

    history = fresh.history
    if history is not None:
        nothing = mx.zeros(vocab_size, mx.int32)
        made = [
            mx.zeros((len(one.rows.requests), vocab_size), mx.int32)
            if one.rows.history is None
            else one.rows.history["made"]
            for one in pool
        ]
        history = {"prompted": history["prompted"], "made": taken(made, nothing)}
    return replace(
        fresh,
        tokens=taken([one.rows.tokens for one in pool], mx.array(0, mx.int32)),
        positions=tuple(0 if source is None else source[0].rows.positions[source[1]] for source in sources),
        history=history,
    )
