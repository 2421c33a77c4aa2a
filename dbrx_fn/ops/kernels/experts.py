"""`dbrx_fn.ops.experts.mix_experts` by CUDA kernels, in few launches for every format of the weights.

One launch computes gate, up and their product, and one computes down. For a single token the latter also sums the
experts' outputs; several tokens take another launch for that, and one for the plan. Medium and long segments take one
more, which packs the tokens for tensor cores.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from dbrx_fn.ops.formats import is_adapted
from dbrx_fn.ops.kernels import combine
from dbrx_fn.ops.kernels.cuda_module import on_gpu, on_hopper
from dbrx_fn.ops.kernels.dispatch import packed_plan, plan
from dbrx_fn.ops.kernels.segments import (
    INNER,
    LONG_ROWS,
    MEDIUM_ROWS,
    PADDED_ROWS,
    Segments,
    kernel_format,
    long_segments,
    medium_segments,
    pack_rows,
    short_gated,
    short_mixed,
    short_slots,
    takes_medium,
)


def fits(params: Mapping[str, Any], dtype: mx.Dtype, *, activation: str, top_k: int, tokens: int) -> bool:
    """Whether kernels exist for these experts and this number of tokens. Many tokens need a Hopper GPU."""
    if any(map(is_adapted, params.values())):
        return False
    ffn_hidden = params["w1"]["weight"].shape[1]
    d_model = params["w2"]["weight"].shape[1]
    few = tokens == 1 or kernel_segment_rows(params, tokens * top_k) < MEDIUM_ROWS
    if (
        not (on_gpu() if few else on_hopper())
        or activation not in ("silu", "swish")
        or d_model % INNER
        or ffn_hidden % INNER
        or not combine.fits(d_model=d_model, top_k=top_k, dtype=dtype)
    ):
        return False
    formats = {
        kernel_format(params[name], inner) for name, inner in (("w1", d_model), ("v1", d_model), ("w2", ffn_hidden))
    }
    return len(formats) == 1 and None not in formats


def kernel_segment_rows(params: Mapping[str, Any], pairs: int) -> int:
    """The most rows of a segment, for `pairs` pairs of several tokens. `docs/performance.md` has the times."""
    average, d_model = pairs / params["w1"]["weight"].shape[0], params["w2"]["weight"].shape[1]
    if takes_medium(params["w1"], d_model):
        return 8 if average <= 5 else MEDIUM_ROWS if average <= 64 else LONG_ROWS
    if average <= 3:
        return 8
    return 16 if average <= 12 else LONG_ROWS


def mix_experts(
    params: Mapping[str, Any],
    x: mx.array,
    expert_weights: mx.array,
    top_experts: mx.array,
    residual: mx.array | None = None,
) -> mx.array:
    """`dbrx_fn.ops.experts.mix_experts`, plus `residual` if given. The result then has `residual`'s shape."""
    tokens, top_k = top_experts.shape
    pairs, experts = top_experts.size, params["w1"]["weight"].shape[0]
    gate, up, down = params["w1"], params["v1"], params["w2"]
    if tokens == 1:
        segments = _one_token(top_experts)
        hidden = short_gated(x, gate, up, segments)
        return short_mixed(hidden, down, segments, expert_weights, residual)
    rows = kernel_segment_rows(params, pairs)
    if rows >= MEDIUM_ROWS:
        packed = packed_plan(top_experts, experts=experts, rows=rows, unit=PADDED_ROWS)
        multiply = medium_segments if rows == MEDIUM_ROWS else long_segments
        hidden = multiply(pack_rows(x, gate, packed, rows=rows), gate, up, segments=packed)
        said, pair_slots = multiply(hidden, down, segments=packed), packed.pair_slots
    else:
        slot_pairs, segment_experts, pair_slots = plan(top_experts, experts=experts, rows=rows)
        segments = Segments(slot_pairs.reshape(-1), segment_experts, rows, pairs, top_k)
        hidden = short_gated(x, gate, up, segments)
        said = short_slots(hidden, down, segments)
    return combine.combine(said, pair_slots, expert_weights, residual)


def _one_token(top_experts: mx.array) -> Segments:
    """Segments for one token: each choice is a segment of one row and padding, so no sort is needed."""
    choices, rows = top_experts.size, 8
    slot_pairs = np.full((choices, rows), choices, np.int32)
    slot_pairs[:, 0] = np.arange(choices)
    return Segments(mx.array(slot_pairs.reshape(-1)), top_experts.astype(mx.uint32), rows, choices, choices)
