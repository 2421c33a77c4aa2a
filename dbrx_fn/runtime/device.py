"""The default device: its back end, its memory, and whether layers are compiled there.

`as_if` makes the choices of another back end: within `as_if(backend="metal")` a CPU cuts segments and spans as a Mac
does. So the tests of one machine cover the choices for all machines.
"""

import ctypes
import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, NamedTuple

import mlx.core as mx

Backend = Literal["metal", "cuda", "cpu"]

# CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT and CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT in cuda.h.
_MULTIPROCESSOR_COUNT, _POOL_SIZE = 16, 5


class Gpu(NamedTuple):
    """What this project's kernels need to know of an NVIDIA GPU.

    `capability`: its compute capability, (9, 0) for an H100.
    `multiprocessors`: their number.
    """

    capability: tuple[int, int]
    multiprocessors: int


class _Choices(NamedTuple):
    """The choices of `as_if`. `None` leaves a choice to the device."""

    backend: Backend | None
    compiles: bool | None
    kernels: bool | None
    gpu: Gpu | None


def _compiles_by_environment() -> bool | None:
    """The value of DBRX_FN_COMPILE: 1 compiles layers on every device, 0 on none, unset leaves it to the device."""
    wanted = os.environ.get("DBRX_FN_COMPILE", "")
    if wanted not in ("", "0", "1"):
        warnings.warn(f"DBRX_FN_COMPILE is {wanted!r} where 0 or 1 is expected: it is ignored.", stacklevel=2)
    return None if wanted not in ("0", "1") else wanted == "1"


_OWN_CHOICES = _Choices(None, _compiles_by_environment(), None, None)
_choices = ContextVar("choices", default=_OWN_CHOICES)


@contextmanager
def as_if(
    *,
    backend: Backend | None = None,
    compiles: bool | None = None,
    kernels: bool | None = None,
    gpu: Gpu | None = None,
) -> Iterator[None]:
    """Overrides choices in this thread. What isn't given is unchanged.

    Args:
        backend: the back end to choose for. The default device still computes, so no other machine's kernels run.
        compiles: whether layers are compiled.
        kernels: whether this project's kernels run.
        gpu: the NVIDIA GPU to choose kernels for. Their launches can't be evaluated without that GPU.
    """
    told = _choices.get()
    token = _choices.set(
        _Choices(
            told.backend if backend is None else backend,
            told.compiles if compiles is None else compiles,
            told.kernels if kernels is None else kernels,
            told.gpu if gpu is None else gpu,
        )
    )
    try:
        yield
    finally:
        _choices.reset(token)


def backend() -> Backend:
    """The back end to make choices for: the default device's, unless `as_if` names another."""
    told = _choices.get().backend
    if told is not None:
        return told
    if on_cpu():
        return "cpu"
    return "cuda" if mx.cuda.is_available() else "metal"


def compiles() -> bool:
    """Whether layers are compiled: on GPUs, unless `as_if` or DBRX_FN_COMPILE says otherwise."""
    told = _choices.get().compiles
    return not on_cpu() if told is None else told


def takes_kernels() -> bool:
    """Whether this project's own kernels run if they fit: yes, unless `as_if` says otherwise."""
    return _choices.get().kernels is not False


def nvidia_gpu() -> Gpu | None:
    """The default device if it is an NVIDIA GPU, unless `as_if` names one."""
    told = _choices.get().gpu
    if told is not None:
        return told
    return None if on_cpu() or not mx.cuda.is_available() else _own_gpu()


@functools.cache
def _own_gpu() -> Gpu | None:
    info = mx.device_info(mx.gpu)
    major, minor = info.get("compute_capability_major"), info.get("compute_capability_minor")
    multiprocessors = _own_multiprocessors()
    if not isinstance(major, int) or not isinstance(minor, int) or multiprocessors is None:
        return None
    return Gpu((major, minor), multiprocessors)


def _own_multiprocessors() -> int | None:
    """The first GPU's number of multiprocessors, from NVIDIA's driver. MLX doesn't say it."""
    device, found = ctypes.c_int(), ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        failed = (
            driver.cuInit(0)
            or driver.cuDeviceGet(ctypes.byref(device), 0)
            or driver.cuDeviceGetAttribute(ctypes.byref(found), _MULTIPROCESSOR_COUNT, device)
        )
    except (OSError, AttributeError):
        return None
    return None if failed else found.value


def traced_for() -> tuple[Backend, bool, Gpu | None]:
    """All that a trace depends on beside its arguments."""
    return backend(), takes_kernels(), _choices.get().gpu


def on_cpu() -> bool:
    """Whether the default device is a CPU, regardless of `as_if`."""
    return mx.default_device().type == mx.cpu


def memory_size() -> int:
    """The default device's total memory, in bytes."""
    if on_cpu():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    info = mx.device_info()
    return int(info.get("max_recommended_working_set_size") or info.get("total_memory") or info["memory_size"])


def pool_size() -> int:
    """The bytes that the memory pool of the first NVIDIA GPU has taken from it, 0 without such a GPU.

    MLX allocates from this pool. Only the driver says how large it is.
    """
    pool = _memory_pool()
    if pool is None:
        return 0
    driver, handle = pool
    held = ctypes.c_uint64()
    return 0 if driver.cuMemPoolGetAttribute(handle, _POOL_SIZE, ctypes.byref(held)) else held.value


@functools.cache
def _memory_pool() -> tuple[ctypes.CDLL, ctypes.c_void_p] | None:
    handle = ctypes.c_void_p()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        failed = driver.cuInit(0) or driver.cuDeviceGetDefaultMemPool(ctypes.byref(handle), 0)
    except (OSError, AttributeError):
        return None
    return None if failed else (driver, handle)
