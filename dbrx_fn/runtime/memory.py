"""The device's memory: kept resident while a large model runs on a Mac, given back in between, never asked for whole.

`docs/mac.md` says what each of these is for, and where it was learned. Elsewhere than on a Mac (`backend() == "metal"`)
all but `release_unused` do nothing.
"""

import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from dbrx_fn.errors import DbrxError
from dbrx_fn.runtime.device import backend

_GIB = 2**30
_LARGE = 1 / 16
"""Weights of this part of the working set are worth wiring. Of the largest Mac's, DBRX of 2 bits is a tenth."""
_NEAR = 0.9
"""From this part of the working set on, what else a generation needs may no longer fit beside the weights."""
_SYSTEM = 8 * _GIB
"""What macOS and its programs are left with when somebody raises the limit."""
_SPAN = 256
"""Tokens after which unused buffers are given back, as often as mlx-lm does it."""


class _Wiring:
    """Who has memory wired: MLX has one limit for the whole process, and generations may overlap or nest."""

    def __init__(self) -> None:
        # A generator that is dropped may be closed in the middle of these methods, in the same thread.
        self._lock = threading.RLock()
        self._users: set[object] = set()
        self._raised, self._before = False, 0

    def begin(self, user: object, limit: int) -> None:
        """The first one raises the limit."""
        with self._lock:
            self._users.add(user)
            if not self._raised:
                self._raised = True
                self._before = mx.set_wired_limit(limit)

    def end(self, user: object) -> None:
        """The last one gives the old limit back."""
        with self._lock:
            self._users.discard(user)
            if self._raised and not self._users:
                before, self._raised, self._before = self._before, False, 0
                mx.set_wired_limit(before)


_wiring = _Wiring()


@contextmanager
def wired(weights: Any) -> Iterator[None]:
    """On a Mac, keeps memory resident up to the recommended working set while a large model runs.

    The limit that was there before is given back at the end, whatever ends it. Small models leave it alone.

    Args:
        weights: the tree, or a whole training state.
    """
    limit, nbytes = _metal("max_recommended_working_set_size"), _nbytes(weights)
    # A training state is replaced step by step, and the first one's memory is needed again.
    del weights
    if limit is None or nbytes < _LARGE * limit:
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
            # The limit mustn't change while anything is computed.
            mx.synchronize()
        finally:
            _wiring.end(user)


def room_remedy(nbytes: int) -> str:
    """What to do where weights of so many bytes find too little room, as the end of a sentence."""
    memory = _metal("memory_size")
    wanted = math.ceil(1.2 * nbytes / 2**20)
    if memory is None or wanted * 2**20 > memory - _SYSTEM:
        return "take a smaller checkpoint or quantization, or a larger machine"
    return (
        "take a smaller quantization, or give the GPU more of the memory until the next restart with"
        f" sudo sysctl iogpu.wired_limit_mb={wanted}"
    )


def release_unused(before: int, after: int) -> None:
    """Gives a GPU's unused buffers back to the system, where a sequence has come to another 256 tokens.

    MLX keeps each buffer for the next array of about that size. In a sequence that grows, such arrays may never come.
    A CPU keeps them, since new memory costs it more.

    Args:
        before: tokens there were.
        after: tokens there are now.
    """
    if after // _SPAN > before // _SPAN and backend() != "cpu":
        mx.clear_cache()


def reading_device() -> mx.Device:
    """Where tensors are read from files and put together: on a Mac by the CPU, else by the default device.

    macOS ends a process whose GPU waits seconds for a file. Within `mx.stream(reading_device())` no GPU ever does.
    """
    return mx.Device(mx.cpu) if backend() == "metal" else mx.default_device()


def check_buffer(what: str, nbytes: int, remedy: str, error: type[DbrxError]) -> None:
    """Raises `error` where an array is larger than any single buffer of the device; only Metal has such a limit.

    Args:
        what: the array, as the beginning of a sentence.
        nbytes: its bytes.
        remedy: what to do, as the end of one.
        error: what to raise.
    """
    largest = _metal("max_buffer_length")
    if largest is not None and nbytes > largest:
        raise error(
            f"{what} takes {nbytes / _GIB:.1f} GiB in one piece and this device's largest buffer is"
            f" {largest / _GIB:.1f} GiB: {remedy}."
        )


def _metal(name: str) -> int | None:
    """What Metal says of the device; `None` on others."""
    value = mx.device_info().get(name) if backend() == "metal" else None
    return None if value is None else int(value)


def _nbytes(tree: Any) -> int:
    leaves: dict[str, object] = dict(tree_flatten(tree))
    return sum(leaf.nbytes for leaf in leaves.values() if isinstance(leaf, mx.array))
