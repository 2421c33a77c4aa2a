"""Reading memory and nothing else, to measure how fast that goes at best.

A stock operation's reading is as fast as its kernel, and it can't read a small array again without another launch.
"""

import mlx.core as mx
from jaxtyping import UInt32

from dbrx_fn.ops.kernels.cuda_module import Kernel, launch
from dbrx_fn.runtime.compile import typed

_THREADS = 256
_BLOCKS = 8 * 132
"""As many as run at once. With fewer, the next launch would run beside this one and find in the cache what it read."""
_AHEAD = 4
WAVE = _BLOCKS * _THREADS * _AHEAD * 16
"""Bytes that are read at once; arrays are a multiple of that."""


@typed
def read_memory(data: UInt32[mx.array, " words"], times: int) -> UInt32[mx.array, " thread"]:
    """Reads all of `data` so many times; returns the exclusive or of each thread's words, of all that it read."""
    assert data.nbytes % WAVE == 0
    (out,) = launch(
        Kernel("read_memory", (("THREADS", _THREADS), ("AHEAD", _AHEAD))),
        [data],
        [((_BLOCKS * _THREADS,), mx.uint32)],
        blocks=(_BLOCKS, 1, 1),
        threads=_THREADS,
        scalars=(data.nbytes // 16, times),
    )
    return out
