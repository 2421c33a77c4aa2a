"""A kernel that only reads memory, to measure the rate that a GPU reaches at best.

Stock operations are no measure: they read only as fast as their kernels do, and need another launch to read an array
again.
"""

import mlx.core as mx
from jaxtyping import UInt32

from dbrx_fn.ops.kernels.cuda_module import Kernel, launch
from dbrx_fn.runtime.compile import typed

_THREADS = 256
_BLOCKS = 8 * 132
"""As many blocks as run at once. With fewer, the next launch would run beside this one and share its cached data."""
_AHEAD = 4
WAVE = _BLOCKS * _THREADS * _AHEAD * 16
"""Bytes that are read at once. Array sizes are multiples of this."""


@typed
def read_memory(data: UInt32[mx.array, " words"], times: int) -> UInt32[mx.array, " thread"]:
    """Reads all of `data`, `times` times. Returns for each thread the exclusive or of the words that it read."""
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
