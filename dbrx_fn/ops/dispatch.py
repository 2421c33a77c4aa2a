"""The dispatch plan of the mixture of experts: which (token, choice) pair goes to which row of which segment.

Every (token, choice) pair is a row of work for one expert. Sorting the rows by expert brings each expert's rows
together. They are then cut into segments of a fixed number of rows, and each expert's last segment is padded with
zeros. The arrays' shapes don't depend on the routing, so one compiled graph serves every routing. Each segment is one
matrix product with one expert's weights:

    tokens     t0      t1      t2            2 choices each, 3 experts, segments of 2 rows
    choices    2 0     0 1     0 2
    sorted     t0 t1 t2 | t1 | t0 t2         expert 0 | expert 1 | expert 2
    segments   [t0 t1] [t2 .] [t1 .] [t0 t2] [. .] [. .]
    of expert     0       0      1      2      2     2

`min(pairs, pairs // rows + experts)` segments of `rows` rows are enough for every routing, and that many are computed.
Segments of one row make this a gather, which suits decoding. Long segments make it a batched product, which suits
prompts and training. Gradients flow through the rows, but not through the choice of experts.

The routing is dropless, as in MegaBlocks (https://arxiv.org/abs/2211.15841), the library that DBRX was trained with:
there is no capacity factor, and no token is dropped. Names follow MegaBlocks: `top_experts`, `expert_weights`,
`tokens_per_expert`.
"""

from typing import NamedTuple

import mlx.core as mx
from jaxtyping import Integer

from dbrx_fn.ops.formats import Format
from dbrx_fn.ops.quantized import pays_as_floats
from dbrx_fn.runtime.blas import FAST_BLAS
from dbrx_fn.runtime.compile import typed
from dbrx_fn.runtime.device import backend


class Dispatch(NamedTuple):
    """The place of each row of work. Pairs are numbered across all tokens, slots across all segments.

    `slot_pairs`: int `[segments rows]`, the (token, choice) pair in each slot. Padding slots hold the number of pairs.
    `segment_experts`: int `[segments]`, each segment's expert, ascending.
    `pair_slots`: int `[tokens top_k]`, the slot of each pair.
    """

    slot_pairs: mx.array
    segment_experts: mx.array
    pair_slots: mx.array


class PackedDispatch(NamedTuple):
    """A plan whose segments have only the rows that they need. Slots are numbered across all segments.

    `segment_experts`: int `[segments]`, each segment's expert, ascending.
    `pair_slots`: int `[tokens top_k]`, the slot of each pair.
    `pair_segments`: int `[tokens top_k]`, the segment of each pair.
    `first_slots`: int `[segments + 1]`, each segment's first slot. The last number is where the last segment ends.
    `slots`: a number of slots that is enough for every routing.
    """

    segment_experts: mx.array
    pair_slots: mx.array
    pair_segments: mx.array
    first_slots: mx.array
    slots: int


@typed
def dispatch(top_experts: Integer[mx.array, "tokens top_k"], *, experts: int, rows: int) -> Dispatch:
    """Plans segments of `rows` rows, each for one of `experts` experts."""
    pairs = top_experts.size
    segments = segment_count(pairs, experts, rows)
    if rows == 1:
        expert_of_pair = top_experts.reshape(-1).astype(mx.int32)
        order = mx.argsort(expert_of_pair).astype(mx.int32)
        # Without padding, slots are sorted pairs. The shortcut saves operations, whose number bounds decoding.
        pair_slots = mx.argsort(order).astype(mx.int32)
        return Dispatch(order[:, None], expert_of_pair[order], pair_slots.reshape(top_experts.shape))

    plan = packed_dispatch(top_experts, experts=experts, rows=rows, unit=rows)
    of_pairs, slots = mx.arange(pairs, dtype=mx.int32), plan.pair_slots.reshape(-1)
    slot_pairs = mx.put_along_axis(mx.full(segments * rows, pairs, mx.int32), slots, of_pairs, axis=0)
    return Dispatch(slot_pairs.reshape(segments, rows), plan.segment_experts, plan.pair_slots)


