"""A kernel that only reads memory, to measure the rate that a GPU reaches at best.

Stock operations are no measure: they read only as fast as their kernels do, and need another launch to read an array
again.
"""

import mlx.core as mx
from jaxtyping import UInt32

from dbrx_fn.ops.kernels.cuda_module import Kernel, launch, multiprocessors
from dbrx_fn.runtime.compile import typed

# With fewer blocks than run at once, the next launch would run beside this one and share its cached data.
_THREADS, _BLOCKS_EACH, _AHEAD = 256, 8, 4


def wave() -> int:
    """Bytes that are read at once. Array sizes must be multiples of this."""
    return _blocks() * _THREADS * _AHEAD * 16


def _blocks() -> int:
    return _BLOCKS_EACH * multiprocessors()


@typed
def read_memory(data: UInt32[mx.array, " words"], times: int) -> UInt32[mx.array, " thread"]:
    """Reads all of `data`, `times` times. Returns for each thread the exclusive or of the words that it read."""
    assert data.nbytes % wave() == 0
    (out,) = launch(
        Kernel("read_memory", (("THREADS", _THREADS), ("AHEAD", _AHEAD))),
        [data],
        [((_blocks() * _THREADS,), mx.uint32)],
        blocks=(_blocks(), 1, 1),
        threads=_THREADS,
        scalars=(data.nbytes // 16, times),
    )
    return out
