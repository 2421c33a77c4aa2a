"""Dispatch plans in one kernel of one block. Stock operations take about fourteen launches."""

import mlx.core as mx

from dbrx_fn.ops.dispatch import Dispatch, PackedDispatch, dispatch, packed_dispatch, packed_slots, segment_count
from dbrx_fn.ops.kernels.cuda_module import Kernel, launch, on_gpu
from dbrx_fn.ops.twin import with_kernel

_MOST_EXPERTS = 32


def _fits(top_experts: mx.array, *, experts: int, rows: int) -> bool:
    return on_gpu() and experts <= _MOST_EXPERTS and rows > 1


def _kernel(top_experts: mx.array, *, experts: int, rows: int) -> Dispatch:
    slots = segment_count(top_experts.size, experts, rows) * rows
    segment_experts, pair_slots, slot_pairs = _launch(
        top_experts, [(slots,)], experts=experts, rows=rows, unit=rows, packed=False
    )
    return Dispatch(slot_pairs.reshape(-1, rows), segment_experts, pair_slots)


def _fits_packed(top_experts: mx.array, *, experts: int, rows: int, unit: int) -> bool:
    return on_gpu() and experts <= _MOST_EXPERTS


def _packed_kernel(top_experts: mx.array, *, experts: int, rows: int, unit: int) -> PackedDispatch:
    pairs = top_experts.size
    more = [top_experts.shape, (segment_count(pairs, experts, rows) + 1,)]
    segment_experts, pair_slots, pair_segments, first_slots = _launch(
        top_experts, more, experts=experts, rows=rows, unit=unit, packed=True
    )
    return PackedDispatch(segment_experts, pair_slots, pair_segments, first_slots, packed_slots(pairs, experts, unit))


plan = with_kernel(_kernel, fits=_fits, gradients=False)(dispatch)
"""`dbrx_fn.ops.dispatch.dispatch`, for what runs on kernels."""
packed_plan = with_kernel(_packed_kernel, fits=_fits_packed, gradients=False)(packed_dispatch)
"""`dbrx_fn.ops.dispatch.packed_dispatch`, for what runs on kernels."""


def _launch(
    top_experts: mx.array, more: list[tuple[int, ...]], *, experts: int, rows: int, unit: int, packed: bool
) -> list[mx.array]:
    """The segments' experts, the pairs' slots, and what else this kind of plan has, of shapes `more` (dispatch.cu)."""
    pairs = top_experts.size
    segments = segment_count(pairs, experts, rows)
    return launch(
        Kernel("dispatch", (("EXPERTS", experts), ("PACKED", int(packed)))),
        # A plan has no gradient, and MLX would ask the kernel for one.
        [mx.stop_gradient(top_experts.astype(mx.uint32))],
        [(shape, mx.int32) for shape in ((segments,), top_experts.shape, *more)],
        blocks=(1, 1, 1),
        threads=1024,
        scalars=(pairs, segments, rows, unit),
    )
