"""The device's memory: what stays resident on a Mac, what is given back, and how large one buffer may be.

`docs/mac.md` has the reasons and sources for Macs. On CUDA `make_room` and `limited` do something, on a CPU
nothing.
"""

import functools
import math
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from dbrx_fn.errors import DbrxError
from dbrx_fn.runtime.device import backend, memory_size, pool_size

_GIB = 2**30
_LARGE = 1 / 16
"""The smallest part of the working set that is wired. DBRX in 2 bits is a tenth of the largest Mac's."""
_NEAR = 0.9
"""The part of the working set above which the cache and the activations may no longer fit beside the weights."""
_SYSTEM = 8 * _GIB
"""Memory left to macOS and other programs by the limit that `room_remedy` names."""
_FULL = 0.92
"""The part of a CUDA device's memory above which it is nearly full."""
_ROOM = 1.03
"""The limit of `limited`, as a multiple of the memory that was planned."""
_WORTH = _GIB
"""Fewer unused bytes stay, since every decoding step takes its own from them."""
_SPAN = 256
"""Tokens after which unused buffers are given back. mlx-lm uses the same number."""


def _wanted_by_environment() -> bool:
    """The value of DBRX_FN_WIRED: 0 wires no memory, 1 or unset wires it."""
    wanted = os.environ.get("DBRX_FN_WIRED", "")
    if wanted not in ("", "0", "1"):
        warnings.warn(f"DBRX_FN_WIRED is {wanted!r} where 0 or 1 is expected: it is ignored.", stacklevel=2)
    return wanted != "0"


_WANTED = _wanted_by_environment()


class _Wiring:
    """The users of wired memory. MLX has one limit for the whole process, and generations may overlap or nest."""

    def __init__(self) -> None:
        # Garbage collection can close a dropped generator, which calls `end`, while this thread is in `begin`.
        self._lock = threading.RLock()
        self._users: set[object] = set()
        self._raised, self._before = False, 0

    def begin(self, user: object, limit: int) -> None:
        """Raises the limit for the first user."""
        with self._lock:
            self._users.add(user)
            if not self._raised:
                self._raised = True
                self._before = mx.set_wired_limit(limit)

    def end(self, user: object) -> None:
        """Gives the old limit back after the last user."""
        with self._lock:
            self._users.discard(user)
            if self._raised and not self._users:
                before, self._raised, self._before = self._before, False, 0
                mx.set_wired_limit(before)


_wiring = _Wiring()


@contextmanager
def wired(weights: Any) -> Iterator[None]:
    """On a Mac, keeps memory resident up to the recommended working set while a large model runs.

    The limit from before is given back at the end, also after an exception or Ctrl-C. Small models leave it alone, and
    so does DBRX_FN_WIRED=0.

    Args:
        weights: the tree, or a whole training state.
    """
    limit = _metal("max_recommended_working_set_size")
    nbytes = 0 if limit is None else _nbytes(weights)
    # Training replaces its state, and the first one's memory must become free.
    del weights
    if limit is None or nbytes < _LARGE * limit or not _WANTED:
        yield
        return
    if nbytes > _NEAR * limit:
        warnings.warn(
            f"The weights take {nbytes / _GIB:.1f} GiB and macOS recommends that the GPU uses at most"
            f" {limit / _GIB:.1f} GiB, so every token may have to wait for the disk: {room_remedy(nbytes)}.",
            stacklevel=3,
        )
    user = object()
    try:
        _wiring.begin(user, limit)
        yield
    finally:
        try:
            # MLX asks that nothing is computed while the limit changes.
            mx.synchronize()
        finally:
            _wiring.end(user)


@contextmanager
def limited(nbytes: int) -> Iterator[None]:
    """On a CUDA device, operations wait for those before them while more than `nbytes` and 3% are in use.

    MLX starts operations long before the device gets to them, and takes the memory of each at once. That is up to 7 GiB
    in a step of training DBRX (`docs/adapters.md`), though the device never needs it. A lower limit from before stays.
    Up to half of the device's memory nothing waits, since small operations would take longer.
    """
    if backend() != "cuda":
        yield
        return
    limit = max(int(_ROOM * nbytes), memory_size() // 2)
    before = mx.set_memory_limit(limit)
    try:
        if before < limit:
            mx.set_memory_limit(before)
        yield
    finally:
        mx.set_memory_limit(before)


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


def make_room(rows: int, time: int) -> None:
    """Gives unused memory back to a CUDA device that is nearly full, before `time` tokens of each of `rows` sequences.

    While MLX's memory pool holds more than 95% of the memory, MLX gives up all unused buffers each time that it needs a
    new one. Buffers that the host wrote wait for the device then, and decoding several sequences takes up to a fifth
    longer (`docs/performance.md`). The pool shrinks only when somebody waits for the device, so this waits. Other work
    has no such buffers.

    A lower limit of MLX's would be worse: while arrays in use take more than that limit, MLX waits for the device after
    every operation.
    """
    if backend() != "cuda":
        return
    used, unused = mx.get_active_memory(), mx.get_cache_memory()
    if rows > 1 and time == 1:
        held = pool_size()
        if held > mx.get_memory_limit() and held - used >= _WORTH:
            mx.clear_cache()
            mx.synchronize()
    elif unused >= _WORTH and used + unused > _FULL * _cuda_memory():
        mx.clear_cache()


@functools.cache
def _cuda_memory() -> int:
    """The device's memory in bytes. Asking for it takes longer than a decoding step has."""
    return memory_size()


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
