"""Measures inference against its bounds: loading, prefill, first token, decoding.

Decoding uses the functions of `generation.stream_tokens` in the same way: the next step is computed while the host
waits for the last token. Programs (this package, or another on the same weights) are measured in turn.
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
from dbrx_fn.runtime.group import group

What = Literal["load", "draw", "prefill", "first token", "decode"]
Step = Callable[[mx.array], mx.array]
"""Takes one token of each sequence, `[batch]`, and returns the next ones, lazily."""

OURS = "dbrx_fn"
_PATIENCE = 60.0
"""Seconds after which repetitions end."""


@dataclass(frozen=True)
class Program:
    """A program that runs the weights.

    `config`: the model's, with the dtype that the program computes in.
    `prefill`: takes a prompt `[1 time]`, and returns when its last logits and the cache are computed.
    `first_token`: takes a prompt, and returns when the first token has arrived, as for a user.
    `decoder`: takes a context, a batch size, the number of steps, and the number of new tokens of each sequence in one
        step, and returns the decoding step.
    `uses_mlx`: whether its memory is MLX's, which is measured.
    """

    name: str
    config: Config
    prefill: Callable[[mx.array], None]
    first_token: Callable[[list[int]], None]
    decoder: Callable[[int, int, int, int], Step]
    uses_mlx: bool = True


@dataclass(frozen=True)
class Figure:
    """One measurement. Times are in seconds, memory in bytes.

    `dtype`: of the program's floats.
    `tokens`: length of the prompt, or of the context before decoding.
    `together`: for decoding, new tokens of each sequence in one step.
    `first`: the first time, with tracing and, on first use, the compilation of kernels.
    `seconds`, `fastest`, `slowest`: median and extremes of later times. For decoding, of one step.
    `host`: for decoding, the time until a step is described and handed to the device, which computes the step before
        meanwhile. It is the whole step if the host computes, or if the device's queue is full.
    `bound`: the least possible time. `fraction_of_bound` is `bound` divided by `seconds`.
    `missing`: the reason, if there is no measurement.
    """

    program: str
    dtype: Dtype
    what: What
    tokens: int
    batch_size: int
    together: int = 1
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

    @property
    def batch_text(self) -> str:
        """For decoding, the sequences of a step, and how many tokens each has in it if there are several."""
        if self.what != "decode":
            return ""
        return f"{self.batch_size}" if self.together == 1 else f"{self.batch_size} x {self.together}"


def make_weights(planned: Planned) -> tuple[Params, Figure]:
    """Loads or draws a model's weights.

    Returns:
        params: the weights, all in memory.
        figure: the time that this took. A checkpoint's bound is a plain read of its files just afterwards.

    Raises:
        CheckpointError: as in `load`.
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
    # If layers are left out, not all of the checkpoint is read.
    if planned.checkpoint is None or open_checkpoint(planned.checkpoint).config.n_layers != planned.config.n_layers:
        return params, figure
    files = {tensor.file for tensor in open_checkpoint(planned.checkpoint).tensors.values()}
    # Loading may have read the files faster.
    bound = min(seconds, read_seconds(sorted(files)))
    return params, replace(figure, bound=bound, bound_by="files", fraction_of_bound=bound / seconds)


