"""What this machine can do at best, measured: how fast it reads memory and files, and multiplies dense matrices."""

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
    """Measured rates, per second, and what they were measured on.

    `memory_rates`: of bytes read or written, by how many bytes that is done with again and again, ascending.
    `matmul_rate`: operations, in `dtype`.
    `blas`: what multiplies matrices on the CPU; `None` on a GPU.
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
        """Bytes per second at which no more than `size` bytes can be read again and again.

        A cache may hold all of them. So the rate is that of the measured size which is the next smaller one, or of a
        larger one if that was faster; below the smallest, the highest of all.
        """
        smaller = [measured for measured, _ in self.memory_rates if measured <= size]
        least = max(smaller, default=0)
        return max(rate for measured, rate in self.memory_rates if measured >= least)


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
        memory_rates=memory_rates(),
        # float32 holds every number of the others, and a CPU may have products of float32 only that are fast.
        matmul_rate=max(map(matmul_rate, {dtype, "float32"} if on_cpu else {dtype})),
    )
    mx.clear_cache()
    return limits


def read_seconds(files: Iterable[Path]) -> float:
    """How long it takes to read files from beginning to end, several at once, and to keep nothing."""
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
