"""Compiles this folder's CUDA sources with NVRTC at run time, and launches them as MLX operations.

The sources include no headers but this folder's, so each compiles fast (`docs/performance.md`, section 3). NVRTC comes
with MLX, and `mx.fast.precompiled_cuda_kernel` launches its output. `mx.fast.cuda_kernel` would include MLX's headers.
"""

import ctypes
import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from dbrx_fn.runtime.device import takes_kernels

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_HOPPER = (9, 0)


def on_hopper() -> bool:
    """Whether the default device is a GPU that these kernels are made for (H100, H200).

    `DBRX_FN_KERNELS=0` in the environment switches the kernels off, and so does `as_if(kernels=False)`.
    """
    return takes_kernels() and mx.default_device().type == mx.gpu and _has_hopper()


@functools.cache
def _has_hopper() -> bool:
    if not mx.cuda.is_available() or os.environ.get("DBRX_FN_KERNELS") == "0":
        return False
    info = mx.device_info(mx.gpu)
    if (info.get("compute_capability_major"), info.get("compute_capability_minor")) != _HOPPER:
        return False
    if _nvrtc() is None or not hasattr(mx.fast, "precompiled_cuda_kernel"):
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

    Args:
        kernel: the kernel.
        inputs: arrays. Strided ones are copied.
        outputs: shapes and dtypes of the results. The kernel gets them uninitialized.
        blocks: the grid's size, in blocks.
        threads: number of threads per block.
        scalars: arguments after inputs and outputs, as int or float.
        shared_memory: dynamic shared memory, in bytes.
    """
    x, y, z = blocks
    made: list[mx.array] = mx.fast.precompiled_cuda_kernel(
        name=kernel.file,
        compiled_source=compiled_kernel(kernel),
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


@functools.cache
def compiled_kernel(kernel: Kernel) -> bytes:
    """The machine code for Hopper GPUs.

    Raises:
        RuntimeError: if NVRTC is missing, or refuses the source. The message has its log.
    """
    nvrtc = _nvrtc()
    if nvrtc is None:
        raise RuntimeError("NVRTC, which comes with MLX's CUDA build, can't be loaded.")
    names = sorted(path.name for path in _FOLDER.glob("*.cuh"))
    headers = [(_FOLDER / name).read_bytes() for name in names]
    source = (_FOLDER / f"{kernel.file}.cu").read_bytes()
    options = [b"--gpu-architecture=sm_90a", b"--std=c++17", *(f"-D{n}={v}".encode() for n, v in kernel.defines)]
    program = ctypes.c_void_p()

    def strings(items: Sequence[bytes]) -> ctypes.Array[ctypes.c_char_p]:
        return (ctypes.c_char_p * len(items))(*items)

    def read(size_of: str, read_to: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(nvrtc, size_of)(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, read_to)(program, buffer)
        return buffer.raw

    nvrtc.nvrtcCreateProgram(
        ctypes.byref(program),
        source,
        f"{kernel.file}.cu".encode(),
        len(names),
        strings(headers),
        strings([name.encode() for name in names]),
    )
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), strings(options)):
            log = read("nvrtcGetProgramLogSize", "nvrtcGetProgramLog").rstrip(b"\0").decode(errors="replace")
            raise RuntimeError(f"NVRTC can't compile {kernel.file}.cu: {log}")
        return read("nvrtcGetCUBINSize", "nvrtcGetCUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def _nvrtc() -> ctypes.CDLL | None:
    # MLX has already loaded one of these, so the bare name is enough.
    for name in ("libnvrtc.so.13", "libnvrtc.so.12"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None
