"""Measures this machine's limits: the rates of reading memory and files, and of multiplying dense matrices."""

import platform
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from dbrx_fn.benchmarks.machine_rates import matmul_rate, memory_rates
from dbrx_fn.model.config import Dtype
from dbrx_fn.runtime.blas import FAST_BLAS
from dbrx_fn.runtime.device import Backend, backend, memory_size

_READ_AT_ONCE = 16 * 2**20
_READERS = 4


@dataclass(frozen=True)
class MachineLimits:
    """Measured rates per second, and the machine.

    `memory_rates`: (size, rate) pairs, ascending: bytes read or written per second, with `size` bytes used repeatedly.
    `matmul_rate`: operations per second, in `dtype`.
    `blas`: the library that multiplies matrices on the CPU; `None` on a GPU.
    """

    backend: Backend
    device: str
    mlx: str
    blas: str | None
    dtype: Dtype
    memory: int
    memory_rates: tuple[tuple[int, float], ...]
    matmul_rate: float

    def bandwidth(self, size: int) -> float:
        """The highest rate, in bytes per second, of reading `size` bytes repeatedly.

        A cache may hold these bytes. So it is the rate of the next smaller measured size, or of a larger size if that
        was faster. Below the smallest size it is the highest of all rates.
        """
        smaller = [measured for measured, _ in self.memory_rates if measured <= size]
        least = max(smaller, default=0)
        return max(rate for measured, rate in self.memory_rates if measured >= least)


def measure_limits(dtype: Dtype) -> MachineLimits:
    """Measures the default device. This takes seconds."""
    on_cpu = backend() == "cpu"
    limits = MachineLimits(
        backend=backend(),
        device=str(mx.device_info().get("device_name") or platform.machine()),
        mlx=version("mlx"),
        blas=(FAST_BLAS or "MLX's own") if on_cpu else None,
        dtype=dtype,
        memory=memory_size(),
        memory_rates=memory_rates(),
        # On a CPU every product can be computed in float32, which may be faster.
        matmul_rate=max(map(matmul_rate, {dtype, "float32"} if on_cpu else {dtype})),
    )
    mx.clear_cache()
    return limits


def read_seconds(files: Iterable[Path]) -> float:
    """The time, in seconds, to read files from beginning to end, several at once, without keeping their content."""
    parts = [(file, offset) for file in files for offset in range(0, file.stat().st_size, _READ_AT_ONCE)]

    def read(own: Iterable[tuple[Path, int]]) -> None:
        buffer = bytearray(_READ_AT_ONCE)
        for file, offset in own:
            with file.open("rb", buffering=0) as opened:
                opened.seek(offset)
                opened.readinto(buffer)

    start = time.perf_counter()
    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(read, (parts[reader::_READERS] for reader in range(_READERS))))
    return time.perf_counter() - start
