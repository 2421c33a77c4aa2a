"""How fast a model answers here, and which part of its bounds that is: loading, prefill, first token, decoding.

Decoding runs as in `generation.stream_tokens`, by the same functions: the next step is being computed while the last
token is waited for. A program is this package or another that runs the same weights; they are measured in turn.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import mlx.core as mx
from tqdm import tqdm

from dbrx_fn.benchmarks.machine import MachineLimits, read_seconds
from dbrx_fn.benchmarks.plan import ANSWER, WARM_STEPS, Cases, Planned, drawn_weights, loaded_weights
from dbrx_fn.checkpoints.checkpoint import open_checkpoint
from dbrx_fn.errors import lacks_memory
from dbrx_fn.generation.sampling import GREEDY, sample
from dbrx_fn.generation.stream import stream_tokens
from dbrx_fn.model.cache import Cache, grow_cache, init_cache
from dbrx_fn.model.config import Config, Dtype
from dbrx_fn.model.costs import Work, decode_work, prefill_work, weight_bytes
from dbrx_fn.model.shapes import capacity_bucket
from dbrx_fn.model.transformer import forward
from dbrx_fn.model.tree import Params

What = Literal["load", "draw", "prefill", "first token", "decode"]
Step = Callable[[mx.array], mx.array]
"""One token of each sequence `[batch]` to the next ones, lazily."""

OURS = "dbrx_fn"
_PATIENCE = 60.0
"""Seconds after which nothing is repeated any more."""


@dataclass(frozen=True)
class Program:
    """One that runs the weights.

    `config`: the model's, in the dtype that it computes in.
    `prefill`: a prompt `[1 time]`; returns when its last logits and the cache are there.
    `first_token`: a prompt; returns when the first token is there, as a user gets it.
    `decoder`: for a context, a batch size and the steps to come, the decoding step after that context.
    """

    name: str
    config: Config
    prefill: Callable[[mx.array], None]
    first_token: Callable[[list[int]], None]
    decoder: Callable[[int, int, int], Step]


@dataclass(frozen=True)
class Figure:
    """One measurement. Times in seconds, memory in bytes.

    `dtype`: of the program's floats.
    `tokens`: of the prompt, or of the context that is decoded after.
    `first`: the first time, with tracing and, on first use, the compilation of kernels.
    `seconds`, `fastest`, `slowest`: median and extremes after that; of decoding, of one step.
    `host`: of decoding, until a step is described and handed to the device, which computes the one before meanwhile. It
        is the whole step where the host computes, and where the device's queue is full.
    `bound`: the least time, and `fraction_of_bound` is that over `seconds`.
    `missing`: why there is no measurement.
    """

    program: str
    dtype: Dtype
    what: What
    tokens: int
    batch_size: int
    first: float | None = None
    seconds: float | None = None
    fastest: float | None = None
    slowest: float | None = None
    host: float | None = None
    repeats: int = 0
    tokens_per_second: float | None = None
    operations: int | None = None
    bytes: int | None = None
    bound: float | None = None
    bound_by: Literal["operations", "bytes", "files"] | None = None
    fraction_of_bound: float | None = None
    peak_memory: int | None = None
    missing: str | None = None


def make_weights(planned: Planned) -> tuple[Params, Figure]:
    """Loads or draws a model's weights.

    Returns:
        params: all in memory.
        figure: how long that took. A checkpoint's bound is a plain reading of its files just afterwards.

    Raises:
        CheckpointError: as `load`.
    """
    mx.reset_peak_memory()
    start = time.perf_counter()
    params = drawn_weights(planned) if planned.checkpoint is None else loaded_weights(planned.checkpoint, planned)
    seconds = time.perf_counter() - start
    figure = Figure(
        OURS,
        planned.config.dtype,
        "draw" if planned.checkpoint is None else "load",
        tokens=0,
        batch_size=1,
        seconds=seconds,
        fastest=seconds,
        slowest=seconds,
        repeats=1,
        bytes=weight_bytes(planned.config, planned.formats),
        peak_memory=mx.get_peak_memory(),
    )
    mx.clear_cache()
    # Of a checkpoint that is cut, not all is read.
    if planned.checkpoint is None or open_checkpoint(planned.checkpoint).config.n_layers != planned.config.n_layers:
        return params, figure
    files = {tensor.file for tensor in open_checkpoint(planned.checkpoint).tensors.values()}
    # Loading has read them too, perhaps faster.
    bound = min(seconds, read_seconds(sorted(files)))
    return params, replace(figure, bound=bound, bound_by="files", fraction_of_bound=bound / seconds)


def our_program(params: Params, config: Config) -> Program:
    """This package, by its public functions."""

    def prefill(tokens: mx.array) -> None:
        cache = init_cache(config, 1, capacity_bucket(tokens.shape[1]))
        logits, cache = forward(params, tokens, cache, last_only=True)
        mx.eval(logits, cache.keys, cache.values)

    def first_token(prompt: list[int]) -> None:
        next(stream_tokens(params, config, prompt, max_tokens=ANSWER))

    def decoder(context: int, batch_size: int, steps: int) -> Step:
        keys, values = random_cache(config, context, batch_size, capacity_bucket(context + steps))
        cache = Cache(config, (context,) * batch_size, keys, values)
        key = mx.random.key(0)
        # Only one name for each array, so that it is written to and not copied.
        del keys, values

        def step(token: mx.array) -> mx.array:
            nonlocal cache, key
            cache = grow_cache(cache, cache.lengths[0] + 1)
            logits, cache = forward(params, token[:, None], cache)
            token, key, _ = sample(logits[:, 0], key, None, sampling=GREEDY)
            return token

        return step

    return Program(OURS, config, prefill, first_token, decoder)


def measure_inference(
    programs: Sequence[Program], planned: Planned, cases: Cases, limits: MachineLimits
) -> list[Figure]:
    """Measures every case with one program after the other.

    Memory that runs out, or another program that can't run a case, makes a figure that says so.
    """
    formats = planned.formats
    figures = []
    wanted: list[tuple[What, int, int]] = [
        *(("prefill", prompt, 1) for prompt in cases.prompts),
        *(("first token", prompt, 1) for prompt in cases.prompts),
        *(("decode", context, batch_size) for context, batch_size in product(cases.contexts, cases.batch_sizes)),
    ]
    for (what, tokens, batch_size), program in tqdm(
        list(product(wanted, programs)), desc=planned.name, unit="case", disable=None, leave=False
    ):
        config = program.config
        empty = Figure(program.name, config.dtype, what, tokens, batch_size)
        if what == "decode":
            # In the middle of what is decoded.
            middle = tokens + cases.steps / 2
            work, made = decode_work(config, formats, middle, batch_size), batch_size
        else:
            work, made = prefill_work(config, formats, tokens), tokens
        figures.append(_measured(empty, program, cases, work, made, limits))
    return figures


def random_cache(
    config: Config, context: int, batch_size: int, capacity: int
) -> tuple[tuple[mx.array, ...], tuple[mx.array, ...]]:
    """Keys and values as if `context` tokens had been there: random, since what they are changes no time.

    The same for every capacity.
    """
    shape = (batch_size, config.attn.kv_n_heads, context, config.head_dim)
    free = [(0, 0), (0, 0), (0, capacity - context), (0, 0)]
    arrays = []
    for key in mx.random.split(mx.random.key(1), 2 * config.n_layers):
        arrays.append(mx.pad(mx.random.normal(shape, getattr(mx, config.dtype), key=key), free))
        mx.eval(arrays[-1])
    mx.clear_cache()
    return tuple(arrays[::2]), tuple(arrays[1::2])


def random_tokens(config: Config, batch_size: int, time: int) -> mx.array:
    """int32 `[batch time]`."""
    return mx.random.randint(0, config.vocab_size, (batch_size, time), mx.int32, mx.random.key(2))


def _measured(empty: Figure, program: Program, cases: Cases, work: Work, made: int, limits: MachineLimits) -> Figure:
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    try:
        if empty.what == "decode":
            step = program.decoder(empty.tokens, empty.batch_size, cases.steps)
            token = random_tokens(program.config, empty.batch_size, 1)[:, 0]
            first, times, host = decoding_times(step, token, cases)
        else:
            tokens = random_tokens(program.config, 1, empty.tokens)
            first, times = _times(program, empty.what, tokens, cases.repeats)
            host = None
    # Another program's errors are what there is to say of it; of ours only memory can run out.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        if program.name == OURS and not lacks_memory(error):
            raise
        return replace(empty, missing=f"{type(error).__name__}: {reason}")
    seconds = statistics.median(times)
    rates = limits.matmul_rate, limits.bandwidth(work.bytes)
    bound = work.seconds(*rates)
    return replace(
        empty,
        first=first,
        seconds=seconds,
        fastest=min(times),
        slowest=max(times),
        host=host,
        repeats=len(times),
        tokens_per_second=made / seconds,
        operations=work.operations,
        bytes=work.bytes,
        bound=bound,
        bound_by=work.bound_by(*rates),
        fraction_of_bound=bound / seconds,
        peak_memory=mx.get_peak_memory(),
    )


def _times(program: Program, what: What, tokens: mx.array, repeats: int) -> tuple[float, list[float]]:
    prompt = [int(token) for token in tokens[0]]
    times: list[float] = []
    while len(times) <= repeats and not (len(times) > 1 and sum(times) > _PATIENCE):
        start = time.perf_counter()
        if what == "prefill":
            program.prefill(tokens)
        else:
            program.first_token(prompt)
        times.append(time.perf_counter() - start)
        # The token after the first is being computed already.
        mx.synchronize()
    return times[0], times[1:]


def decoding_times(step: Step, token: mx.array, cases: Cases) -> tuple[float, list[float], float]:
    """Decodes; returns seconds: until the first token was there, of a step in each repetition, of the host's part."""
    start = time.perf_counter()
    token = step(token)
    mx.async_eval(token)

    handed_over: list[float] = []

    def decode(count: int) -> float:
        nonlocal token
        begun = time.perf_counter()
        for _ in range(count):
            current, before = token, time.perf_counter()
            token = step(current)
            mx.async_eval(token)
            handed_over.append(time.perf_counter() - before)
            current.tolist()
        return (time.perf_counter() - begun) / count

    decode(1)
    first = time.perf_counter() - start
    decode(WARM_STEPS - 1)
    handed_over.clear()
    begun = time.perf_counter()
    times: list[float] = []
    while len(times) < cases.repeats and not (times and time.perf_counter() - begun > _PATIENCE):
        times.append(decode(cases.tokens))
    mx.synchronize()
    return first, times, statistics.median(handed_over)
