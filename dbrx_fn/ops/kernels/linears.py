"""Products with one matrix, or with their experts' matrices, by CUDA kernels. Quantized ones are read as stored."""

from typing import Literal

import mlx.core as mx

from dbrx_fn.ops.dispatch import PackedDispatch
from dbrx_fn.ops.formats import Linear
from dbrx_fn.ops.kernels.cuda_module import on_gpu, on_hopper
from dbrx_fn.ops.kernels.dispatch import packed_plan
from dbrx_fn.ops.kernels.layer_norm import packed_layer_norm
from dbrx_fn.ops.kernels.segments import (
    INNER,
    LONG_ROWS,
    MATRIX_ROWS,
    MEDIUM_ROWS,
    kernel_format,
    long_segments,
    medium_segments,
    pack_rows,
    short_dense,
    takes_medium,
)

FEW_ROWS = 32
"""Up to this many rows, reading the weights is the bound."""


def _length(params: Linear, tokens: int, inner: int) -> Literal["short", "medium", "long"]:
    """Which of segments.py's kernels multiplies this number of rows."""
    medium = 8 < tokens <= 2 * MEDIUM_ROWS and takes_medium(params, inner)
    return "medium" if medium else "short" if tokens <= FEW_ROWS else "long"


def fits(params: Linear, x: mx.array) -> bool:
    """Whether a kernel exists for this matrix and number of rows. Many rows need a Hopper GPU."""
    outer, inner = params["weight"].shape[-2], x.shape[-1]
    length = _length(params, x.size // inner, inner)
    if not (on_gpu() if length == "short" else on_hopper()) or x.dtype != mx.bfloat16:
        return False
    return inner % INNER == 0 and outer % MATRIX_ROWS[length] == 0 and kernel_format(params, inner) is not None


def linear(params: Linear, x: mx.array, residual: mx.array | None = None) -> mx.array:
    """`x` `[... inner]` times a matrix `[outer inner]`, plus `residual` `[... outer]` if given."""
    inner = x.shape[-1]
    tokens = x.size // inner
    length = _length(params, tokens, inner)
    if length == "short":
        return short_dense(x, params, residual)
    shape, rows = (*x.shape[:-1], -1), x.reshape(tokens, inner)
    multiply, most = (medium_segments, MEDIUM_ROWS) if length == "medium" else (long_segments, LONG_ROWS)
    return multiply(pack_rows(rows, params, rows=most), params, tokens=tokens, residual=residual).reshape(shape)


def is_short(params: Linear, x: mx.array) -> bool:
    """Whether short segments multiply these rows."""
    inner = x.shape[-1]
    return _length(params, x.size // inner, inner) == "short"


def normed_linear(weight: mx.array, params: Linear, x: mx.array, *, eps: float) -> mx.array:
    """`linear` of the rows of `x` after LayerNorm with `weight`. They must be too many for short segments."""
    inner = x.shape[-1]
    tokens = x.size // inner
    medium = _length(params, tokens, inner) == "medium"
    multiply, most = (medium_segments, MEDIUM_ROWS) if medium else (long_segments, LONG_ROWS)
    packed = packed_layer_norm(weight, x.reshape(tokens, inner), params, eps=eps, rows=most)
    return multiply(packed, params, tokens=tokens).reshape(*x.shape[:-1], -1)


def fits_segments(params: Linear, x: mx.array) -> bool:
    """Whether `segments_linear` takes these matrices and these segments. It needs a Hopper GPU."""
    _, rows, inner = x.shape
    if not on_hopper() or x.dtype != mx.bfloat16 or rows < MEDIUM_ROWS or LONG_ROWS % rows:
        return False
    outer = params["weight"].shape[-2]
    return inner % INNER == 0 and outer % MATRIX_ROWS["long"] == 0 and kernel_format(params, inner) is not None


def segments_linear(params: Linear, x: mx.array, segment_experts: mx.array) -> mx.array:
    """Segments `x` `[segments rows inner]` times their experts' matrices, as `[segments rows outer]`.

    Neighbouring segments of the same expert are put together, until they are as long as the kernel's. All their rows
    are computed, also those of padding.
    """
    count, rows, inner = x.shape
    slots = count * rows
    joined = packed_plan(segment_experts[:, None], experts=params["weight"].shape[0], rows=LONG_ROWS // rows, unit=1)
    # From segments to their rows, each of which is a row of x with one choice.
    of_rows = mx.arange(rows, dtype=mx.int32)
    segments = PackedDispatch(
        joined.segment_experts,
        (joined.pair_slots * rows + of_rows).reshape(-1, 1),
        mx.repeat(joined.pair_segments, rows, axis=0),
        joined.first_slots * rows,
        slots,
    )
    packed = pack_rows(x.reshape(slots, inner), params, segments, rows=LONG_ROWS)
    product = long_segments(packed, params, segments=segments)
    return product[segments.pair_slots.reshape(count, rows)]
