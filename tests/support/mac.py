"""What MLX says and is told on a Mac: its calls that only Metal answers, recorded on any machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import pytest

from dbrx_fn.runtime.device import as_if

GIB = 2**30
BEFORE = 123
"""The wired limit that somebody set before."""


class Mac:
    """A Mac whose GPU is recommended to use `working_set` bytes.

    `calls`: those that set the limit, wait for the device or give memory back, in order.
    `limit`: the wired limit now.
    """

    def __init__(self, working_set: int, memory: int = 64 * GIB, largest_buffer: int = 32 * GIB) -> None:
        self.working_set = working_set
        self.info = {
            "device_name": "Apple M0",
            "max_recommended_working_set_size": working_set,
            "memory_size": memory,
            "max_buffer_length": largest_buffer,
        }
        self.calls: list[Any] = []
        self.limit = BEFORE

    def set_wired_limit(self, limit: int) -> int:
        """As MLX: returns the old limit."""
        self.calls.append(limit)
        old, self.limit = self.limit, limit
        return old

    def synchronize(self) -> None:
        """Notes that the device was waited for."""
        self.calls.append("synchronize")

    def clear_cache(self) -> None:
        """Notes that unused memory was given back."""
        self.calls.append("clear_cache")

    @contextmanager
    def here(self) -> Iterator["Mac"]:
        """Within, MLX's calls go to this Mac and arrangements are those of Metal. The CPU still computes."""
        with pytest.MonkeyPatch.context() as patch, as_if(backend="metal"):
            patch.setattr(mx, "device_info", lambda: self.info)
            for name in ("set_wired_limit", "synchronize", "clear_cache"):
                patch.setattr(mx, name, getattr(self, name))
            yield self
