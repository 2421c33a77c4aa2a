"""Dispatch plans in one kernel of one block. Stock operations take about fourteen launches."""

import mlx.core as mx

from dbrx_fn.ops.dispatch import Dispatch, dispatch, segment_count
from dbrx_fn.ops.kernels.cuda_module import Kernel, launch, on_gpu
from dbrx_fn.ops.kernels.segments import PADDED_ROWS, Segments
from dbrx_fn.ops.twin import with_kernel

_MOST_EXPERTS = 32


def _fits(top_experts: mx.array, *, experts: int, rows: int) -> bool:
    return on_gpu() and experts <= _MOST_EXPERTS and rows > 1


def _kernel(top_experts: mx.array, *, experts: int, rows: int) -> Dispatch:
    slots = segment_count(top_experts.size, experts, rows) * rows
    slot_pairs, segment_experts, _, pair_slots = _launch(top_experts, slots, experts=experts, rows=rows, unit=rows)
    return Dispatch(slot_pairs.reshape(-1, rows), segment_experts, pair_slots)


plan = with_kernel(_kernel, fits=_fits, gradients=False)(dispatch)
"""`dbrx_fn.ops.dispatch.dispatch`, for what runs on kernels."""


def packed_plan(
    top_experts: mx.array, *, experts: int, rows: int, unit: int = PADDED_ROWS
) -> tuple[Segments, mx.array]:
    """A plan with little padding, for `medium_segments` and `long_segments`.

    An expert's segments but the last have `rows` rows. The last one has the rest, rounded up to a multiple of `unit`.

    Args:
        top_experts: `[tokens top_k]`.
        experts: the number of experts, at most 32.
        rows: the most rows of a segment.
        unit: the number of rows that each segment's is a multiple of.

    Returns:
        segments: the plan.
        pair_slots: int32 `[tokens top_k]`, the slot of each pair.
    """
    pairs, top_k = top_experts.size, top_experts.shape[1]
    slots = (pairs + (unit - 1) * min(experts, pairs)) // unit * unit
    slot_pairs, of_segments, first_slots, pair_slots = _launch(
        top_experts, slots, experts=experts, rows=rows, unit=unit
    )
    return Segments(slot_pairs, of_segments, rows, pairs, top_k, first_slots), pair_slots


def _launch(top_experts: mx.array, slots: int, *, experts: int, rows: int, unit: int) -> list[mx.array]:
    """Each slot's pair, each segment's expert and first slot, and each pair's slot (dispatch.cu)."""
    pairs = top_experts.size
    segments = segment_count(pairs, experts, rows)
    return launch(
        Kernel("dispatch", (("EXPERTS", experts),)),
        # A plan has no gradient, and MLX would ask the kernel for one.
        [mx.stop_gradient(top_experts.astype(mx.uint32))],
        [((slots,), mx.int32), ((segments,), mx.int32), ((segments + 1,), mx.int32), (top_experts.shape, mx.int32)],
        blocks=(1, 1, 1),
        threads=1024,
        scalars=(pairs, slots, segments, rows, unit),
    )
