"""Replacements for MLX's quantized products in the cases where those are slow or wrong.

The product then dequantizes the matrix first. These floats live only as long as the product.
"""

import mlx.core as mx

from dbrx_fn.ops.formats import Format, Linear, dequantize_matrix
from dbrx_fn.runtime.blas import FAST_BLAS
from dbrx_fn.runtime.device import backend, on_cpu


def pays_as_floats(rows: int, form: Format) -> bool:
    """Whether dequantizing first and then a dense product is faster for this many rows.

    On a CPU with a fast BLAS a few rows are enough, since MLX computes quantized products there row by row
    (`docs/performance.md` has the times).
    """
    if backend() != "cpu" or FAST_BLAS is None:
        return False
    if form.mode in ("mxfp4", "nvfp4"):
        return rows >= 32
    if form.mode == "mxfp8":
        return rows >= 3
    return rows >= (24 if form.bits in (3, 5, 6) else 6)


def has_no_kernel(rows: int, inner: int, dtype: mx.Dtype, form: Format) -> bool:
    """Whether MLX's CUDA kernels fail for this many float32 rows at once (MLX 0.32.4, H100).

    From 33 rows on, groups of 128 ask for more shared memory than a kernel may have ("invalid argument"). If a row of 4
    or 8 affine bits is a single group, MLX picks a kernel for Hopper GPUs (`supports_qmm_sm90`) that writes wrong
    numbers in float32.
    """
    if backend() != "cuda" or dtype != mx.float32:
        return False
    one_group = form.mode == "affine" and form.bits in (4, 8) and inner <= form.group_size
    return one_group or (form.group_size == 128 and rows > 32)


def as_floats(matrix: Linear, form: Format) -> mx.array:
    """The matrix `[... outer inner]` in float32, the dtype of the CPU's products."""
    leaves = _in_float32(matrix)
    return dequantize_matrix([leaf for leaf in leaves if leaf is not None], form, mx.float32)


def operands(x: mx.array, matrix: Linear) -> tuple[mx.array, mx.array, mx.array, mx.array | None]:
    """Activations, weight, scales and biases in the dtypes that the back end multiplies in.

    MLX's CPU back end sums in the operands' own dtype. In bfloat16 that is slower and less exact than in float32
    (`docs/performance.md`).
    """
    if not on_cpu():
        return x, matrix["weight"], matrix["scales"], matrix.get("biases")
    return x.astype(mx.float32), *_in_float32(matrix)


def _in_float32(matrix: Linear) -> tuple[mx.array, mx.array, mx.array | None]:
    scales, biases = matrix["scales"], matrix.get("biases")
    # In the modes without biases, scales are packed bytes and not numbers.
    if biases is None:
        return matrix["weight"], scales, None
    return matrix["weight"], scales.astype(mx.float32), biases.astype(mx.float32)
