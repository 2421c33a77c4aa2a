"""Makes every trace that an engine may need, before the first request comes.

Each shape needs one trace, and on CUDA a first trace can wait seconds for kernels. The limits determine the shapes: few
batch sizes, capacities in buckets, prompts in chunks. The traces run few layers only.
"""

from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx

from dbrx_fn.generation.sampling import GREEDY, Sampling
from dbrx_fn.model.cache import init_cache
from dbrx_fn.model.config import Config
from dbrx_fn.model.shapes import attended, capacity_bucket, shallow, time_bucket
from dbrx_fn.model.stacked_adapters import choose_adapters
from dbrx_fn.model.transformer import forward
from dbrx_fn.model.tree import Params
from dbrx_fn.serving.batch import chosen, same_rows
from dbrx_fn.serving.limits import FREE_CHUNKS, Limits
from dbrx_fn.serving.request import Request
from dbrx_fn.serving.schedule import batch_rows

_DRAWN = Sampling(temperature=1.0)
_ADJUSTED = Sampling(logit_bias=((0, 0.0),))


def warm_up(params: Params, config: Config, limits: Limits) -> None:
    """Runs every shape that an engine with these limits may need. Traces belong to the calling thread."""
    params, config = shallow(params, config)
    for rows in sorted({batch_rows(count, limits) for count in range(1, limits.rows + 1)} | {1}):
        _choose(config, rows)
    for rows, capacity in decoding_shapes(limits):
        cache = init_cache(config, rows, capacity)
        tokens = mx.zeros((rows, 1), mx.int32)
        tree = choose_adapters(params, [0] * rows)
        logits, _, experts = forward(tree, tokens, cache, whole_cache=limits.exact, with_experts=True)
        mx.eval(logits, experts)
    alone = choose_adapters(params, [0])
    for width, start, capacity in reading_shapes(limits):
        cache = replace(init_cache(config, 1, capacity), lengths=(start,))
        tokens = mx.zeros((1, width), mx.int32)
        logits, _, experts = forward(alone, tokens, cache, last_only=True, chunk_size=width, with_experts=True)
        mx.eval(logits, experts)


def decoding_shapes(limits: Limits) -> Iterator[tuple[int, int]]:
    """Rows and capacities of all possible decoding batches."""
    if limits.exact:
        yield limits.rows, limits.capacity
        return
    for rows in sorted({batch_rows(count, limits) for count in range(1, limits.rows + 1)}):
        for capacity in _capacities(limits):
            if rows * capacity <= limits.positions or rows == 1:
                yield rows, capacity


def reading_shapes(limits: Limits) -> Iterator[tuple[int, int, int]]:
    """Widths, starts and capacities of all chunks of prompts, each trace once.

    A prompt starts after a cached prefix of complete chunks, and may have any length.
    """
    known: set[tuple[int, int, int]] = set()
    longest = limits.chunk * (1 if limits.exact else FREE_CHUNKS)
    widths = [1, *(1 << power for power in range(3, longest.bit_length()))]
    for capacity in [limits.capacity] if limits.exact else list(_capacities(limits)):
        for width in widths:
            for start in range(0, capacity - width + 1, limits.chunk):
                time = time_bucket(width, capacity)
                span = attended(time, start + time, capacity)
                if (width, span, capacity) not in known:
                    known.add((width, span, capacity))
                    yield width, start, capacity


def _capacities(limits: Limits) -> Iterator[int]:
    length = 1
    while True:
        capacity = capacity_bucket(length)
        yield capacity
        if capacity >= limits.capacity:
            return
        length = capacity + 1


def _choose(config: Config, rows: int) -> None:
    """Chooses tokens for `rows` rows: greedy or drawn, each with and without adjustments and log-probabilities."""
    logits = mx.zeros((rows, config.vocab_size), getattr(mx, config.dtype))
    for sampling in (GREEDY, _DRAWN):
        for adjusted in (False, True):
            for top_logprobs in (None, 0):
                bias = _ADJUSTED.logit_bias if adjusted else ()
                request = Request((0,), sampling=replace(sampling, logit_bias=bias), top_logprobs=top_logprobs)
                mx.eval(chosen(logits, same_rows(request, rows, config.vocab_size))[0])
