"""The experts' plan: which (token, choice) pair stands in which row of which segment; `dbrx_fn.model.layers.moe` says why."""

from typing import NamedTuple

import mlx.core as mx
from jaxtyping import Integer

from dbrx_fn.runtime.compile import typed


class Dispatch(NamedTuple):
    """Where each row of work goes. Pairs are counted through all tokens, slots through all segments.

    `slot_pairs`: int `[segments rows]`, the (token, choice) pair in each slot; in padding, the number of pairs.
    `segment_experts`: int `[segments]`, ascending.
    `pair_slots`: int `[tokens top_k]`, the slot of each pair.
    """

    slot_pairs: mx.array
    segment_experts: mx.array
    pair_slots: mx.array


@typed
def dispatch(top_experts: Integer[mx.array, "tokens top_k"], *, experts: int, rows: int) -> Dispatch:
    """Plans segments of `rows` rows that each belong to one of `experts` experts."""
    pairs = top_experts.size
    segments = min(pairs, pairs // rows + experts)

    expert_of_pair = top_experts.reshape(-1).astype(mx.int32)
    order = mx.argsort(expert_of_pair).astype(mx.int32)
    if rows == 1:
        # Nothing is padded, so slots are sorted pairs; decoding is bound by the number of operations, and this is few.
        pair_slots = mx.argsort(order).astype(mx.int32)
        return Dispatch(order[:, None], expert_of_pair[order], pair_slots.reshape(top_experts.shape))

    # Compared and not added up by address: 16,384 pairs of one expert would wait for one another, 16 ms on an H100.
    tokens_per_expert = (expert_of_pair[:, None] == mx.arange(experts, dtype=mx.int32)).sum(axis=0)
    segments_per_expert = (tokens_per_expert + (rows - 1)) // rows
    last_segments = mx.cumsum(segments_per_expert)

    first_rows = mx.cumsum(tokens_per_expert) - tokens_per_expert
    first_slots = (last_segments - segments_per_expert) * rows
    slots = mx.arange(pairs, dtype=mx.int32) + (first_slots - first_rows)[expert_of_pair[order]]

    slot_pairs = mx.put_along_axis(mx.full(segments * rows, pairs, mx.int32), slots, order, axis=0)
    pair_slots = mx.put_along_axis(mx.zeros(pairs, mx.int32), order, slots, axis=0)
    # Segments past the last one are the last expert's.
    segment_experts = (mx.arange(segments, dtype=mx.int32)[:, None] >= last_segments).sum(axis=1)
    segment_experts = mx.minimum(segment_experts, experts - 1)
    return Dispatch(slot_pairs.reshape(segments, rows), segment_experts, pair_slots.reshape(top_experts.shape))
