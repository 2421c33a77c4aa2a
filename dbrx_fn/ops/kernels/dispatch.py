"""The dispatch plan in one kernel of one block. Stock operations take about fourteen launches."""

import mlx.core as mx

from dbrx_fn.ops.dispatch import Dispatch, dispatch, segment_count
from dbrx_fn.ops.kernels.cuda_module import Kernel, launch, on_gpu
from dbrx_fn.ops.twin import with_kernel

_MOST_EXPERTS = 32


def _fits(top_experts: mx.array, *, experts: int, rows: int) -> bool:
    return on_gpu() and experts <= _MOST_EXPERTS and rows > 1


def _kernel(top_experts: mx.array, *, experts: int, rows: int) -> Dispatch:
    pairs = top_experts.size
    segments = segment_count(pairs, experts, rows)
    plan = launch(
        Kernel("dispatch", (("EXPERTS", experts),)),
        # A plan has no gradient, and MLX would ask the kernel for one.
        [mx.stop_gradient(top_experts.astype(mx.uint32))],
        [((segments, rows), mx.int32), ((segments,), mx.int32), (top_experts.shape, mx.int32)],
        blocks=(1, 1, 1),
        threads=1024,
        scalars=(pairs, segments, rows),
    )
    return Dispatch(*plan)


plan = with_kernel(_kernel, fits=_fits, gradients=False)(dispatch)
"""`dbrx_fn.ops.dispatch.dispatch`, for what runs on kernels."""