def our_program(params: Params, config: Config) -> Program:
    """This package as a program, by its public functions."""

    def prefill(tokens: mx.array) -> None:
        cache = init_cache(config, 1, capacity_bucket(tokens.shape[1]))
        logits, cache = forward(params, tokens, cache, last_only=True)
        mx.eval(logits, cache.keys, cache.values)

    def first_token(prompt: list[int]) -> None:
        next(stream_tokens(params, config, prompt, max_tokens=ANSWER))

    def decoder(context: int, batch_size: int, steps: int, together: int) -> Step:
        keys, values = random_cache(config, context, batch_size, capacity_bucket(context + steps))
        cache = Cache(config, (context,) * batch_size, keys, values)
        key, others = mx.random.key(0), mx.arange(together, dtype=mx.int32)
        # With only one reference to each array, MLX writes to it instead of copying it.
        del keys, values

        def step(token: mx.array) -> mx.array:
            nonlocal cache, key
            held = cache.lengths[0]
            cache = grow_cache(cache, held + together)
            # Several tokens are distinct, so that they choose experts as a text's do. All but the first are given up.
            tokens = token[:, None] if together == 1 else (token[:, None] + others) % config.vocab_size
            logits, cache = forward(params, tokens, cache)
            cache = replace(cache, lengths=(held + 1,) * batch_size)
            token, key, _ = sample(logits[:, 0], key, None, sampling=GREEDY)
            return token

        return step

    return Program(OURS, config, prefill, first_token, decoder)


def measure_inference(
    programs: Sequence[Program], planned: Planned, cases: Cases, limits: MachineLimits
) -> list[Figure]:
    """Measures every case with one program after the other.

    A case that runs out of memory, or that another program can't run, makes a figure with `missing`.
    """
    formats = planned.formats
    figures = []
    wanted: list[tuple[What, int, int, int]] = [
        *(("prefill", prompt, 1, 1) for prompt in cases.prompts),
        *(("first token", prompt, 1, 1) for prompt in cases.prompts),
        *(("decode", *case) for case in product(cases.contexts, cases.batch_sizes, cases.together)),
    ]
    for (what, tokens, batch_size, together), program in tqdm(
        list(product(wanted, programs)), desc=planned.name, unit="case", disable=None, leave=False
    ):
        config = program.config
        empty = Figure(program.name, config.dtype, what, tokens, batch_size, together)
        if what == "decode":
            # The middle of the decoded tokens.
            middle = tokens + cases.steps / 2
            work, made = decode_work(config, formats, middle, batch_size, together), batch_size * together
        else:
            work, made = prefill_work(config, formats, tokens), tokens
        figures.append(_measured(empty, program, cases, work, made, limits))
    return figures


def random_cache(
    config: Config, context: int, batch_size: int, capacity: int
) -> tuple[tuple[mx.array, ...], tuple[mx.array, ...]]:
    """A cache of `context` tokens with random keys and values, since the values don't affect the time.

    They are the same for every capacity.
    """
    shape = (batch_size, config.layer.local_kv_heads, context, config.head_dim)
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
            step = program.decoder(empty.tokens, empty.batch_size, cases.steps, empty.together)
            token = random_tokens(program.config, empty.batch_size, 1)[:, 0]
            first, times, host = decoding_times(step, token, cases)
        else:
            tokens = random_tokens(program.config, 1, empty.tokens)
            first, times = _times(program, empty.what, tokens, cases.repeats)
            host = None
    # Another program's errors are reported. In this package only memory can run out.
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
        peak_memory=mx.get_peak_memory() if program.uses_mlx else None,
    )


def _times(program: Program, what: What, tokens: mx.array, repeats: int) -> tuple[float, list[float]]:
    prompt = [int(token) for token in tokens[0]]
    times: list[float] = []
    while group().share(len(times) <= repeats and not (len(times) > 1 and sum(times) > _PATIENCE)):
        start = time.perf_counter()
        if what == "prefill":
            program.prefill(tokens)
        else:
            program.first_token(prompt)
        times.append(time.perf_counter() - start)
        # The second token is being computed already.
        mx.synchronize()
    return times[0], times[1:]


def decoding_times(step: Step, token: mx.array, cases: Cases) -> tuple[float, list[float], float]:
    """Decodes. Returns seconds: until the first token, of a step in each repetition, and of the host's part."""
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
    while group().share(len(times) < cases.repeats and not (times and time.perf_counter() - begun > _PATIENCE)):
        times.append(decode(cases.tokens))
    mx.synchronize()
    return first, times, statistics.median(handed_over)
