"""Measures the highest rates at which the default device reads memory and multiplies dense matrices.

A rate can serve as a bound only if nothing exceeds it. So this module takes the highest of several reading operations,
several shapes of products, and several repetitions. Many operations are described before a wait, since a wait takes a
GPU some 90 us.
"""

import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import mlx.core as mx
import numpy as np

from dbrx_fn.model.config import Dtype
from dbrx_fn.ops.kernels.cuda_module import on_gpu
from dbrx_fn.ops.kernels.read_memory import read_memory, wave
from dbrx_fn.runtime.cores import usable_cores
from dbrx_fn.runtime.device import backend, memory_size

_MIB = 2**20
_TOGETHER = 0.03
"""Seconds of operations to describe before a wait."""
_REPEATS = 6
_PATIENCE = 0.3
"""Seconds after which repetitions end, after at least one."""
_SLOW = 0.1
"""If a product takes more seconds than this, larger ones aren't tried, since a CPU is at its highest rate by then."""
_PRODUCTS = (
    *((size, size, size) for size in (256, 512, 1024, 2048, 4096)),
    # These have as many tiles as an H100 has multiprocessors, or two or four times as many.
    (2048, 2048, 13312),
    (4224, 2048, 8192),
    (8448, 4096, 8192),
    (8192, 8192, 8192),
)
"""Rows and columns of the product, and the inner axis, in order of their work."""
_CPU_SETS = tuple(size * _MIB for size in (1, 4, 16, 64, 256))
_GPU_SETS = (1, 2, 4, 8, 32, 128)
"""Sizes in waves of about 16 MiB. The first fit into a cache, the last doesn't."""
_MOST_RESULTS = 2**30
"""The most bytes of results at a time."""

Run = Callable[[int], object]
"""Executes the given number of operations."""


def matmul_rate(dtype: Dtype) -> float:
    """Operations per second of a dense matrix product, the highest over shapes.

    The numbers are random, since a GPU draws less power for simple numbers and multiplies them faster.
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
    """The rates, in bytes per second, of reading (or reading and writing) the same bytes repeatedly.

    Returns:
        (size, highest rate) pairs for several sizes, ascending. Small sizes fit into caches, which are faster.
    """
    if backend() == "cpu":
        return tuple((size, _cpu_memory_rate(size)) for size in _CPU_SETS)
    sizes = [waves * _wave() for waves in _GPU_SETS if waves * _wave() <= memory_size() // 8]
    return tuple((size, _gpu_memory_rate(size)) for size in sizes)


def best_rate(run: Run, most: int = 1_000_000) -> float:
    """Operations per second in the fastest of several repetitions.

    Args:
        run: executes the given number of operations.
        most: the most operations per repetition.
    """
    # The first run is slow: it compiles, touches new memory, and meets low clocks.
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


def _wave() -> int:
    return wave() if on_gpu() else 16 * _MIB


def _gpu_memory_rate(size: int) -> float:
    data = mx.ones(size // 4, mx.float32)
    mx.eval(data)

    def negate(count: int) -> None:
        negated = data
        # Each result replaces the one before.
        for _ in range(count):
            negated = -negated
        mx.eval(negated)

    # A product as in decoding.
    matrix = data.view(mx.bfloat16).reshape(-1, _wave() // 2048)
    row = mx.ones((1, matrix.shape[1]), mx.bfloat16)
    mx.eval(matrix, row)
    rates = [
        best_rate(_lazily(lambda: mx.sum(data))),
        2 * best_rate(negate),
        best_rate(_lazily(lambda: row @ matrix.T)),
    ]
    if on_gpu():
        words = data.view(mx.uint32)
        # A launch takes some us, so small sizes are read several times per launch.
        times = max(1, _GPU_SETS[-1] * _wave() // size)
        rates.append(times * best_rate(_lazily(lambda: read_memory(words, times))))
    return size * max(rates)


def _cpu_memory_rate(size: int) -> float:
    """The highest rate on a CPU. NumPy reads and copies on all cores, since MLX uses one core, except for products."""
    cores = usable_cores()
    parts = [np.ones(size // cores // 4, np.float32) for _ in range(cores)]
    width = 1024
    matrix, row = mx.ones((size // width // 4, width)), mx.ones((1, width))
    mx.eval(matrix, row)

    def copy_half(part: np.ndarray) -> None:
        half = part.size // 2
        np.copyto(part[:half], part[half : 2 * half])

    with ThreadPoolExecutor(cores) as pool:
        # NumPy releases the interpreter lock while it computes.
        rates = [best_rate(_on_all_cores(pool, operation, parts)) for operation in (np.max, copy_half)]
    return size * max(*rates, best_rate(_lazily(lambda: row @ matrix.T)))


def _on_all_cores(
    pool: ThreadPoolExecutor, operation: Callable[[np.ndarray], object], parts: Sequence[np.ndarray]
) -> Run:
    def again(part: np.ndarray, count: int) -> None:
        for _ in range(count):
            operation(part)

    return lambda count: list(pool.map(again, parts, repeat(count)))
