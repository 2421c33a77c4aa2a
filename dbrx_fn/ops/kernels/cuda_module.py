"""Compiles this folder's CUDA sources with NVRTC at run time, and launches them as MLX operations.

The sources include no headers but this folder's, so each compiles fast (`docs/performance.md`, section 3). NVRTC comes
with MLX, and `mx.fast.precompiled_cuda_kernel` launches its output. `mx.fast.cuda_kernel` would include MLX's headers.
"""

import functools
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from dbrx_fn.ops.kernels import nvrtc
from dbrx_fn.ops.kernels.cache_folder import cached
from dbrx_fn.runtime.device import Gpu, nvidia_gpu, takes_kernels

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
"""The sources' folder."""
_AMPERE, _HOPPER = (8, 0), (9, 0)


def _wanted_by_environment() -> bool | None:
    """The value of DBRX_FN_KERNELS: 0 switches the kernels off, 1 takes them on GPUs where nobody has measured them."""
    wanted = os.environ.get("DBRX_FN_KERNELS", "")
    if wanted not in ("", "0", "1"):
        warnings.warn(f"DBRX_FN_KERNELS is {wanted!r} where 0 or 1 is expected: it is ignored.", stacklevel=2)
    return None if wanted not in ("0", "1") else wanted == "1"


_WANTED = _wanted_by_environment()


def on_gpu() -> bool:
    """Whether kernels run on the default device: on Hopper GPUs (H100, H200), for which they are made.

    Other NVIDIA GPUs from Ampere on take them with DBRX_FN_KERNELS=1, since nobody has measured them there.
    DBRX_FN_KERNELS=0 switches the kernels off, and so does `as_if(kernels=False)`. `on_hopper` is for kernels that
    compile for Hopper GPUs only.
    """
    gpu = nvidia_gpu()
    return gpu is not None and takes_kernels() and _can_run(gpu)


def on_hopper() -> bool:
    """Whether kernels run on the default device, and it has what hopper.cuh needs."""
    gpu = nvidia_gpu()
    return gpu is not None and gpu.capability == _HOPPER and on_gpu()


def multiprocessors() -> int:
    """The number of multiprocessors of the GPU that kernels run on."""
    gpu = nvidia_gpu()
    assert gpu is not None
    return gpu.multiprocessors


@functools.cache
def _can_run(gpu: Gpu) -> bool:
    wanted = gpu.capability == _HOPPER if _WANTED is None else _WANTED and gpu.capability >= _AMPERE
    if not wanted:
        return False
    if not nvrtc.compiles_for(gpu.capability) or not hasattr(mx.fast, "precompiled_cuda_kernel"):
        logger.warning("This MLX can't run dbrx_fn's kernels: slower stock operations take their place.")
        return False
    return True


@dataclass(frozen=True)
class Kernel:
    """One kernel: its source file, which also gives its name, and the macros of its variant."""

    file: str
    defines: tuple[tuple[str, int | str], ...] = ()


def launch(
    kernel: Kernel,
    inputs: Sequence[mx.array],
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    *,
    blocks: tuple[int, int, int],
    threads: int,
    scalars: Sequence[int | float] = (),
    shared_memory: int = 0,
) -> list[mx.array]:
    """Launches a kernel, lazily.

    A kernel must have no clusters of blocks. MLX puts kernels into CUDA graphs that it made for other kernels, and the
    shape of clusters isn't updated there. So the next kernel could run with these clusters and compute garbage
    (`docs/performance.md`, section 4).

    Args:
        kernel: the kernel.
        inputs: arrays. Strided ones are copied.
        outputs: shapes and dtypes of the results. The kernel gets them uninitialized.
        blocks: the grid's size, in blocks.
        threads: number of threads per block.
        scalars: arguments after inputs and outputs, as int or float.
        shared_memory: dynamic shared memory, in bytes.
    """
    gpu = nvidia_gpu()
    assert gpu is not None
    x, y, z = blocks
    made: list[mx.array] = mx.fast.precompiled_cuda_kernel(
        name=kernel.file,
        compiled_source=compiled_kernel(kernel, architecture(gpu.capability)),
        inputs=list(inputs),
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
        # MLX accepts only floats that float32 represents exactly.
        scalars=[scalar if isinstance(scalar, int) else float(np.float32(scalar)) for scalar in scalars],
        grid=(x * threads, y, z),
        threadgroup=(threads, 1, 1),
        shared_memory=shared_memory,
        ensure_row_contiguous=True,
    )
    return made


def architecture(capability: tuple[int, int]) -> str:
    """NVRTC's name of the architecture. Only sm_90a has Hopper's products of matrices in shared memory."""
    major, minor = capability
    return f"sm_{major}{minor}" + ("a" if capability == _HOPPER else "")


@functools.cache
def compiled_kernel(kernel: Kernel, architecture: str) -> bytes:
    """The machine code for an architecture, kept in the user's cache folder for later processes.

    The kernels of a long prompt take 10 s to compile (`docs/performance.md`).

    Raises:
        RuntimeError: if NVRTC is missing, or refuses the source. The message has its log.
    """
    source = _source(kernel, architecture)
    return cached(f"{kernel.file}-{source.digest()}", ".cubin", lambda: nvrtc.compile_source(source)[0])


def compile_kernel(kernel: Kernel, architecture: str, *options: str) -> tuple[bytes, str]:
    """The machine code for an architecture, and NVRTC's log. More of NVRTC's options may be given.

    Raises:
        RuntimeError: as in `compiled_kernel`.
    """
    return nvrtc.compile_source(_source(kernel, architecture, *options))


def _source(kernel: Kernel, architecture: str, *options: str) -> nvrtc.Source:
    defines = (f"-D{name}={value}" for name, value in kernel.defines)
    return nvrtc.Source(
        (FOLDER / f"{kernel.file}.cu").read_bytes(),
        {path.name: path.read_bytes() for path in sorted(FOLDER.glob("*.cuh"))},
        name=f"{kernel.file}.cu",
        options=(f"--gpu-architecture={architecture}", "--std=c++17", *defines, *options),
    )
