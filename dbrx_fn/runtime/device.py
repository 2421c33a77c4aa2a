"""The default device: its back end, its memory, and whether layers are compiled there.

`as_if` makes the choices of another back end: within `as_if(backend="metal")` a CPU cuts segments and spans as a Mac
does. So the tests of one machine cover the choices for all machines.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, NamedTuple

import mlx.core as mx

Backend = Literal["metal", "cuda", "cpu"]


class _Choices(NamedTuple):
    """The choices of `as_if`. `None` leaves a choice to the device."""

    backend: Backend | None
    compiles: bool | None
    kernels: bool | None


def _compiles_by_environment() -> bool | None:
    """The value of DBRX_FN_COMPILE: 1 compiles layers on every device, 0 on none, unset leaves it to the device."""
    wanted = os.environ.get("DBRX_FN_COMPILE", "")
    if wanted not in ("", "0", "1"):
        warnings.warn(f"DBRX_FN_COMPILE is {wanted!r} where 0 or 1 is expected: it is ignored.", stacklevel=2)
    return None if wanted not in ("0", "1") else wanted == "1"


_OWN_CHOICES = _Choices(None, _compiles_by_environment(), None)
_choices = ContextVar("choices", default=_OWN_CHOICES)


@contextmanager
def as_if(
    *, backend: Backend | None = None, compiles: bool | None = None, kernels: bool | None = None
) -> Iterator[None]:
    """Overrides choices in this thread: the back end to choose for, whether layers are compiled, whether kernels run.

    The default device still computes, so no other machine's kernels run. What isn't given is unchanged.
    """
    told = _choices.get()
    token = _choices.set(
        _Choices(
            told.backend if backend is None else backend,
            told.compiles if compiles is None else compiles,
            told.kernels if kernels is None else kernels,
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


def traced_for() -> tuple[Backend, bool]:
    """All that a trace depends on beside its arguments."""
    return backend(), takes_kernels()


def on_cpu() -> bool:
    """Whether the default device is a CPU, regardless of `as_if`."""
    return mx.default_device().type == mx.cpu


def memory_size() -> int:
    """The default device's total memory, in bytes."""
    if on_cpu():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    info = mx.device_info()
    return int(info.get("max_recommended_working_set_size") or info.get("total_memory") or info["memory_size"])
