"""The default device: its back end and its memory."""

import os
from typing import Literal

import mlx.core as mx

Backend = Literal["metal", "cuda", "cpu"]


def backend() -> Backend:
    """The back end of the default device."""
    if mx.default_device().type == mx.cpu:
        return "cpu"
    return "cuda" if mx.cuda.is_available() else "metal"


def memory_size() -> int:
    """Bytes of memory that the default device has in all."""
    if backend() == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    info = mx.device_info()
    return int(info.get("max_recommended_working_set_size") or info.get("total_memory") or info["memory_size"])
