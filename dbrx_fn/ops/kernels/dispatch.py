"""Dispatch plans in one kernel of one block. Stock operations take about fourteen launches."""

import mlx.core as mx

from dbrx_fn.ops.dispatch import Dispatch, dispatch, segment_count
from dbrx_fn.ops.kernels.cuda_module import Kernel, launch, on_gpu
from dbrx_fn.ops.kernels.segments import PADDED_ROWS, PackedSegments
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


plan = with_kernel(_kernel, fits=_fits, gradients=False)(dispatch)
"""`dbrx_fn.ops.dispatch.dispatch`, for what runs on kernels."""


def packed_plan(top_experts: mx.array, *, experts: int, rows: int, unit: int = PADDED_ROWS) -> PackedSegments:
    """A plan with little padding, for medium and long segments.

    An expert's segments but the last have `rows` rows. The last one has the rest, rounded up to a multiple of `unit`.

    Args:
        top_experts: `[tokens top_k]`.
        experts: the number of experts, at most 32.
        rows: the most rows of a segment.
        unit: what each segment's number of rows is a multiple of.
    """
    pairs = top_experts.size
    more = [top_experts.shape, (segment_count(pairs, experts, rows) + 1,)]
    of_segments, pair_slots, pair_segments, first_slots = _launch(
        top_experts, more, experts=experts, rows=rows, unit=unit, packed=True
    )
    slots = (pairs + (unit - 1) * min(experts, pairs)) // unit * unit
    return PackedSegments(of_segments, pair_slots, pair_segments, first_slots, slots, rows)


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
