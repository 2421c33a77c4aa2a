"""The device's memory: what stays resident, what is given back, and how large one buffer may be.

`docs/mac.md` has the reasons and sources for Macs. On CUDA only `wired` does something, and on a CPU nothing does.
"""

import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from dbrx_fn.errors import DbrxError
from dbrx_fn.runtime.device import backend, memory_size

_GIB = 2**30
_LARGE = 1 / 16
"""The smallest part of the working set that is wired. DBRX in 2 bits is a tenth of the largest Mac's."""
_NEAR = 0.9
"""The part of the working set above which the cache and the activations may no longer fit beside the weights."""
_SYSTEM = 8 * _GIB
"""Memory left to macOS and other programs by the limit that `room_remedy` names."""
_CUDA_LIMIT = 0.92
"""The part of a CUDA device's memory that MLX may fill. Near 0.95 it gives back its unused buffers with every new one,
and decoding takes up to a fifth longer (`docs/serving.md`)."""
_SPAN = 256
"""Tokens after which unused buffers are given back. mlx-lm uses the same number."""


def _wanted_by_environment() -> bool:
    """The value of DBRX_FN_WIRED: 0 wires no memory, 1 or unset wires it."""
    wanted = os.environ.get("DBRX_FN_WIRED", "")
    if wanted not in ("", "0", "1"):
        warnings.warn(f"DBRX_FN_WIRED is {wanted!r} where 0 or 1 is expected: it is ignored.", stacklevel=2)
    return wanted != "0"


_WANTED = _wanted_by_environment()


class _Limit:
    """The users of one of MLX's limits. MLX has one for the whole process, and generations may overlap or nest."""

    def __init__(self, change: Callable[[int], int], *, only_lowers: bool = False) -> None:
        self._change, self._only_lowers = change, only_lowers
        # Garbage collection can close a dropped generator, which calls `end`, while this thread is in `begin`.
        self._lock = threading.RLock()
        self._users: set[object] = set()
        self._changed, self._before = False, 0

    def begin(self, user: object, limit: int) -> None:
        """Changes the limit for the first user."""
        with self._lock:
            self._users.add(user)
            if not self._changed:
                self._changed = True
                self._before = self._change(limit)
                if self._only_lowers and self._before < limit:
                    self._change(self._before)

    def end(self, user: object) -> None:
        """Gives the old limit back after the last user."""
        with self._lock:
            self._users.discard(user)
            if self._changed and not self._users:
                before, self._changed, self._before = self._before, False, 0
                self._change(before)


_wired_limit = _Limit(lambda limit: mx.set_wired_limit(limit))
_cuda_limit = _Limit(lambda limit: mx.set_memory_limit(limit), only_lowers=True)


@contextmanager
def wired(weights: Any) -> Iterator[None]:
    """While a model runs, keeps a Mac's memory resident and leaves a part of a CUDA device's memory free.

    On a Mac memory stays resident up to the recommended working set. Small models leave that limit alone, and so does
    DBRX_FN_WIRED=0. The limit from before is given back at the end, also after an exception or Ctrl-C.

    Args:
        weights: the tree, or a whole training state.
    """
    limit, user = _metal("max_recommended_working_set_size"), object()
    nbytes = 0 if limit is None else _nbytes(weights)
    # Training replaces its state, and the first one's memory must become free.
    del weights
    if backend() == "cuda":
        try:
            _cuda_limit.begin(user, int(_CUDA_LIMIT * memory_size()))
            yield
        finally:
            _cuda_limit.end(user)
        return
    if limit is None or nbytes < _LARGE * limit or not _WANTED:
        yield
        return
    if nbytes > _NEAR * limit:
        warnings.warn(
            f"The weights take {nbytes / _GIB:.1f} GiB and macOS recommends that the GPU uses at most"
            f" {limit / _GIB:.1f} GiB, so every token may have to wait for the disk: {room_remedy(nbytes)}.",
            stacklevel=3,
        )
    try:
        _wired_limit.begin(user, limit)
        yield
    finally:
        try:
            # MLX asks that nothing is computed while the limit changes.
            mx.synchronize()
        finally:
            _wired_limit.end(user)


def room_remedy(nbytes: int) -> str:
    """What to do about `nbytes` of weights that find too little room, as the end of a sentence."""
    memory = _metal("memory_size")
    wanted = math.ceil(1.2 * nbytes / 2**20)
    if memory is None or wanted * 2**20 > memory - _SYSTEM:
        return "take a smaller checkpoint or quantization, or a larger machine"
    return (
        "take a smaller quantization, or give the GPU more of the memory until the next restart with"
        f" sudo sysctl iogpu.wired_limit_mb={wanted}"
    )


def release_unused(before: int, after: int) -> None:
    """Gives a Mac's unused buffers back to the system each time that a sequence has grown by another 256 tokens.

    MLX keeps a freed buffer for the next array of about that size. While a sequence grows, that array may never come.
    Elsewhere nothing is given back: with CUDA a prompt of 2,048 tokens would take 4% longer (`docs/mac.md`).

    Args:
        before: the sequence's tokens until now.
        after: its tokens from now on.
    """
    if after // _SPAN > before // _SPAN and backend() == "metal":
        mx.clear_cache()


def reading_device() -> mx.Device:
    """The device that reads tensors from files and puts them together: a Mac's CPU, elsewhere the default device.

    macOS ends a process whose GPU waits seconds for a file. Within `mx.stream(reading_device())` no GPU ever does.
    """
    return mx.Device(mx.cpu) if backend() == "metal" else mx.default_device()


def check_buffer(what: str, nbytes: int, remedy: str, error: type[DbrxError]) -> None:
    """Raises `error` if an array is larger than the device's largest buffer. Only Metal has such a limit.

    Args:
        what: the array, as the beginning of a sentence.
        nbytes: its bytes.
        remedy: what to do, as the end of the sentence.
        error: what to raise.
    """
    largest = _metal("max_buffer_length")
    if largest is not None and nbytes > largest:
        raise error(
            f"{what} takes {nbytes / _GIB:.1f} GiB in one piece and this device's largest buffer is"
            f" {largest / _GIB:.1f} GiB: {remedy}."
        )


def _metal(name: str) -> int | None:
    """One of the numbers that Metal reports of the device; `None` on other devices."""
    value = mx.device_info().get(name) if backend() == "metal" else None
    return None if value is None else int(value)


def _nbytes(tree: Any) -> int:
    leaves: dict[str, object] = dict(tree_flatten(tree))
    return sum(leaf.nbytes for leaf in leaves.values() if isinstance(leaf, mx.array))
