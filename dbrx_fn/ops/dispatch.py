"""The experts' plan: which (token, choice) pair stands in which row of which segment.

Every (token, choice) pair is a row of work for one expert. Sorting the rows by expert makes each expert's rows
neighbours. Cutting them into segments of a fixed number of rows, the last of each expert padded with zeros, gives
arrays whose shapes don't depend on what the router says. So one compiled graph serves every routing, and each segment
is one matrix product with one expert's weights:

    tokens     t0      t1      t2            2 choices each, 3 experts, segments of 2 rows
    choices    2 0     0 1     0 2
    sorted     t0 t1 t2 | t1 | t0 t2         expert 0 | expert 1 | expert 2
    segments   [t0 t1] [t2 .] [t1 .] [t0 t2] [. .] [. .]
    of expert     0       0      1      2      2     2

There are at most `rows // segment_rows + experts` segments, or as many as rows if that is fewer, and that is how many
are computed. With one row a segment this is the gather that decoding a single token wants; with long ones it is the
batched product that long prompts and training want. Gradients flow through it. The choice of experts has none.

This is dropless routing as in MegaBlocks (https://arxiv.org/abs/2211.15841), the library that DBRX was trained with: no
capacity factor, no dropped token. Its vocabulary is used here: `top_experts`, `expert_weights`, `tokens_per_expert`.
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


def segment_rows(pairs: int, experts: int, dtype: mx.Dtype, form: Format | None = None) -> int:
    """How many rows a segment has, for `pairs` (token, choice) pairs over `experts`.

    Long segments read an expert's weights less often. Short ones pad less: a half-empty segment costs as much as a full
    one, and every expert can have one. Metal has a kernel for sorted single rows. MLX's CUDA kernels are compiled for
    each size on first use, so there are few. `docs/performance.md` has the times for each back end.

    Args:
        pairs: how many rows of work there are.
        experts: how many share them.
        dtype: of the experts' weights.
        form: of the experts' matrices; `None` if they are dense.
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
