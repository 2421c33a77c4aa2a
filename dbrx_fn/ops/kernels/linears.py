"""Products with one matrix by CUDA kernels. Quantized matrices are read as stored."""

import mlx.core as mx

from dbrx_fn.ops.formats import Linear
from dbrx_fn.ops.kernels.cuda_module import on_gpu, on_hopper
from dbrx_fn.ops.kernels.segments import INNER, MATRIX_ROWS, kernel_format, long_segments, pack_rows, short_dense

FEW_ROWS = 32
"""Up to this many rows, reading the weights is the bound."""


def fits(params: Linear, x: mx.array) -> bool:
    """Whether a kernel exists for this matrix and number of rows. Many rows need a Hopper GPU."""
    outer, inner = params["weight"].shape[-2], x.shape[-1]
    few = x.size // inner <= FEW_ROWS
    if not (on_gpu() if few else on_hopper()) or x.dtype != mx.bfloat16:
        return False
    of = MATRIX_ROWS["short" if few else "long"]
    return inner % INNER == 0 and outer % of == 0 and kernel_format(params, inner) is not None


def linear(params: Linear, x: mx.array, residual: mx.array | None = None) -> mx.array:
    """`x` `[... inner]` times a matrix `[outer inner]`, plus `residual` `[... outer]` if given."""
    tokens = x.size // x.shape[-1]
    if tokens <= FEW_ROWS:
        return short_dense(x, params, residual)
    rows = pack_rows(x.reshape(tokens, -1), params)
    return long_segments(rows, params, tokens=tokens, residual=residual).reshape(*x.shape[:-1], -1)
