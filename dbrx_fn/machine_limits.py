"""What this machine can do at best, measured: how fast it copies memory, and how fast it multiplies dense matrices."""

import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

from dbrx_fn.backend import Backend, backend, memory_size
from dbrx_fn.blas import FAST_BLAS
from dbrx_fn.config import Dtype

_MIB = 2**20
_READ_AT_ONCE = 16 * _MIB


@dataclass(frozen=True)
class MachineLimits:
    """Measured rates, per second, and what they were measured on.

    `copy_bandwidth`: bytes read and bytes written, added up.
    `matmul_rate`: operations, in `dtype`.
    `blas`: what multiplies matrices on the CPU; `None` on a GPU.
    """

    backend: Backend
    device: str
    mlx: str
    blas: str | None
    dtype: Dtype
    memory: int
    copy_bandwidth: float
    matmul_rate: float


def measure_limits(dtype: Dtype) -> MachineLimits:
    """Measures the default device, which takes seconds."""
    on_cpu = backend() == "cpu"
    limits = MachineLimits(
        backend=backend(),
        device=str(mx.device_info().get("device_name") or platform.machine()),
        mlx=version("mlx"),
        blas=(FAST_BLAS or "MLX's own") if on_cpu else None,
        dtype=dtype,
        memory=memory_size(),
        copy_bandwidth=copy_bandwidth(),
        # float32 holds every number of the others, and a CPU may have products of float32 only that are fast.
        matmul_rate=max(matmul_rate(dtype), matmul_rate("float32")) if on_cpu else matmul_rate(dtype),
    )
    mx.clear_cache()
    return limits


def matmul_rate(dtype: Dtype) -> float:
    """Operations per second of the default device's dense matrix product, at its best over a few sizes."""
    best = 0.0
    for size in (256, 512, 1024, 2048, 4096, 8192):
        one = mx.random.normal((size, size)).astype(getattr(mx, dtype))
        mx.eval(one)
        seconds = _median_seconds(functools.partial(mx.matmul, one, one), 5)
        best = max(best, 2 * size**3 / seconds)
        # A CPU has shown what it can by then, and would take minutes for the next.
        if seconds > 0.1:
            break
    return best


def copy_bandwidth() -> float:
    """Bytes per second that the default device reads and writes in an elementwise operation far larger than its caches.

    MLX's own on a CPU runs on one core, so NumPy copies there, on all of them.
    """
    if backend() == "cpu":
        return _cpu_copy_bandwidth()
    array = mx.zeros(512 * _MIB // 4, mx.float32)
    mx.eval(array)
    return 2 * array.nbytes / _median_seconds(lambda: -array, 10)


def read_seconds(files: Iterable[Path]) -> float:
    """How long it takes to read files from beginning to end, and to keep nothing."""
    buffer = bytearray(_READ_AT_ONCE)
    start = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return time.perf_counter() - start


def _cpu_copy_bandwidth() -> float:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = [(np.zeros(256 * _MIB // cores, np.uint8), np.ones(256 * _MIB // cores, np.uint8)) for _ in range(cores)]
    times = []
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(6):
            start = time.perf_counter()
            # NumPy lets other threads run while it copies.
            list(pool.map(lambda part: np.copyto(*part), parts))
            times.append(time.perf_counter() - start)
    return 2 * sum(to.nbytes for to, _ in parts) / statistics.median(times[1:])


def _median_seconds(run: Callable[[], mx.array], times: int) -> float:
    """Of one run. A GPU is given several between two waits, since a wait takes some 90 us, a quarter of a copy."""
    together = 1 if backend() == "cpu" else 8
    mx.eval(run())
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        mx.eval([run() for _ in range(together)])
        taken.append((time.perf_counter() - start) / together)
    return statistics.median(taken)
