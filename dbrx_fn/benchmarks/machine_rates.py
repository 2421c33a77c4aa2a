"""How fast the default device reads memory and multiplies dense matrices: the best that it showed, of many tries.

A rate that is to be a bound has to be one that nothing exceeds, so everything here looks for the highest: several
operations that read, several shapes that are multiplied, the fastest of several repetitions. Many operations are
described before they are waited for, since a wait takes a GPU some 90 us.
"""

import functools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import mlx.core as mx
import numpy as np

from dbrx_fn.model.config import Dtype
from dbrx_fn.ops.kernels.cuda_module import on_hopper
from dbrx_fn.ops.kernels.read_memory import WAVE, read_memory
from dbrx_fn.runtime.device import backend, memory_size

_MIB = 2**20
_TOGETHER = 0.03
"""Seconds of operations that are described before they are waited for."""
_REPEATS = 6
_PATIENCE = 0.3
"""Seconds after which nothing is repeated any more, but once."""
_SLOW = 0.1
"""Seconds of one product from which on larger ones aren't tried: a CPU has shown what it can by then."""
_PRODUCTS = (
    *((size, size, size) for size in (256, 512, 1024, 2048, 4096)),
    # As many tiles as an H100 has multiprocessors, or twice or four times that many.
    (2048, 2048, 13312),
    (4224, 2048, 8192),
    (8448, 4096, 8192),
    (8192, 8192, 8192),
)
"""Rows and columns of the product, and the inner axis, the least work first."""
_CPU_SETS = tuple(size * _MIB for size in (1, 4, 16, 64, 256))
_GPU_SETS = tuple(waves * WAVE for waves in (1, 2, 4, 8, 32, 128))
"""From 16 MiB, which a cache holds, to 2 GiB, which none does."""
_MOST_RESULTS = 2**30
"""Bytes of results that are there at once."""

Run = Callable[[int], object]
"""Executes so many operations."""


def matmul_rate(dtype: Dtype) -> float:
    """Operations per second of a dense matrix product, at its best over shapes.

    The numbers are random, since a GPU that draws less power for simple ones multiplies those faster.
    """
    best = 0.0
    for rows, columns, inner in _PRODUCTS:
        x, weight = (mx.random.normal((size, inner)).astype(getattr(mx, dtype)) for size in (rows, columns))
        mx.eval(x, weight)
        most = max(1, _MOST_RESULTS // (rows * columns * x.itemsize))
        rate = best_rate(_lazily(functools.partial(mx.matmul, x, weight.T)), most)
        best = max(best, 2 * rows * columns * inner * rate)
        if 1 / rate > _SLOW:
            break
    return best


def memory_rates() -> tuple[tuple[int, float], ...]:
    """How many bytes are read, or read and written, per second by what does so again and again with the same bytes.

    Returns:
        For each of several numbers of bytes, ascending: that, and the highest rate. Few are read faster than many where
        caches hold them.
    """
    if backend() == "cpu":
        return tuple((size, _cpu_memory_rate(size)) for size in _CPU_SETS)
    sizes = [size for size in _GPU_SETS if size <= memory_size() // 8]
    return tuple((size, _gpu_memory_rate(size)) for size in sizes)


def best_rate(run: Run, most: int = 1_000_000) -> float:
    """Operations per second in the fastest of several repetitions.

    Args:
        run: executes so many operations.
        most: operations to a repetition, if they don't take long enough before.
    """
    # What is slow the first time only: compiling, memory that is touched first, clocks that are low.
    run(1)
    together = min(most, max(1, round(_TOGETHER / _seconds(run, 1))))
    taken: list[float] = []
    while len(taken) < 2 or (len(taken) < _REPEATS and sum(taken) < _PATIENCE):
        taken.append(_seconds(run, together))
    return together / min(taken)


def _seconds(run: Run, count: int) -> float:
    start = time.perf_counter()
    run(count)
    return time.perf_counter() - start


def _lazily(describe: Callable[[], mx.array]) -> Run:
    return lambda count: mx.eval([describe() for _ in range(count)])


def _gpu_memory_rate(size: int) -> float:
    data = mx.ones(size // 4, mx.float32)
    mx.eval(data)

    def negate(count: int) -> None:
        negated = data
        # Each in place of the one before.
        for _ in range(count):
            negated = -negated
        mx.eval(negated)

    # As decoding reads its matrices.
    matrix = data.view(mx.bfloat16).reshape(-1, WAVE // 2048)
    row = mx.ones((1, matrix.shape[1]), mx.bfloat16)
    mx.eval(matrix, row)
    rates = [
        best_rate(_lazily(lambda: mx.sum(data))),
        2 * best_rate(negate),
        best_rate(_lazily(lambda: row @ matrix.T)),
    ]
    if on_hopper():
        words = data.view(mx.uint32)
        # A launch takes some us, so what is small is read again within one.
        times = max(1, _GPU_SETS[-1] // size)
        rates.append(times * best_rate(_lazily(lambda: read_memory(words, times))))
    return size * max(rates)


def _cpu_memory_rate(size: int) -> float:
    """MLX's own operations run on one core, but for products, so NumPy reads and copies on all of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = [np.ones(size // cores // 4, np.float32) for _ in range(cores)]
    width = 1024
    matrix, row = mx.ones((size // width // 4, width)), mx.ones((1, width))
    mx.eval(matrix, row)

    def copy_half(part: np.ndarray) -> None:
        half = part.size // 2
        np.copyto(part[:half], part[half : 2 * half])

    with ThreadPoolExecutor(cores) as pool:
        # NumPy lets other threads run while it computes.
        rates = [best_rate(_on_all_cores(pool, operation, parts)) for operation in (np.max, copy_half)]
    return size * max(*rates, best_rate(_lazily(lambda: row @ matrix.T)))


def _on_all_cores(
    pool: ThreadPoolExecutor, operation: Callable[[np.ndarray], object], parts: Sequence[np.ndarray]
) -> Run:
    def again(part: np.ndarray, count: int) -> None:
        for _ in range(count):
            operation(part)

    return lambda count: list(pool.map(again, parts, repeat(count)))