@typed
def packed_dispatch(
    top_experts: Integer[mx.array, "tokens top_k"], *, experts: int, rows: int, unit: int
) -> PackedDispatch:
    """Plans segments of at most `rows` rows, each for one of `experts` experts, for kernels that read their lengths.

    An expert's segments but the last have `rows` rows. The last one has the rest, rounded up to a multiple of `unit`.
    """
    pairs = top_experts.size
    expert_of_pair = top_experts.reshape(-1).astype(mx.int32)
    order = mx.argsort(expert_of_pair).astype(mx.int32)
    # Counted by comparison: a scatter-add of many pairs of one expert would serialize on a GPU.
    tokens_per_expert = (expert_of_pair[:, None] == mx.arange(experts, dtype=mx.int32)).sum(axis=0)
    slots_per_expert = (tokens_per_expert + (unit - 1)) // unit * unit
    segments_per_expert = (tokens_per_expert + (rows - 1)) // rows
    last_slots, last_segments = mx.cumsum(slots_per_expert), mx.cumsum(segments_per_expert)
    first_slots, first_segments = last_slots - slots_per_expert, last_segments - segments_per_expert

    sorted_experts = expert_of_pair[order]
    first_rows = mx.cumsum(tokens_per_expert) - tokens_per_expert
    nth = mx.arange(pairs, dtype=mx.int32) - first_rows[sorted_experts]
    pair_slots = mx.put_along_axis(mx.zeros(pairs, mx.int32), order, first_slots[sorted_experts] + nth, axis=0)
    of_sorted = first_segments[sorted_experts] + nth // rows
    pair_segments = mx.put_along_axis(mx.zeros(pairs, mx.int32), order, of_sorted, axis=0)

    # Unused segments at the end get the last expert, and begin where its slots end.
    numbers = mx.arange(segment_count(pairs, experts, rows) + 1, dtype=mx.int32)
    of_segments = mx.minimum((numbers[:, None] >= last_segments).sum(axis=1), experts - 1)
    begins = first_slots[of_segments] + (numbers - first_segments[of_segments]) * rows
    return PackedDispatch(
        of_segments[:-1].astype(mx.int32),
        pair_slots.reshape(top_experts.shape),
        pair_segments.reshape(top_experts.shape),
        mx.minimum(begins, last_slots[of_segments]),
        packed_slots(pairs, experts, unit),
    )


def packed_slots(pairs: int, experts: int, unit: int) -> int:
    """How many slots are enough for every routing, if each expert's are a multiple of `unit`."""
    return (pairs + (unit - 1) * min(experts, pairs)) // unit * unit


def segment_count(pairs: int, experts: int, rows: int) -> int:
    """How many segments of `rows` rows are enough for every routing of `pairs` pairs to `experts` experts."""
    return min(pairs, pairs // rows + experts)


def segment_rows(pairs: int, experts: int, dtype: mx.Dtype, form: Format | None = None) -> int:
    """The number of rows per segment, for `pairs` (token, choice) pairs over `experts` experts.

    Long segments read an expert's weights less often. Short ones need less padding: a half-empty segment costs as much
    as a full one, and every expert can have one. Metal has a kernel for sorted single rows. MLX compiles a CUDA kernel
    for each size on first use, so there are few sizes. `docs/performance.md` has the times for each back end.

    Args:
        pairs: number of rows of work.
        experts: number of experts that share them.
        dtype: the experts' dtype.
        form: the format of the experts' matrices; `None` if they are dense.
    """
    average = pairs // experts
    if backend() == "metal" or average == 0:
        return 1
    if backend() == "cuda":
        if average >= 1024 and dtype in (mx.bfloat16, mx.float16):
            return 128
        return 16 if average <= 16 else 64
    if FAST_BLAS is None:
        return 1 if average < 64 else 8
    if form is not None and not pays_as_floats(average, form):
        return 1
    if average < 64:
        return 1 if average < 8 else 16
    return 32 if average < 128 else 64
