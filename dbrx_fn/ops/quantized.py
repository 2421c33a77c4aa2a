"""Where MLX's products with quantized matrices are slow or wrong, and what takes their place.

A product then multiplies by floats that are made of the matrix, which live as long as the product takes.
"""

import mlx.core as mx

from dbrx_fn.ops.formats import Format, Linear, dequantize_matrix
from dbrx_fn.runtime.blas import FAST_BLAS
from dbrx_fn.runtime.device import backend, on_cpu


def pays_as_floats(rows: int, form: Format) -> bool:
    """Whether a dense product with floats made of the matrix is faster for this many rows.

    On a CPU with OpenBLAS it soon is, since MLX computes quantized products there row by row
    (`docs/quantization.md` has the times).
    """
    if backend() != "cpu" or FAST_BLAS is None:
        return False
    if form.mode in ("mxfp4", "nvfp4"):
        return rows >= 32
    if form.mode == "mxfp8":
        return rows >= 3
    return rows >= (24 if form.bits in (3, 5, 6) else 6)


def has_no_kernel(rows: int, inner: int, dtype: mx.Dtype, form: Format) -> bool:
    """Whether MLX's CUDA kernels fail for this many rows at once in float32 (MLX 0.32.4, H100).

    Groups of 128 ask for more shared memory than a kernel may have, from 33 rows on ("invalid argument"). Where a row
    of 4 or 8 affine bits is one group, MLX takes a kernel for Hopper GPUs (`supports_qmm_sm90`), which writes wrong
    numbers in float32.
    """
    if backend() != "cuda" or dtype != mx.float32:
        return False
    one_group = form.mode == "affine" and form.bits in (4, 8) and inner <= form.group_size
    return one_group or (form.group_size == 128 and rows > 32)


def as_floats(matrix: Linear, form: Format) -> mx.array:
    """The matrix `[... outer inner]` in float32, as the CPU's products are."""
    leaves = _in_float32(matrix)
    return dequantize_matrix([leaf for leaf in leaves if leaf is not None], form, mx.float32)


def operands(x: mx.array, matrix: Linear) -> tuple[mx.array, mx.array, mx.array, mx.array | None]:
    """Activations, weight, scales and biases in the dtypes that the back end multiplies in.

    A CPU adds up in the operands' own dtype. In bfloat16 that is a relative error of 5e-2, and eight times as slow as
    by way of float32.
    """
    if not on_cpu():
        return x, matrix["weight"], matrix["scales"], matrix.get("biases")
    return x.astype(mx.float32), *_in_float32(matrix)


def _in_float32(matrix: Linear) -> tuple[mx.array, mx.array, mx.array | None]:
    scales, biases = matrix["scales"], matrix.get("biases")
    # The scales of the modes without biases are packed, not numbers.
    if biases is None:
        return matrix["weight"], scales, None
    return matrix["weight"], scales.astype(mx.float32), biases.astype(mx.float32)
